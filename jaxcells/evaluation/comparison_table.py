"""The table of a comparison: CSV for programs, Markdown for papers, text for the terminal."""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from jaxcells.evaluation.bootstrap import Split
from jaxcells.evaluation.comparison import Choice, Comparison, Estimate, paired_difference
from jaxcells.files import write_csv, write_whole
from jaxcells.text import amount, digits, duration, markdown, markdown_table, text_table

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # arguments of `text_table`

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


def write_table(
    folder: Path, rows: Sequence[Row], failures: Mapping[str, str], parts: Sequence[str | Table]
) -> None:
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
        for split in _SPLITS:
            estimate = getattr(row, split)
            for key in ("balanced_accuracy", "accuracy"):
                low, high = estimate.interval_95[key]
                line[f"{split}_{key}"] = getattr(estimate, key)
                line[f"{split}_{key}_deviation"] = getattr(estimate, f"{key}_deviation")
                line |= {f"{split}_{key}_low": low, f"{split}_{key}_high": high}
        lines.append(line | {key: getattr(row, key) for key in _COSTS})
    header = [*lines[0], "failure"]
    lines += [{"experiment": label, "failure": text} for label, text in failures.items()]
    write_csv(folder / "table.csv", header, [[line.get(key) for key in header] for line in lines])
    with write_whole(folder / "table.md") as file:
        file.write(as_markdown(parts) + "\n")


def paragraphs(
    rows: Sequence[Row],
    failures: Mapping[str, str],
    choice: Choice,
    comparisons: Mapping[str, Comparison],
    notes: Sequence[str | Table],
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
    header = [f"{kind}accuracy,\n{split}" for kind in ("balanced ", "") for split in _SPLITS]
    return [
        "Accuracy: mean ± standard deviation over seeds where there are several; 95 % interval "
        "over independent fields (groups), not over seeds.",
        (["experiment", *header], accuracies),
        *_interval_notes(rows),
        "Cost: training time of one seed (its epochs by their median, compilation apart); "
        "multiply-adds of one crop, forward; memory that a training step needs.",
        (["experiment", "seeds", *(head for head, _ in _COSTS.values())], costs),
        *notes,
        *(f"{label} failed: {text}" for label, text in failures.items()),
        *_describe_choice(choice),
        *(_describe_comparisons(choice.chosen, comparisons) if comparisons else []),
    ]


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
    verdict = "that more images would help is not shown, nor that they would not"
    if low is not None and low > 0:
        verdict = "the last images helped, and more of the kind may help further"
    elif high is not None and high < 0:
        verdict = "the last images did harm; look at them, and at the curves of the training"
    cells = [[row.name, str(row.training_images), _shown(row.validation)] for row in rows]
    return [
        f"Learning curve of {name}, every point trained for as many steps:",
        (("experiment", "training\nimages", "balanced accuracy,\nvalidation"), cells),
        f"{most.training_images} training images instead of {fewer.training_images} change "
        f"the validation balanced accuracy by {_difference(gain)}: {verdict}.",
    ]


def as_markdown(parts: Sequence[str | Table]) -> str:
    """`paragraphs` for a paper."""
    return "\n\n".join(markdown(p) if isinstance(p, str) else markdown_table(*p) for p in parts)


def as_text(parts: Sequence[str | Table]) -> str:
    """`paragraphs` as plain text at most 100 columns wide."""
    fill = textwrap.TextWrapper(_WIDTH, break_on_hyphens=False).fill
    return "\n\n".join(
        fill(part) if isinstance(part, str) else text_table(*part, width=_WIDTH) for part in parts
    )


def _interval_notes(rows: Sequence[Row]) -> list[str]:
    """Every note once, with the experiments that it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for split in _SPLITS:
            if note := getattr(row, split).interval_note:
                about.setdefault(f"{split}: {note}", []).append(row.name)
    return [f"Note on {note} ({', '.join(names)})." for note, names in about.items()]


def _describe_choice(choice: Choice) -> list[str | Table]:
    by_name = {candidate.name: candidate for candidate in choice.candidates}
    best, chosen = by_name[choice.best], by_name[choice.chosen]
    cells = []
    for c in choice.candidates:
        behind = "best" if c is best else _difference(c.behind)
        qualifies = "yes" if c.qualifies else "no"
        cells.append([_marked(c.name, c is chosen), behind, qualifies, duration(c.seconds)])
    outcome = f"Chosen (>): {chosen.name}, trained in {duration(chosen.seconds)}."
    if best is not chosen:
        outcome += (
            f" Best on validation: {best.name}, {best.estimate.balanced_accuracy:.3f} against "
            f"{chosen.estimate.balanced_accuracy:.3f}, trained in {duration(best.seconds)}."
        )
    header = ("experiment", "best less this,\nvalidation", "qualifies", "training\ntime")
    found: list[str | Table] = [f"Rule: {choice.rule}", (header, cells), outcome]
    if choice.tested_before_choice:
        tested = ", ".join(choice.tested_before_choice)
        found.append(f"Note: the test split had been opened for {tested} before this choice.")
    return found


def _describe_comparisons(chosen: str, comparisons: Mapping[str, Comparison]) -> list[str | Table]:
    cells = []
    for name, c in comparisons.items():
        p_value = "<0.001" if c.p_value < 0.001 else f"{c.p_value:.3f}"
        counts = [str(c.only_chosen_right), str(c.only_other_right)]
        cells.append([name, _difference(c.difference), *counts, p_value])
    caption = (
        f"Test split, compared after the choice: balanced accuracy of {chosen} less that of each "
        "other, with the paired 95 % interval over fields; McNemar's exact test of the first "
        "seeds, which takes the crops of a field for independent and is not corrected for the "
        "number of tests."
    )
    heads = ("chosen less this,\ntest", "only chosen\nright", "only this\nright")
    return [caption, (("experiment", *heads, "McNemar p,\nfirst seeds"), cells)]


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
