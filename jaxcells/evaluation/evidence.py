"""What a sceptic asks beyond the figures of a split: would less do, and what does it rest on?"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import silhouette_score

from jaxcells.evaluation.baseline import BASELINES
from jaxcells.evaluation.calibration import Reliability, reliability
from jaxcells.evaluation.comparison import Estimate, estimate, paired_difference
from jaxcells.evaluation.metrics import Interval, Score, Split, SplitMetrics, field_metrics
from jaxcells.evaluation.predictions import Predictions

# Foreground fractions up to which a crop counts as "empty" and as showing "little"; see
# `foreground`. A cell that only touches the border of a crop covers more than the first.
EMPTY = 0.02
LITTLE = 0.25
_MOST_SUSPECTS = 20
_MOST_CLUSTERED = 2000


@dataclasses.dataclass(frozen=True)
class Subset:
    """How the network does on some of the crops.

    Attributes:
      name: what they have in common, such as "DAPI" or "empty".
      num_crops: number of crops.
      num_fields: number of their independent fields (groups); of images where all crops are of one
        group.
      accuracy: share of crops classified rightly.
      balanced_accuracy: mean recall of the classes that are there.
      chance: the balanced accuracy of guessing: 1 / number of classes that are there.
      interval_note: None, or why the intervals deserve less trust than usual.
    """

    name: str
    num_crops: int
    num_fields: int
    accuracy: Score
    balanced_accuracy: Score
    chance: float
    interval_note: str | None


@dataclasses.dataclass(frozen=True)
class Baseline:
    """How a classifier does that sees far less than the network, on the same crops.

    Attributes:
      description: what it sees, see `baseline_predictions`.
      accuracy: share of crops classified rightly.
      balanced_accuracy: mean recall of the classes.
      interval_95: of both.
      difference: the network's less these, with paired intervals.
      beaten: whether the interval of the difference of balanced accuracy lies above 0. False where
        a class has a single field: no interval can be given, and nothing is shown.
    """

    description: str
    accuracy: float
    balanced_accuracy: float
    interval_95: Mapping[str, Interval]
    difference: Estimate
    beaten: bool


@dataclasses.dataclass(frozen=True)
class Clusters:
    """How crops lie together in the features of the last layer (silhouettes, Rousseeuw 1987).

    From -1 to 1: near 1 every crop is far nearer to its own cluster than to any other, near 0
    clusters overlap.

    Attributes:
      by_class: mean over crops, clusters being classes.
      by_field: mean over crops, clusters being the fields of the crop's class.
      num_crops: number of crops that were looked at.
    """

    by_class: float
    by_field: float
    num_crops: int


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A field whose own label is unlikely: mislabelled, or unlike the others of its class.

    Attributes:
      field: path of the image.
      label: its class.
      prediction: the class of highest probability.
      probability_of_label: mean calibrated probability of its class over its crops.
      num_crops: number of crops.
    """

    field: str
    label: str
    prediction: str
    probability_of_label: float
    num_crops: int


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What stands beside the figures of tested crops.

    Attributes:
      fields: figures of whole fields, each decided by the mean over its crops.
      reliability: how far probabilities can be taken at their word.
      subsets: by "foreground" (see `EMPTY` and `LITTLE`), and by "channel" of the device, "group"
        and "batch" where there are several; groups only where one holds several images.
      baselines: by name, see `baseline_predictions`.
      clusters: None where networks of several folds tested, or there is nothing to compare.
      suspects: fields whose label is unlikely, worst first, at most 20.
      unknown_share: share of crops that the network calls unknown, though their class is known.
      units: number of independent fields (groups) of every class.
    """

    fields: SplitMetrics
    reliability: Reliability
    subsets: Mapping[str, tuple[Subset, ...]]
    baselines: Mapping[str, Baseline]
    clusters: Clusters | None
    suspects: tuple[Suspect, ...]
    unknown_share: float
    units: Mapping[str, int]

    @property
    def unbeaten(self) -> str | None:
        """A sentence on the baselines that the network is not shown to beat, if there are any."""
        parts = []
        for baseline in self.baselines.values():
            if not baseline.beaten:
                low, high = baseline.difference.interval_95["balanced_accuracy"]
                interval = "no interval" if low is None else f"{low:+.3f} to {high:+.3f}"
                parts.append(
                    f"{baseline.description} (balanced accuracy {baseline.balanced_accuracy:.3f}; "
                    f"network {baseline.difference.balanced_accuracy:+.3f}, {interval})"
                )
        return f"the network is not shown to beat {'; nor '.join(parts)}" if parts else None


def gather_evidence(
    tested: Predictions, *, seed: int, batches: Sequence[str] | None = None
) -> Evidence:
    """Gathers what the predictions of tested crops say beyond their figures.

    Args:
      tested: by one network, or by those of several folds (then without features).
      seed: of the bootstrap, and of the crops that are looked at for clusters.
      batches: [N], the batch (plate, day) of every crop, where it is known.
    """
    split = Split(tested.labels, tested.groups, tested.class_names, seed=seed)
    pairs = {(r.group, r.label) for r in tested.records}
    return Evidence(
        fields=field_metrics(tested, seed=seed),
        reliability=reliability(tested, seed=seed),
        subsets=_subsets(tested, split, batches),
        baselines={name: _baseline(name, tested, split) for name in tested.baselines},
        clusters=_clusters(tested, seed),
        suspects=_suspects(tested),
        unknown_share=float((tested.unknown > 0).mean()),
        units={name: sum(label == name for _, label in pairs) for name in tested.class_names},
    )


def _subsets(
    tested: Predictions, split: Split, batches: Sequence[str] | None
) -> dict[str, tuple[Subset, ...]]:
    foreground = np.array([record.foreground for record in tested.records])
    amounts = np.select([foreground <= EMPTY, foreground <= LITTLE], ["empty", "little"], "much")
    found = {"foreground": amounts}
    channels = np.array([record.channel for record in tested.records])
    if len(np.unique(channels)) > 1:
        found["channel"] = channels
    # Of one class and channel: images of one place in two channels are one field.
    places = {(r.group, r.label, r.channel) for r in tested.records}
    if 1 < len(np.unique(tested.groups)) and len(places) < len(np.unique(tested.sources)):
        found["group"] = tested.groups
    if batches is not None and len(set(batches)) > 1:
        found["batch"] = np.asarray(batches)
    return {
        key: tuple(
            _subset(name, values == name, tested, split) for name in np.unique(values).tolist()
        )
        for key, values in found.items()
    }


def _subset(name: str, rows: npt.NDArray[np.bool_], tested: Predictions, split: Split) -> Subset:
    units = tested.groups[rows]
    if len(np.unique(units)) == 1:
        units = tested.sources[rows]
    part = dataclasses.replace(split, labels=split.labels[rows], groups=units)
    found = estimate(tested.predicted[None, rows], part)
    scores = [
        Score(getattr(found, key), found.interval_95[key])
        for key in ("accuracy", "balanced_accuracy")
    ]
    counts = int(rows.sum()), len(np.unique(units))
    return Subset(name, *counts, *scores, 1 / len(np.unique(part.labels)), found.interval_note)


def _baseline(name: str, tested: Predictions, split: Split) -> Baseline:
    classes = tested.baselines[name][None]
    own, difference = (
        estimate(classes, split),
        paired_difference(tested.predicted[None], classes, split),
    )
    low, _ = difference.interval_95["balanced_accuracy"]
    beaten = low is not None and low > 0
    return Baseline(
        BASELINES[name], own.accuracy, own.balanced_accuracy, own.interval_95, difference, beaten
    )


def _clusters(tested: Predictions, seed: int) -> Clusters | None:
    if tested.features is None:
        return None
    rows = np.random.default_rng(seed).permutation(len(tested.labels))[:_MOST_CLUSTERED]
    features, labels, fields = tested.features[rows], tested.labels[rows], tested.sources[rows]
    by_class = _silhouette(features, labels)
    of_class = [labels == label for label in np.unique(labels)]
    within = [(_silhouette(features[of], fields[of]), of.sum()) for of in of_class]
    within = [(value, weight) for value, weight in within if value is not None]
    if by_class is None or not within:
        return None
    values, weights = zip(*within, strict=True)
    return Clusters(by_class, float(np.average(values, weights=weights)), len(rows))


def _silhouette(features: npt.NDArray[np.float32], clusters: npt.NDArray[Any]) -> float | None:
    """None where there is one cluster only, or every crop is one of its own."""
    if not 1 < len(np.unique(clusters)) < len(clusters):
        return None
    return float(silhouette_score(features, clusters))


def _suspects(tested: Predictions) -> tuple[Suspect, ...]:
    fields, first, index = np.unique(tested.sources, return_index=True, return_inverse=True)
    counts = np.bincount(index)
    means = np.zeros((len(fields), len(tested.class_names)))
    np.add.at(means, index, tested.calibrated)
    means /= counts[:, None]
    labels, predicted = tested.labels[first], means.argmax(axis=1)
    own = means[np.arange(len(fields)), labels]
    rows = [row for row in np.argsort(own, kind="stable") if predicted[row] != labels[row]]
    return tuple(
        Suspect(
            field=str(fields[row]),
            label=tested.class_names[labels[row]],
            prediction=tested.class_names[predicted[row]],
            probability_of_label=float(own[row]),
            num_crops=int(counts[row]),
        )
        for row in rows[:_MOST_SUSPECTS]
    )
