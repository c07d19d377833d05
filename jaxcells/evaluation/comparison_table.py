"""The table of a comparison: CSV for programs, Markdown for papers, text for the terminal."""

import csv
import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcells.evaluation.comparison import Choice
from jaxcells.files import write_whole
from jaxcells.text import shortened

_WIDTH = 100  # of the text; Markdown may be wider
_SHORTEST_NAME = 12
_NOTHING = "–"


@dataclasses.dataclass(frozen=True)
class Row:
    """One experiment of a comparison. None is what is not known, as of one that failed.

    Attributes:
      name: the experiment's.
      seeds: those that were trained to the end.
      validation: figures of the validation split, from `split_figures`.
      test: figures of the test split, from `split_figures`.
      parameters: number of them.
      multiply_adds: of one crop, forward.
      train_s: seconds of training one seed, its epochs by their median, compilation apart; the
        mean over seeds.
      epoch_s: seconds of one epoch of it.
      train_images_per_second: in training.
      eval_images_per_second: in evaluation.
      step_memory_bytes: device memory that a training step needs.
      chosen: whether the rule chose it.
      failure: why it, or one of its seeds, was not trained to the end.
    """

    name: str
    seeds: tuple[int, ...] = ()
    validation: Mapping[str, Any] | None = None
    test: Mapping[str, Any] | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    train_s: float | None = None
    epoch_s: float | None = None
    train_images_per_second: float | None = None
    eval_images_per_second: float | None = None
    step_memory_bytes: int | None = None
    chosen: bool = False
    failure: str | None = None

    @property
    def status(self) -> str:
        """Either "finished", "failed", or "partly failed" where only some seeds were trained."""
        if not self.failure:
            return "finished"
        return "partly failed" if self.seeds else "failed"


@dataclasses.dataclass(frozen=True)
class _Table:
    """Cells as they are shown; `header` may have line breaks, `marked` numbers rows."""

    header: tuple[str, ...]
    rows: list[list[str]]
    marked: frozenset[int] = frozenset()


def write_table_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Writes a line per experiment: raw numbers in seconds and bytes, nothing where not known.

    The columns of each split are `validation_balanced_accuracy`, `…_deviation` over seeds,
    `…_low` and `…_high` (the 95 % interval), and the same of `accuracy`.
    """
    with write_whole(Path(path)) as file:
        lines = [_csv_line(row) for row in rows]
        writer = csv.DictWriter(file, _csv_line(Row("")).keys())
        writer.writeheader()
        writer.writerows(lines)


def table_markdown(
    rows: Sequence[Row],
    choice: Choice | None = None,
    comparisons: Mapping[str, Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The comparison for a paper.

    Args:
      rows: the experiments, in the order to show them.
      choice: what the rule chose; None leaves the rule and its outcome out.
      comparisons: `compare_with` of the chosen experiment on the test split.
      notes: sentences that belong to the figures.

    Returns:
      Markdown: figures, cost (the chosen experiment bold), failures, the rule and how each
      experiment fared by it, the paired comparison on the test split.
    """
    parts = []
    for block in _blocks(rows, choice, comparisons or {}, notes):
        if isinstance(block, _Table):
            parts.append(_markdown_table(block))
        else:
            parts.append(_escaped(block))
    return "\n\n".join(parts) + "\n"


def table_text(
    rows: Sequence[Row],
    choice: Choice | None = None,
    comparisons: Mapping[str, Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """What `table_markdown` says, as plain text at most 100 columns wide; ">" marks the chosen."""
    parts = []
    for block in _blocks(rows, choice, comparisons or {}, notes):
        if isinstance(block, _Table):
            parts.append(_text_table(block))
        else:
            parts.append(textwrap.fill(block, _WIDTH, break_on_hyphens=False))
    return "\n\n".join(parts)


def _csv_line(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {
        "experiment": row.name,
        "status": row.status,
        "chosen": row.chosen,
        "seeds": " ".join(map(str, row.seeds)),
    }
    for split, figures in (("validation", row.validation), ("test", row.test)):
        for key in ("balanced_accuracy", "accuracy"):
            low, high = figures["interval_95"][key] if figures else (None, None)
            line |= {
                f"{split}_{key}": figures[key] if figures else None,
                f"{split}_{key}_deviation": figures["deviation"][key] if figures else None,
                f"{split}_{key}_low": low,
                f"{split}_{key}_high": high,
            }
    cost = ("parameters", "multiply_adds", "train_s", "epoch_s", "train_images_per_second")
    for key in (*cost, "eval_images_per_second", "step_memory_bytes"):
        line[key] = getattr(row, key)
    return line | {"failure": _one_line(row.failure or "")}


def _blocks(
    rows: Sequence[Row],
    choice: Choice | None,
    comparisons: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str],
) -> list[str | _Table]:
    """Paragraphs and tables, one after the other."""
    shown = [row for row in rows if row.validation]
    marked = frozenset(number for number, row in enumerate(shown) if row.chosen)
    blocks: list[str | _Table] = []
    if shown:
        several = any(len(row.seeds) > 1 for row in shown)
        over_seeds = "mean ± standard deviation over seeds, " if several else ""
        blocks += [
            f"Accuracy: {over_seeds}95 % interval over independent fields (groups), "
            "not over seeds.",
            _figures_table(shown, marked),
            *_interval_notes(shown),
            "Cost: training time of one seed (its epochs by their median, compilation apart); "
            "multiply-adds of one crop, forward; memory that a training step needs.",
            _cost_table(shown, marked),
        ]
    blocks += notes
    blocks += [f"{row.name} {row.status}: {_one_line(row.failure)}" for row in rows if row.failure]
    if choice:
        blocks += _choice_blocks(choice)
    if choice and comparisons:
        blocks += _comparison_blocks(choice.chosen, comparisons)
    return blocks


def _figures_table(rows: Sequence[Row], marked: frozenset[int]) -> _Table:
    header = ("experiment", "balanced accuracy,\nvalidation", "balanced accuracy,\ntest")
    cells = []
    for row in rows:
        splits = (row.validation, row.test)
        balanced = [_estimate(split) for split in splits]
        plain = [f"{split['accuracy']:.3f}" if split else _NOTHING for split in splits]
        cells.append([row.name, *balanced, *plain])
    return _Table((*header, "accuracy,\nvalidation", "accuracy,\ntest"), cells, marked)


def _cost_table(rows: Sequence[Row], marked: frozenset[int]) -> _Table:
    header = ("experiment", "seeds", "parameters", "multiply-\nadds", "training\ntime")
    rates = ("time per\nepoch", "training\nimages/s", "evaluation\nimages/s", "step\nmemory")
    cells = [
        [
            row.name,
            str(len(row.seeds)),
            _known(row.parameters, _count),
            _known(row.multiply_adds, _count),
            _known(row.train_s, _time),
            _known(row.epoch_s, _time),
            _known(row.train_images_per_second, _three_digits),
            _known(row.eval_images_per_second, _three_digits),
            _known(row.step_memory_bytes, lambda value: f"{_count(value)}B"),
        ]
        for row in rows
    ]
    return _Table((*header, *rates), cells, marked)


def _interval_notes(rows: Sequence[Row]) -> list[str]:
    """Every note once, with the experiments it is about unless it is about all."""
    about: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for split, figures in (("validation", row.validation), ("test", row.test)):
            if figures and figures["interval_note"]:
                about.setdefault((split, figures["interval_note"]), []).append(row.name)
    notes = []
    for (split, note), names in about.items():
        whom = "" if len(names) == len(rows) else f" ({', '.join(names)})"
        notes.append(f"Note on {split}{whom}: {note}.")
    return notes


def _choice_blocks(choice: Choice) -> list[str | _Table]:
    by_name = {candidate.name: candidate for candidate in choice.candidates}
    best, chosen = by_name[choice.best], by_name[choice.chosen]
    cells = [
        [
            candidate.name,
            "best"
            if candidate is best
            else _difference(candidate.difference, candidate.interval_95),
            "yes" if candidate.qualifies else "no",
            _time(candidate.seconds),
        ]
        for candidate in choice.candidates
    ]
    marked = frozenset(n for n, c in enumerate(choice.candidates) if c.name == choice.chosen)
    outcome = f"Chosen: {chosen.name}, trained in {_time(chosen.seconds)}."
    if best is not chosen:
        outcome += (
            f" Best on validation: {best.name}, {best.balanced_accuracy:.3f} against "
            f"{chosen.balanced_accuracy:.3f}, trained in {_time(best.seconds)}."
        )
    header = ("experiment", "best less this,\nvalidation", "qualifies", "training\ntime")
    note = [f"Note: {choice.note}."] if choice.note else []
    return [f"Rule: {choice.rule}", _Table(header, cells, marked), outcome, *note]


def _comparison_blocks(
    chosen: str, comparisons: Mapping[str, Mapping[str, Any]]
) -> list[str | _Table]:
    cells = []
    for name, compared in comparisons.items():
        test = compared["mcnemar"]
        interval = compared["interval_95"]["balanced_accuracy"]
        p_value = "<0.001" if test["p_value"] < 0.001 else f"{test['p_value']:.3f}"
        counts = [str(test["only_a_right"]), str(test["only_b_right"])]
        cells.append([name, _difference(compared["balanced_accuracy"], interval), *counts, p_value])
    caption = (
        f"Test split, compared after the choice: balanced accuracy of {chosen} less that of each "
        "other, with the paired 95 % interval over fields; McNemar's exact test of the first "
        "seeds, which takes the crops of a field for independent and is not corrected for the "
        "number of tests."
    )
    header = ("experiment", "chosen less this,\ntest", "only chosen\nright", "only this\nright")
    return [caption, _Table((*header, "McNemar p,\nfirst seeds"), cells)]


def _markdown_table(table: _Table) -> str:
    header = [line.replace("-\n", "-").replace("\n", " ") for line in table.header]
    rows = [header]
    for number, row in enumerate(table.rows):
        cells = [_escaped(cell) for cell in row]
        rows.append([f"**{cell}**" for cell in cells] if number in table.marked else cells)
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [_justified(row, widths) for row in rows]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text_table(table: _Table) -> str:
    heads = [cell.split("\n") for cell in table.header]
    above = max(map(len, heads))
    heads = [[""] * (above - len(head)) + head for head in heads]
    rows = [list(line) for line in zip(*heads, strict=True)] + table.rows
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = _WIDTH - 2 - sum(2 + width for width in widths[1:])
    widths[0] = min(widths[0], max(_SHORTEST_NAME, left))
    rows = [[shortened(row[0], widths[0]), *row[1:]] for row in rows]
    marks = [" "] * above + [
        ">" if number in table.marked else " " for number in range(len(table.rows))
    ]
    lines = [
        f"{mark} {'  '.join(_justified(row, widths))}".rstrip()
        for mark, row in zip(marks, rows, strict=True)
    ]
    return "\n".join(lines)


def _justified(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Names to the left, figures to the right."""
    figures = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return [cells[0].ljust(widths[0]), *figures]


def _escaped(text: str) -> str:
    for character in "\\|*_<`":
        text = text.replace(character, f"\\{character}")
    return text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _estimate(figures: Mapping[str, Any] | None) -> str:
    """0.945 (0.884–0.989), or 0.945 ± 0.012 (0.884–0.989) of several seeds."""
    if not figures:
        return _NOTHING
    text = f"{figures['balanced_accuracy']:.3f}"
    deviation = figures["deviation"]["balanced_accuracy"]
    if deviation is not None:
        text += f" ± {deviation:.3f}"
    low, high = figures["interval_95"]["balanced_accuracy"]
    return text if low is None else f"{text} ({low:.3f}–{high:.3f})"


def _difference(difference: float, interval: Iterable[float | None]) -> str:
    low, high = interval
    text = _signed(difference)
    if low is None or high is None:
        return text
    return f"{text} ({_signed(low)} to {_signed(high)})"


def _signed(value: float) -> str:
    text = f"{value:.3f}"
    return text.replace("-", "" if float(text) == 0 else "−")


def _known(value: float | None, shown: Callable[[float], str]) -> str:
    return _NOTHING if value is None else shown(value)


def _three_digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"


def _count(value: float) -> str:
    """21.8 M, 3.66 G."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            return f"{_three_digits(value / scale)} {prefix}"
    return f"{value:.0f} "


def _time(seconds: float) -> str:
    """0.45 s, 86 s, 4.5 min, 12 min, 3.1 h."""
    if seconds < 99.5:
        return f"{_two_digits(seconds)} s"
    if seconds < 99.5 * 60:
        return f"{_two_digits(seconds / 60)} min"
    return f"{_two_digits(seconds / 3600)} h"


def _two_digits(value: float) -> str:
    decimals = 2 if value < 0.995 else 1 if value < 9.95 else 0
    return f"{value:.{decimals}f}"
