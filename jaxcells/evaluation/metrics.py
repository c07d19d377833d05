"""Figures of a split, with confidence intervals, from probabilities."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from jaxcells.evaluation.predictions import Predictions
from jaxcells.text import shortened, some, text_table

# A softmax in float32 underflows to 0 below this: one crop then costs at most 87.3 nats of loss.
_SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)
# With fewer units than this in a class, no interval over units keeps its promise.
_FEW_UNITS = 5
_LEVEL = 0.95
# Below any difference of two accuracies, above what rounding leaves of a sum that is zero.
DECIMALS = 12
_WIDTH = 80  # of the summary
_KEYS = ("accuracy", "balanced_accuracy")

# (low, high), or (None, None) where a class has a single unit: nothing then tells how much units
# of it differ.
Interval = tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """The crops of a split, and how intervals of what is measured on them are drawn.

    Attributes:
      labels: int [N], the true classes as indices into `class_names`.
      groups: [N], the independent unit of every crop, see `classification_metrics`.
      class_names: the K names.
      num_bootstrap: number of replicates.
      seed: of the replicates.
    """

    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[Any]
    class_names: Sequence[str]
    num_bootstrap: int = 2000
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ClassMetrics:
    """Figures of one class; None is 0/0.

    Attributes:
      precision: None of a class never predicted.
      recall: None of a class not in the split.
      f1: None of a class that is both.
      support: number of crops.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    support: int


@dataclasses.dataclass(frozen=True)
class SplitMetrics:
    """Figures of one split.

    Attributes:
      accuracy: share of crops classified rightly.
      balanced_accuracy: mean recall of the classes in the split.
      loss: mean negative log likelihood in nats; no crop counts more than 87.3.
      per_class: by name of the class.
      confusion_matrix: [K][K] counts; rows are true classes, columns predictions.
      interval_95: of accuracy and balanced_accuracy, (None, None) where a class has a single unit.
      interval_note: None, or why the intervals deserve less trust than usual.
      absent_classes: names without a crop in the split.
      num_crops: number of crops.
      num_fields: number of independent units.
    """

    accuracy: float
    balanced_accuracy: float
    loss: float
    per_class: Mapping[str, ClassMetrics]
    confusion_matrix: tuple[tuple[int, ...], ...]
    interval_95: Mapping[str, Interval]
    interval_note: str | None
    absent_classes: tuple[str, ...]
    num_crops: int
    num_fields: int


def classification_metrics(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    class_names: Sequence[str],
    groups: Sequence[str] | npt.NDArray[Any] | None = None,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> SplitMetrics:
    """Accuracy, balanced accuracy, loss, figures per class and 95 % intervals of one split.

    The intervals are percentile intervals of a bootstrap over independent units (Efron and
    Tibshirani 1993, ch. 13; for clusters Field and Welsh 2007): crops of one field resemble each
    other, and resampling crops would make every interval too narrow. Units are resampled class by
    class, so that a replicate has every class; where a unit holds crops of several classes (a
    plate with many lines), units are resampled over the whole split instead. From n units n - 1
    are drawn, which makes the bootstrap variance unbiased for small n (Rao and Wu 1988).
    Where not one crop is wrong every replicate is perfect too; the interval is then the exact
    binomial one (Clopper and Pearson 1934) with units for trials, as if each class had as few
    units as the one that has fewest.

    How often such intervals hold the truth, simulated with two classes, five crops a unit, a
    correlation of 0.3 within units and an accuracy of 0.75: 94 % with 30 units a class, 91 % with
    6, 86 % with 3, 65 % with 2. At an accuracy of 0.95: 90 % with 30 units, 87 % with 12.

    Args:
      probabilities: [N, K] float, rows that sum to 1.
      labels: [N] int, the true classes as indices into `class_names`.
      class_names: the K names, in the order of the columns.
      groups: [N], the independent unit of every crop: its field, plate or patient. Fields of
        different classes need different names. None: every crop is a unit of its own.
      num_bootstrap: number of replicates.
      seed: of the replicates.

    Raises:
      ValueError: NaN or rows that are no probabilities, of another number than there are labels.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    if not len(labels) or probabilities.shape != (len(labels), len(class_names)):
        raise ValueError(f"{probabilities.shape} for {labels.shape} x {len(class_names)} classes")
    # bfloat16 logits leave sums off by a few thousandths; NaN fails every comparison.
    if not (np.abs(probabilities.sum(axis=1) - 1) < 1e-2).all() or probabilities.min() < 0:
        raise ValueError("rows that are no probabilities: NaN, negative, or a sum other than 1")
    units = np.arange(len(labels)) if groups is None else np.asarray(groups)
    split = Split(labels, units, class_names, num_bootstrap, seed)
    predicted, classes = probabilities.argmax(axis=1), range(len(class_names))
    hits, crops = count_by_unit(predicted == labels, split)
    accuracy, balanced_accuracy = accuracies(hits, crops)
    intervals, note = accuracy_intervals(hits, crops, split)
    likelihood = probabilities[np.arange(len(labels)), labels]
    rows = precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=np.nan)
    per_class = {}
    for name, *ratios, support in zip(class_names, *rows, strict=True):
        precision, recall, f1 = (None if np.isnan(x) else float(x) for x in ratios)
        per_class[name] = ClassMetrics(precision, recall, f1, int(support))
    confusion = confusion_matrix(labels, predicted, labels=classes).tolist()
    return SplitMetrics(
        accuracy=accuracy,
        balanced_accuracy=balanced_accuracy,
        loss=float(-np.log(np.maximum(likelihood, _SMALLEST_PROBABILITY)).mean()),
        per_class=per_class,
        confusion_matrix=tuple(map(tuple, confusion)),
        interval_95=intervals,
        interval_note=note,
        absent_classes=tuple(name for name, row in per_class.items() if not row.support),
        num_crops=len(labels),
        num_fields=len(crops),
    )


def split_metrics(predictions: Predictions, *, seed: int) -> SplitMetrics:
    """`classification_metrics` of crops, with intervals over their independent fields (groups)."""
    return classification_metrics(
        predictions.probabilities,
        predictions.labels,
        class_names=predictions.class_names,
        groups=predictions.groups,
        seed=seed,
    )


def summary_table(metrics: SplitMetrics, title: str) -> str:
    """The figures of `classification_metrics` as plain text, at most 80 columns wide."""
    header = ("class", "precision", "recall", "F1", "support")
    rows = []
    for name, row in metrics.per_class.items():
        ratios = ["-" if x is None else f"{x:.3f}" for x in (row.precision, row.recall, row.f1)]
        rows.append([name, *ratios, str(row.support)])
    lines = [
        shortened(title, _WIDTH),
        f"{metrics.num_crops} crops from {metrics.num_fields} independent fields (groups)",
        f"\n{text_table(header, rows, width=_WIDTH)}\n",
    ]
    for key, (low, high) in metrics.interval_95.items():
        interval = "none" if low is None else f"{low:.3f} to {high:.3f}"
        figure = f"{key.replace('_', ' ')} {getattr(metrics, key):.3f}"
        lines.append(f"{figure}, 95 % interval {interval}")
    lines.append(f"loss {metrics.loss:.3f}")
    notes = [metrics.interval_note] if metrics.interval_note else []
    if metrics.absent_classes:
        notes.append(f"not in this split: {', '.join(metrics.absent_classes)}")
    return "\n".join(lines + [textwrap.fill(f"note: {note}", _WIDTH) for note in notes])


def accuracies(hits: npt.NDArray[Any], crops: npt.NDArray[Any]) -> tuple[float, float]:
    """Accuracy and balanced accuracy from hits and crops of every unit and class [U, K]."""
    hits, crops = hits.sum(axis=0), crops.sum(axis=0)
    recalls = hits[crops > 0] / crops[crops > 0]
    return float(hits.sum() / crops.sum()), float(recalls.mean())


def count_by_unit(
    right: npt.NDArray[np.bool_], split: Split
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Crops classified rightly [U, K] and crops [U, K] of every unit, by true class.

    This is all of a unit's confusion matrix that accuracy and balanced accuracy depend on.

    Args:
      right: bool [N], whether each crop is classified rightly.
      split: its crops.
    """
    names, index = np.unique(split.groups, return_inverse=True)
    hits, crops = np.zeros((2, len(names), len(split.class_names)), np.int64)
    np.add.at(hits, (index, split.labels), right)
    np.add.at(crops, (index, split.labels), 1)
    return hits, crops


def accuracy_intervals(
    hits: npt.NDArray[Any], crops: npt.NDArray[np.int64], split: Split
) -> tuple[dict[str, Interval], str | None]:
    """`interval_95` and `interval_note` of `classification_metrics`.

    Args:
      hits: [U, K], crops of every unit that are classified rightly, by true class; the mean over
        several networks if it is not whole.
      crops: [U, K], crops of every unit.
      split: names of the classes, number and seed of the replicates.
    """
    units_of = (crops > 0).sum(axis=0)
    fewest = int(units_of[units_of > 0].min())
    if fewest == 1 or (hits != crops).any():
        return bootstrap_intervals(hits, crops, split)
    num_units = fewest * len(np.unique(_strata(crops)))
    lower = ((1 - _LEVEL) / 2) ** (1 / num_units)
    exact = (
        f"no crop is wrong: the lower bounds are the exact binomial ones of {num_units} "
        "independent fields (groups) without an error"
    )
    notes = [*_notes_on_few_units(units_of, split.class_names), exact]
    return dict.fromkeys(_KEYS, (lower, 1.0)), "; ".join(notes)


def bootstrap_intervals(
    values: npt.NDArray[Any], crops: npt.NDArray[np.int64], split: Split
) -> tuple[dict[str, Interval], str | None]:
    """Percentile intervals of a mean over crops and of its mean over classes, and a note.

    Args:
      values: [U, K], the sum over a unit's crops of each class of what is averaged: hits for an
        accuracy; hits of one network less those of another for a paired difference.
      crops: [U, K], crops of every unit.
      split: names of the classes, number and seed of the replicates.

    Returns:
      Of accuracy and balanced_accuracy (low, high), (None, None) where a class has a single unit;
      and None or why the intervals deserve less trust than usual.
    """
    units_of = (crops > 0).sum(axis=0)
    notes = _notes_on_few_units(units_of, split.class_names)
    if 1 in units_of:
        return dict.fromkeys(_KEYS, (None, None)), "; ".join(notes)
    weights, values, crops = _replicates(values, crops, split.num_bootstrap, split.seed)
    present = units_of > 0
    totals, counts = weights @ values[:, present], weights @ crops[:, present]
    whole = np.all(counts > 0, axis=1)
    if not whole.all():
        notes.append(
            f"{(~whole).sum()} of {split.num_bootstrap} bootstrap replicates lacked a class and "
            "are left out of the interval of balanced accuracy"
        )
    means = totals.sum(axis=1) / counts.sum(axis=1), (totals[whole] / counts[whole]).mean(axis=1)
    ends = (1 - _LEVEL) / 2, (1 + _LEVEL) / 2
    quantiles = [np.quantile(mean, ends).round(DECIMALS) + 0.0 for mean in means]
    intervals = [tuple(pair.tolist()) for pair in quantiles]
    return dict(zip(_KEYS, intervals, strict=True)), "; ".join(notes) or None


def _replicates(
    values: npt.NDArray[Any], crops: npt.NDArray[np.int64], num_bootstrap: int, seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any], npt.NDArray[np.int64]]:
    """How much each kind of unit counts in each replicate [R, M]; values, crops of a kind [M, K].

    A kind is a distinct row of values and crops: drawing kinds by their frequency is drawing units,
    and M stays small when every crop is a unit. In each stratum n - 1 of n units are drawn;
    n / (n - 1) gives the stratum its size back.
    """
    rows, repeats = np.unique(np.hstack([values, crops]), axis=0, return_counts=True)
    values, crops = np.hsplit(rows, 2)
    rng = np.random.default_rng(seed)
    strata = _strata(crops)
    weights = np.empty((num_bootstrap, len(repeats)))
    for stratum in np.unique(strata):
        members = strata == stratum
        n = repeats[members].sum()
        draws = rng.multinomial(n - 1, repeats[members] / n, size=num_bootstrap)
        weights[:, members] = draws * (n / (n - 1))
    return weights, values, crops


def _strata(crops: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The stratum [U] of every unit: its class, or 0 for all if any unit has several classes."""
    if ((crops > 0).sum(axis=1) > 1).any():
        return np.zeros(len(crops), np.int64)
    return crops.argmax(axis=1)


def _notes_on_few_units(units_of: npt.NDArray[np.int64], class_names: Sequence[str]) -> list[str]:
    """A note if there are classes that have units, but fewer than `_FEW_UNITS`."""
    counts = zip(units_of.tolist(), class_names, strict=True)
    few = sorted((n, name) for n, name in counts if 0 < n < _FEW_UNITS)
    if not few:
        return []
    shown = some([f"{n} of {name!r}" for n, name in few])
    trust = "no interval can be given" if few[0][0] == 1 else "the intervals cannot be trusted"
    return [f"too few independent fields (groups) in this split ({shown}): {trust}"]
