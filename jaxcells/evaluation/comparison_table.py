"""The table of a comparison: CSV for programs, Markdown for papers, text for the terminal."""

import dataclasses
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from jaxcells.evaluation import prose
from jaxcells.evaluation.bootstrap import Split
from jaxcells.evaluation.comparison import Choice, Comparison, Estimate, paired_difference
from jaxcells.files import write_csv, write_whole
from jaxcells.text import amount, digits, duration, markdown, markdown_table, text_table

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # arguments of `text_table`
Parts = Sequence[str | Table]
Failures = Mapping[str, str]  # why a training did not come to its end, by its label

_WIDTH = 100  # of the text; Markdown may be wider
_SPLITS = ("validation", "test")
# What a network costs: attributes of a row, how they are headed and shown.
_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", amount),
    "multiply_adds": ("multiply-\nadds", amount),
    "train_s": ("training\ntime", duration),
    "epoch_s": ("time per\nepoch", duration),
    "train_images_per_second": ("training\nimages/s", digits),
    "eval_images_per_second": ("evaluation\nimages/s", digits),
    "step_memory_bytes": ("step\nmemory", lambda value: f"{amount(value)}B"),
}
# Heads of the table of the choice, and of that of the test split.
_CANDIDATES = ("experiment", "best less this,\nvalidation", "qualifies", "training\ntime")
_COMPARISONS = (
    *("experiment", "chosen less this,\ntest", "only chosen\nright", "only this\nright"),
    "McNemar p,\nfirst seeds",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one experiment of a comparison found.

    Attributes:
      name: the experiment's.
      chosen: whether the rule chose it.
      seeds: those that were trained to the end.
      validation: accuracies on the validation split.
      test: accuracies on the test split.
      parameters: number of them.
      multiply_adds: of one crop, forward.
      train_s: seconds of training one seed, its epochs by their median, compilation apart; the
        mean over seeds.
      epoch_s: seconds of one epoch of it.
      train_images_per_second: in training.
      eval_images_per_second: in evaluation.
      step_memory_bytes: device memory that a training step needs.
      training_images: whose crops were trained on.
    """

    name: str
    chosen: bool
    seeds: tuple[int, ...]
    validation: Estimate
    test: Estimate
    parameters: int
    multiply_adds: int
    train_s: float
    epoch_s: float
    train_images_per_second: float
    eval_images_per_second: float
    step_memory_bytes: int
    training_images: int


def write_table(folder: Path, rows: Sequence[Row], failures: Failures, parts: Parts) -> None:
    """Writes table.md, of `paragraphs`, and table.csv.

    The latter has a line per experiment: raw numbers in seconds and bytes. The columns of each
    split are `validation_balanced_accuracy`, `…_deviation` over seeds, `…_low` and `…_high` (the
    95 % interval), and the same of `accuracy`. A line for each failure follows.

    Args:
      folder: where the files go.
      rows: the experiments.
      failures: why a training did not come to its end, by its label.
      parts: what `paragraphs` gave.
    """
    lines: list[dict[str, Any]] = []
    for row in rows:
        line = {
            "experiment": row.name,
            "chosen": row.chosen,
            "seeds": " ".join(map(str, row.seeds)),
            "training_images": row.training_images,
        }
        for split, key in itertools.product(_SPLITS, ("balanced_accuracy", "accuracy")):
            estimate, name = getattr(row, split), f"{split}_{key}"
            line[name] = getattr(estimate, key)
            line[f"{name}_deviation"] = getattr(estimate, f"{key}_deviation")
            line[f"{name}_low"], line[f"{name}_high"] = estimate.interval_95[key]
        lines.append(line | {key: getattr(row, key) for key in _COSTS})
    header = [*lines[0], "failure"]
    lines += [{"experiment": label, "failure": text} for label, text in failures.items()]
    write_csv(folder / "table.csv", header, [[line.get(key) for key in header] for line in lines])
    with write_whole(folder / "table.md") as file:
        file.write(as_markdown(parts) + "\n")


def paragraphs(
    rows: Sequence[Row],
    failures: Failures,
    choice: Choice,
    comparisons: Mapping[str, Comparison],
    notes: Parts,
) -> list[str | Table]:
    """The comparison for a reader, as sentences and tables.

    Args:
      rows: the experiments, in the order to show them.
      failures: why a training did not come to its end, by its label.
      choice: what the rule chose.
      comparisons: `compare_with` of the chosen experiment on the test split.
      notes: sentences that belong to the figures.

    Returns:
      Accuracies, cost, notes, failures, the rule and how each experiment fared by it, the paired
      comparison on the test split; ">" marks the chosen experiment.
    """
    accuracies, costs = [], []
    for row in rows:
        name, estimates = _marked(row.name, row.chosen), (row.validation, row.test)
        plain = [f"{estimate.accuracy:.3f}" for estimate in estimates]
        accuracies.append([name, *map(_shown, estimates), *plain])
        shown = [show(getattr(row, key)) for key, (_, show) in _COSTS.items()]
        costs.append([name, str(len(row.seeds)), *shown])
    by_name = {candidate.name: candidate for candidate in choice.candidates}
    best, candidates = by_name[choice.best], []
    for c in choice.candidates:
        behind = "best" if c is best else _difference(c.behind)
        qualifies, name = "yes" if c.qualifies else "no", _marked(c.name, c.name == choice.chosen)
        candidates.append([name, behind, qualifies, duration(c.seconds)])
    compared = []
    for name, found in comparisons.items():
        p_value = "<0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"
        counts = [str(found.only_chosen_right), str(found.only_other_right)]
        compared.append([name, _difference(found.difference), *counts, p_value])
    header = [f"{kind}accuracy,\n{split}" for kind in ("balanced ", "") for split in _SPLITS]
    tables = {
        "[accuracies]": (["experiment", *header], accuracies),
        "[costs]": (["experiment", "seeds", *(head for head, _ in _COSTS.values())], costs),
        "[candidates]": (_CANDIDATES, candidates),
        "[comparisons]": (_COMPARISONS, compared),
    }
    return prose.paragraphs(
        "comparison",
        {"[notes]": notes, **{name: [table] for name, table in tables.items()}},
        interval_notes=_interval_notes(rows),
        failures=failures,
        choice=choice,
        chosen=by_name[choice.chosen],
        best=best,
        comparisons=comparisons,
    )


def learning_curve(
    name: str, rows: Sequence[Row], predictions: Mapping[str, npt.ArrayLike], split: Split
) -> list[str | Table]:
    """A learning curve as a table, and whether more images would help by its last two points.

    Args:
      name: of what was trained.
      rows: two or more, by their number of training images.
      predictions: {experiment: int [S, N]} on the validation split.
      split: the validation split.
    """
    fewer, most = rows[-2:]
    gain = paired_difference(predictions[most.name], predictions[fewer.name], split)
    low, high = gain.interval_95["balanced_accuracy"]
    cells = [[row.name, str(row.training_images), _shown(row.validation)] for row in rows]
    heads = ("experiment", "training\nimages", "balanced accuracy,\nvalidation")
    points = {"[points]": [(heads, cells)]}
    values = {"fewer": fewer, "most": most, "change": _difference(gain), "low": low, "high": high}
    return prose.paragraphs("learning_curve", points, name=name, **values)


def as_markdown(parts: Parts) -> str:
    """`paragraphs` for a paper."""
    return "\n\n".join(markdown(p) if isinstance(p, str) else markdown_table(*p) for p in parts)


def as_text(parts: Parts) -> str:
    """`paragraphs` as plain text at most 100 columns wide."""
    fill = textwrap.TextWrapper(_WIDTH, break_on_hyphens=False).fill
    return "\n\n".join(
        fill(part) if isinstance(part, str) else text_table(*part, width=_WIDTH) for part in parts
    )


def _interval_notes(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Every note once, with the experiments that it is about."""
    about: dict[str, list[str]] = {}
    for row, split in itertools.product(rows, _SPLITS):
        if note := getattr(row, split).interval_note:
            about.setdefault(f"{split}: {note}", []).append(row.name)
    return about


def _marked(name: str, chosen: bool) -> str:
    return f"> {name}" if chosen else name


def _shown(estimate: Estimate) -> str:
    """0.945 (0.884–0.989), or 0.945 ± 0.012 (0.884–0.989) of several seeds."""
    text, deviation = f"{estimate.balanced_accuracy:.3f}", estimate.balanced_accuracy_deviation
    if deviation is not None:
        text += f" ± {deviation:.3f}"
    low, high = estimate.interval_95["balanced_accuracy"]
    return text if low is None else f"{text} ({low:.3f}–{high:.3f})"


def _difference(estimate: Estimate) -> str:
    """−0.010 (−0.020 to 0.000)."""
    return str(estimate.score()).replace("-", "−")
