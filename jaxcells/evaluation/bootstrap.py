"""Confidence intervals by the bootstrap over the independent units of a split."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxcells.text import some

# With fewer units than this in a class, no interval over units keeps its promise.
_FEW_UNITS = 5
_LEVEL = 0.95
_ENDS = (1 - _LEVEL) / 2, (1 + _LEVEL) / 2
# Below any difference of two accuracies, above what rounding leaves of a sum that is zero.
DECIMALS = 12
KEYS = ("accuracy", "balanced_accuracy")
# Replicates are drawn and used in chunks of so many numbers: 16 MB each.
_CHUNK = 2_000_000

# (low, high), or (None, None) where nothing tells how much units differ: a class has a single one,
# or an accuracy is the same in all replicates.
Interval = tuple[float | None, ...]
NO_INTERVAL: Interval = (None, None)

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Intervals = tuple[dict[str, Interval], str | None]


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

    labels: Ints
    groups: npt.NDArray[Any]
    class_names: Sequence[str]
    num_bootstrap: int = 2000
    seed: int = 0


def percentile_interval(replicates: Array) -> Interval:
    """The 95 % interval of a figure whose replicates are given, [R]."""
    return tuple((np.quantile(replicates, _ENDS).round(DECIMALS) + 0.0).tolist())


def bound_without_error(trials: int) -> float:
    """Lower end of the exact 95 % interval of a share, where no trial failed."""
    return float(((1 - _LEVEL) / 2) ** (1 / trials))


def accuracies(hits: npt.NDArray[Any], crops: npt.NDArray[Any]) -> tuple[float, float]:
    """Accuracy and balanced accuracy from hits and crops of every unit and class [U, K]."""
    hits, crops = hits.sum(axis=0), crops.sum(axis=0)
    recalls = hits[crops > 0] / crops[crops > 0]
    return float(hits.sum() / crops.sum()), float(recalls.mean())


def count_by_unit(right: Bools, split: Split) -> tuple[Ints, Ints]:
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


def accuracy_intervals(hits: npt.NDArray[Any], crops: Ints, split: Split) -> Intervals:
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
        intervals, note = bootstrap_intervals(hits, crops, split)
        still = [key for key, (low, high) in intervals.items() if low is not None and low == high]
        if still:
            alike = f"fields (groups) do not differ, and give {' and '.join(still)} no interval"
            note = f"{note}; {alike}" if note else alike
        return intervals | dict.fromkeys(still, NO_INTERVAL), note
    num_units = fewest * len(np.unique(_strata(crops)))
    lower = bound_without_error(num_units)
    exact = (
        f"nothing is called wrongly: the lower bounds are the exact binomial ones of {num_units} "
        "independent fields (groups) without an error"
    )
    notes = [*_notes_on_few_units(units_of, split.class_names), exact]
    return dict.fromkeys(KEYS, (lower, 1.0)), "; ".join(notes)


def bootstrap_intervals(values: npt.NDArray[Any], crops: Ints, split: Split) -> Intervals:
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
        return dict.fromkeys(KEYS, NO_INTERVAL), "; ".join(notes)
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
    intervals = dict(zip(KEYS, map(percentile_interval, means), strict=True))
    return intervals, "; ".join(notes) or None


def _replicates(
    values: npt.NDArray[Any], crops: Ints, num_bootstrap: int, seed: int
) -> tuple[Array, npt.NDArray[Any], Ints]:
    """How much each kind of unit counts in each replicate [R, M]; values, crops of a kind [M, K].

    A kind is a distinct row of values and crops: drawing kinds by their frequency is drawing units,
    and M stays small when every crop is a unit. In each stratum n - 1 of n units are drawn;
    n / (n - 1) gives the stratum its size back.
    """
    rows, repeats = np.unique(np.hstack([values, crops]), axis=0, return_counts=True)
    values, crops = np.hsplit(rows, 2)
    return _draw(crops, repeats, num_bootstrap, np.random.default_rng(seed)), values, crops


def weights_of(split: Split) -> Iterator[Array]:
    """Yields weights of crops: [N, 1] ones, then [N, R] in some replicates at a time.

    Units are drawn as for `classification_metrics`; no replicate comes where a class has one unit.
    """
    yield np.ones((len(split.labels), 1))
    unit = np.unique(split.groups, return_inverse=True)[1]
    _, crops = count_by_unit(np.zeros(len(unit), bool), split)
    if 1 in (crops > 0).sum(axis=0):
        return
    rng, repeats = np.random.default_rng(split.seed), np.ones(len(crops))
    step = max(1, _CHUNK // max(len(unit), len(split.class_names) ** 2))
    for start in range(0, split.num_bootstrap, step):
        number = min(step, split.num_bootstrap - start)
        yield np.ascontiguousarray(_draw(crops, repeats, number, rng).T)[unit]


def _draw(crops: Ints, repeats: npt.NDArray[Any], number: int, rng: np.random.Generator) -> Array:
    """Weights of kinds of units in some replicates [R, M], see `_replicates`."""
    weights, strata = np.empty((number, len(crops))), _strata(crops)
    for stratum in np.unique(strata):
        members = strata == stratum
        n = int(repeats[members].sum())
        draws = rng.multinomial(n - 1, repeats[members] / n, size=number)
        weights[:, members] = draws * (n / (n - 1))
    return weights


def _strata(crops: Ints) -> Ints:
    """The stratum [U] of every unit: its class, or 0 for all if any unit has several classes."""
    if ((crops > 0).sum(axis=1) > 1).any():
        return np.zeros(len(crops), np.int64)
    return crops.argmax(axis=1)


def _notes_on_few_units(units_of: Ints, class_names: Sequence[str]) -> list[str]:
    """A note if there are classes that have units, but fewer than `_FEW_UNITS`."""
    counts = zip(units_of.tolist(), class_names, strict=True)
    few = sorted((n, name) for n, name in counts if 0 < n < _FEW_UNITS)
    if not few:
        return []
    shown = some([f"{n} of {name!r}" for n, name in few])
    trust = "no interval can be given" if few[0][0] == 1 else "the intervals cannot be trusted"
    return [f"too few independent fields (groups) in this split ({shown}): {trust}"]
