"""Several trained networks on the same crops: figures over seeds, the choice, paired differences.

NumPy only. Everywhere `predictions` is int [S, N]: the predicted class of each of N crops by each
of the S networks of one experiment, which differ in their seed.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxcells.evaluation.metrics import accuracy_intervals, bootstrap_intervals, per_unit

RULE = (
    "Chosen is the fastest experiment whose validation balanced accuracy (mean over seeds) is "
    "within the best one's interval: the 95 % paired bootstrap interval over independent fields of "
    "the difference, best less candidate, reaches down to 0."
)
# Below any difference of two accuracies, above what rounding leaves of a sum that is zero.
_DECIMALS = 12


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One experiment before the choice; all figures are of the validation split.

    Attributes:
      name: the experiment's.
      balanced_accuracy: mean over seeds.
      deviation: standard deviation over seeds; None of one seed.
      difference: balanced accuracy of the best experiment less this one's.
      interval_95: of the difference, or (None, None).
      qualifies: whether the interval reaches down to 0.
      seconds: to train, what "fastest" means.
      note: None, or why the interval deserves less trust than usual.
    """

    name: str
    balanced_accuracy: float
    deviation: float | None
    difference: float
    interval_95: tuple[float | None, float | None]
    qualifies: bool
    seconds: float
    note: str | None


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the rule chose, and from what.

    Attributes:
      chosen: name of the chosen experiment.
      best: name of the experiment of the highest validation balanced accuracy.
      candidates: every experiment, in the order given.
      note: None, or what the rule could not weigh.
      rule: the rule, as a sentence.
    """

    chosen: str
    best: str
    candidates: tuple[Candidate, ...]
    note: str | None
    rule: str = RULE

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict that JSON can hold."""
        return dataclasses.asdict(self)


def choose(
    predictions: Mapping[str, npt.ArrayLike],
    labels: npt.ArrayLike,
    groups: Sequence[str] | npt.NDArray[Any],
    seconds: Mapping[str, float],
    *,
    class_names: Sequence[str],
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> Choice:
    """Chooses an experiment by `RULE`, from validation crops and training times alone.

    The best is the highest of several estimates and flattered by that; with it, the rule errs
    towards accuracy, away from speed. Of two experiments that are equally good the rule refuses
    the faster in at most 3 % of cases (simulated as for `paired_difference`, with 2 to 30 units a
    class). The interval says how much the difference would vary with other fields, not with other
    seeds: for that there is the deviation.

    Where the rule leaves something open: of experiments that tie for the best the faster is the
    reference; an experiment that ties with the best always qualifies, also where a class has a
    single field and there is no interval (then nothing else does, and a note says so); of equally
    fast ones the more accurate is chosen, then the first given.

    Args:
      predictions: {experiment: int [S, N]} on the validation split; S may differ.
      labels: int [N], the true classes.
      groups: [N], the independent unit of every crop, as for `classification_metrics`.
      seconds: {experiment: seconds of training}, with the same names.
      class_names: the position is the label.
      num_bootstrap: number of replicates.
      seed: of the replicates.

    Raises:
      ValueError: no experiment, names that differ, times that are no times, or shapes that do not
        fit.
    """
    if not predictions or predictions.keys() != seconds.keys():
        raise ValueError(f"predictions of {list(predictions)}, seconds of {list(seconds)}")
    if not all(math.isfinite(value) and value >= 0 for value in seconds.values()):
        raise ValueError(f"seconds that are none: {dict(seconds)}")

    exact, deviations = {}, {}
    for name, predicted in predictions.items():
        hits, support = _hits(predicted, labels, groups, class_names)
        exact[name] = _means(hits.sum(axis=(0, 1)), support, len(hits))["balanced_accuracy"]
        deviations[name] = _deviations(hits, support)["balanced_accuracy"]
    best = min(predictions, key=lambda name: (-exact[name], seconds[name]))

    candidates = []
    for name in predictions:
        versus_best = paired_difference(
            predictions[best],
            predictions[name],
            labels,
            groups,
            class_names=class_names,
            num_bootstrap=num_bootstrap,
            seed=seed,
        )
        low, high = versus_best["interval_95"]["balanced_accuracy"]
        candidates.append(
            Candidate(
                name=name,
                balanced_accuracy=float(exact[name]),
                deviation=deviations[name],
                difference=versus_best["balanced_accuracy"],
                interval_95=(low, high),
                qualifies=exact[name] == exact[best] or (low is not None and low <= 0),
                seconds=float(seconds[name]),
                note=versus_best["interval_note"],
            )
        )
    qualified = [candidate for candidate in candidates if candidate.qualifies]
    chosen = min(qualified, key=lambda candidate: (candidate.seconds, -exact[candidate.name]))
    note = None
    if len(candidates) == 1:
        note = "one experiment: there was nothing to choose from"
    elif candidates[0].interval_95[0] is None:
        note = "without an interval only experiments that tie with the best qualify"
    return Choice(chosen=chosen.name, best=best, candidates=tuple(candidates), note=note)


def split_figures(
    predictions: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: Sequence[str] | npt.NDArray[Any],
    *,
    class_names: Sequence[str],
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy and balanced accuracy of an experiment on one split, over its seeds.

    Returns:
      A dict that JSON can hold, with the keys of `classification_metrics` and, for one seed, its
      values: accuracy, balanced_accuracy (means over seeds); deviation: {accuracy,
      balanced_accuracy}, the standard deviations over seeds, None of one seed; interval_95 of the
      means, which says how they would vary with other fields; interval_note.
    """
    hits, support = _hits(predictions, labels, groups, class_names)
    intervals, note = accuracy_intervals(
        hits.sum(axis=0) / len(hits), support, class_names, num_bootstrap, seed
    )
    means = _means(hits.sum(axis=(0, 1)), support, len(hits))
    return {
        **{key: float(mean) for key, mean in means.items()},
        "deviation": _deviations(hits, support),
        "interval_95": intervals,
        "interval_note": note,
    }


def paired_difference(
    predictions_a: npt.ArrayLike,
    predictions_b: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: Sequence[str] | npt.NDArray[Any],
    *,
    class_names: Sequence[str],
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """How much more accurate experiment A is than B on the same crops, with paired intervals.

    The bootstrap of `classification_metrics`, with the same resampled fields for both: what makes
    a field hard for both cancels, and the interval is narrower than two separate ones suggest.
    Experiments that are right on the same crops get the interval [0, 0].

    How often such intervals hold the truth, simulated with two classes, five crops a unit, a
    correlation of 0.3 within units, accuracies of 0.80 and 0.75 and half of the crops decided
    alike: 94 % with 30 units a class, 93 % with 12, 91 % with 6, 87 % with 3, 62 % with 2.

    Args:
      predictions_a: int [S, N].
      predictions_b: int [T, N]; the number of seeds may differ.
      labels: int [N], the true classes.
      groups: [N], the independent unit of every crop, as for `classification_metrics`.
      class_names: the position is the label.
      num_bootstrap: number of replicates.
      seed: of the replicates.

    Returns:
      A dict that JSON can hold: accuracy, balanced_accuracy (A less B, means over seeds; exactly 0
      for a tie); interval_95: {accuracy: [low, high], balanced_accuracy: [low, high]} or [None,
      None] where a class has a single unit; interval_note: None or why to trust it less.

    Raises:
      ValueError: shapes that do not fit.
    """
    hits_a, support = _hits(predictions_a, labels, groups, class_names)
    hits_b, _ = _hits(predictions_b, labels, groups, class_names)
    # Whole numbers: a tie is a zero, not a rounding error.
    gain = len(hits_b) * hits_a.sum(axis=0) - len(hits_a) * hits_b.sum(axis=0)
    pairs = len(hits_a) * len(hits_b)
    intervals, note = bootstrap_intervals(gain / pairs, support, class_names, num_bootstrap, seed)
    return {
        **{key: float(mean) for key, mean in _means(gain.sum(axis=0), support, pairs).items()},
        "interval_95": {
            key: [None if end is None else round(end, _DECIMALS) + 0.0 for end in interval]
            for key, interval in intervals.items()
        },
        "interval_note": note,
    }


def mcnemar(correct_a: npt.ArrayLike, correct_b: npt.ArrayLike) -> dict[str, Any]:
    """McNemar's exact test of whether two networks err equally often (McNemar 1947).

    Of the crops that one network alone has right, half should be A's if the two are equally
    accurate: a two-sided binomial test, computed in whole numbers. It never rejects more often
    than it says and is conservative with few such crops (Fagerland, Lydersen and Laake 2013).
    It takes crops for independent, which crops of one field are not, and its p-value is then too
    small; this is why the paired bootstrap over fields stands beside it.

    Args:
      correct_a: bool [N], the crops that network A has right.
      correct_b: bool [N], the crops that network B has right.

    Returns:
      {only_a_right, only_b_right, p_value}; the p-value is 1 where the two never differ.

    Raises:
      ValueError: shapes that differ, or values that are no bool.
    """
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.shape != b.shape or a.ndim != 1 or a.dtype != bool or b.dtype != bool:
        raise ValueError(f"correct {a.shape} {a.dtype} and {b.shape} {b.dtype}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_a + only_b
    term = tail = 1
    for k in range(min(only_a, only_b)):
        term = term * (discordant - k) // (k + 1)  # the binomial coefficient of k + 1
        tail += term
    # Python divides whole numbers of any size and rounds once.
    p_value = min(1.0, 2 * tail / 2**discordant)
    return {"only_a_right": only_a, "only_b_right": only_b, "p_value": p_value}


def compare_with(
    chosen: str,
    predictions: Mapping[str, npt.ArrayLike],
    labels: npt.ArrayLike,
    groups: Sequence[str] | npt.NDArray[Any],
    *,
    class_names: Sequence[str],
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Compares one experiment with each of the others on the same crops, usually the test split.

    Returns:
      {other: `paired_difference` of chosen less other, and "mcnemar": `mcnemar` with A the chosen,
      of the first network of each}. The p-values are not corrected for their number.
    """
    compared = {}
    for name in predictions:
        if name == chosen:
            continue
        first = [np.asarray(predictions[n])[0] == np.asarray(labels) for n in (chosen, name)]
        compared[name] = paired_difference(
            predictions[chosen],
            predictions[name],
            labels,
            groups,
            class_names=class_names,
            num_bootstrap=num_bootstrap,
            seed=seed,
        ) | {"mcnemar": mcnemar(*first)}
    return compared


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and the standard deviation (n - 1), which one value alone does not have."""
    values = [float(value) for value in values]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _hits(
    predictions: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: Sequence[str] | npt.NDArray[Any],
    class_names: Sequence[str],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Crops of every unit and true class that each network has right [S, U, K], and all [U, K]."""
    predictions, labels, units = np.asarray(predictions), np.asarray(labels), np.asarray(groups)
    if predictions.ndim != 2 or not predictions.size or labels.shape != predictions.shape[1:]:
        raise ValueError(f"predictions {predictions.shape} for labels {labels.shape}")
    if units.shape != labels.shape:
        raise ValueError(f"{units.shape} groups for {len(labels)} crops")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(f"labels {labels.min()} to {labels.max()} for {len(class_names)} classes")
    tables = [per_unit(labels, row == labels, units, len(class_names)) for row in predictions]
    return np.stack([correct for correct, _ in tables]), tables[0][1]


def _means(
    totals: npt.NDArray[np.int64], support: npt.NDArray[np.int64], networks: int
) -> dict[str, Fraction]:
    """Accuracies from hits of each class, added up over units and networks [K], and crops [U, K].

    Exact, so that a tie is a tie.
    """
    pairs = [(int(t), int(n)) for t, n in zip(totals, support.sum(axis=0), strict=True) if n]
    return {
        "accuracy": Fraction(sum(t for t, _ in pairs), networks * sum(n for _, n in pairs)),
        "balanced_accuracy": Fraction(sum(Fraction(t, n) for t, n in pairs), networks * len(pairs)),
    }


def _deviations(
    hits: npt.NDArray[np.int64], support: npt.NDArray[np.int64]
) -> dict[str, float | None]:
    """Standard deviations of the accuracies of single networks, from hits [S, U, K]."""
    single = [_means(table.sum(axis=0), support, 1) for table in hits]
    return {
        key: mean_and_deviation([float(means[key]) for means in single])[1] for key in single[0]
    }
