"""Several experiments on the same crops: means over seeds, the choice, paired differences.

Everywhere `predictions` is int [S, N]: the predicted class of each of N crops by each of the S
networks of one experiment, which differ in their seed.
"""

import dataclasses
import statistics
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from jaxcells.evaluation import bootstrap
from jaxcells.evaluation.bootstrap import Interval, Ints, Split
from jaxcells.evaluation.metrics import Score

Predicted = Mapping[str, npt.ArrayLike]  # int [S, N] by experiment

RULE = (
    "Chosen is the fastest experiment whose validation balanced accuracy (mean over seeds) is "
    "within the best one's interval: the 95 % paired bootstrap interval over independent fields of "
    "the difference, best less candidate, reaches down to 0."
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Accuracies of an experiment, or how much higher they are than those of another one.

    Attributes:
      accuracy: mean over seeds.
      balanced_accuracy: mean over seeds.
      interval_95: of both means: how they would vary with other fields, not with other seeds.
      interval_note: None, or why the intervals deserve less trust than usual.
      accuracy_deviation: standard deviation over seeds; None of one seed and of differences.
      balanced_accuracy_deviation: the same.
    """

    accuracy: float
    balanced_accuracy: float
    interval_95: Mapping[str, Interval]
    interval_note: str | None
    accuracy_deviation: float | None = None
    balanced_accuracy_deviation: float | None = None

    def score(self, key: str = "balanced_accuracy") -> Score:
        """One of the two with its interval."""
        return Score(getattr(self, key), self.interval_95[key])


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One experiment before the choice; all figures are of the validation split.

    Attributes:
      name: the experiment's.
      estimate: its accuracies.
      behind: how much higher those of the best experiment are.
      qualifies: whether the interval of that, of balanced accuracy, reaches down to 0.
      seconds: to train, what "fastest" means.
    """

    name: str
    estimate: Estimate
    behind: Estimate
    qualifies: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the rule chose, and from what.

    Attributes:
      chosen: name of the chosen experiment.
      best: name of the experiment of the highest validation balanced accuracy.
      candidates: every experiment, in the order given.
      tested_before_choice: what had been evaluated on the test split before, against the rule.
      rule: the rule, as a sentence.
    """

    chosen: str
    best: str
    candidates: tuple[Candidate, ...]
    tested_before_choice: tuple[str, ...] = ()
    rule: str = RULE


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The chosen experiment beside another one, usually on the test split.

    Attributes:
      difference: accuracies of the chosen less those of the other.
      only_chosen_right: crops that the first network of the chosen alone has right.
      only_other_right: crops that the first network of the other alone has right.
      p_value: of McNemar's test of these two networks, not corrected for the number of tests.
    """

    difference: Estimate
    only_chosen_right: int
    only_other_right: int
    p_value: float


def choose(predictions: Predicted, split: Split, seconds: Mapping[str, float]) -> Choice:
    """Chooses an experiment by `RULE`, from validation crops and training times alone.

    The best is the highest of several estimates and flattered by that; with it, the rule errs
    towards accuracy, away from speed. Of two experiments that are equally good the rule refuses
    the faster in at most 3 % of cases (simulated as for `paired_difference`, with 2 to 30 units a
    class). The interval says how much the difference would vary with other fields, not with other
    seeds: for that there is the deviation.

    Where the rule leaves something open: of experiments that tie for the best the faster is the
    reference; an experiment that ties with the best always qualifies, also where a class has a
    single field and there is no interval (then nothing else does); of equally fast ones the more
    accurate is chosen, then the first given.

    Args:
      predictions: {experiment: int [S, N]} on the validation split; S may differ.
      split: the validation split.
      seconds: {experiment: seconds of training}, with the same names.
    """
    estimates = {name: estimate(predicted, split) for name, predicted in predictions.items()}
    score = {name: round(e.balanced_accuracy, bootstrap.DECIMALS) for name, e in estimates.items()}
    best = min(score, key=lambda name: (-score[name], seconds[name]))
    candidates = []
    for name, predicted in predictions.items():
        behind = paired_difference(predictions[best], predicted, split)
        low, _ = behind.interval_95["balanced_accuracy"]
        qualifies = score[name] == score[best] or (low is not None and low <= 0)
        candidates.append(Candidate(name, estimates[name], behind, qualifies, seconds[name]))
    qualified = [candidate for candidate in candidates if candidate.qualifies]
    chosen = min(qualified, key=lambda candidate: (candidate.seconds, -score[candidate.name]))
    return Choice(chosen.name, best, tuple(candidates))


def estimate(predictions: npt.ArrayLike, split: Split) -> Estimate:
    """Accuracies of an experiment on one split; of one seed those of `classification_metrics`."""
    hits, crops = _hits(predictions, split)
    mean = hits.sum(axis=0) / len(hits)
    accuracy, balanced_accuracy = bootstrap.accuracies(mean, crops)
    intervals, note = bootstrap.accuracy_intervals(mean, crops, split)
    of_seeds = zip(*(bootstrap.accuracies(network, crops) for network in hits), strict=True)
    deviation = [statistics.stdev(values) if len(values) > 1 else None for values in of_seeds]
    return Estimate(accuracy, balanced_accuracy, intervals, note, *deviation)


def paired_difference(a: npt.ArrayLike, b: npt.ArrayLike, split: Split) -> Estimate:
    """How much more accurate experiment A is than B on the same crops, with paired intervals.

    The bootstrap of `classification_metrics`, with the same resampled fields for both: what makes
    a field hard for both cancels, and the interval is narrower than two separate ones suggest.
    Experiments that are right on the same crops get the interval [0, 0].

    How often such intervals hold the truth, simulated with two classes, five crops a unit, a
    correlation of 0.3 within units, accuracies of 0.80 and 0.75 and half of the crops decided
    alike: 94 % with 30 units a class, 93 % with 12, 91 % with 6, 87 % with 3, 62 % with 2.

    Args:
      a: int [S, N].
      b: int [T, N]; the number of seeds may differ.
      split: its crops.

    Returns:
      A less B, exactly 0 for a tie.
    """
    hits_a, crops = _hits(a, split)
    hits_b, _ = _hits(b, split)
    # Whole numbers: a tie is a zero, not a rounding error.
    gain = len(hits_b) * hits_a.sum(axis=0) - len(hits_a) * hits_b.sum(axis=0)
    gain = gain / (len(hits_a) * len(hits_b))
    intervals, note = bootstrap.bootstrap_intervals(gain, crops, split)
    means = bootstrap.accuracies(gain, crops)
    accuracy, balanced_accuracy = (round(mean, bootstrap.DECIMALS) + 0.0 for mean in means)
    return Estimate(accuracy, balanced_accuracy, intervals, note)


def mcnemar(only_a: int, only_b: int) -> float:
    """The p-value of McNemar's exact test of whether two networks err equally often (McNemar 1947).

    Of the crops that one network alone has right, half should be A's if the two are equally
    accurate: a two-sided binomial test. It never rejects more often than it says and is
    conservative with few such crops (Fagerland, Lydersen and Laake 2013). It takes crops for
    independent, which crops of one field are not, and its p-value is then too small; this is why
    the paired bootstrap over fields stands beside it.

    Args:
      only_a: number of crops that network A alone has right.
      only_b: number of crops that network B alone has right.
    """
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def compare_with(chosen: str, predictions: Predicted, split: Split) -> dict[str, Comparison]:
    """Compares one experiment with each of the others on the same crops, usually the test split."""
    comparisons = {}
    for name in [name for name in predictions if name != chosen]:
        a, b = (np.asarray(predictions[n])[0] == split.labels for n in (chosen, name))
        counts = int((a & ~b).sum()), int((b & ~a).sum())
        difference = paired_difference(predictions[chosen], predictions[name], split)
        comparisons[name] = Comparison(difference, *counts, mcnemar(*counts))
    return comparisons


def _hits(predictions: npt.ArrayLike, split: Split) -> tuple[Ints, Ints]:
    """Crops of every unit and true class that each network has right [S, U, K], and all [U, K]."""
    right = np.asarray(predictions) == split.labels
    counts = [bootstrap.count_by_unit(network, split) for network in right]
    return np.stack([hits for hits, _ in counts]), counts[0][1]
