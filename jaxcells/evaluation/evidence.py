"""What a sceptic asks beyond the figures of a split: would less do, and what does it rest on?"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.metrics import silhouette_samples

from jaxcells.evaluation.baseline import BASELINES
from jaxcells.evaluation.bootstrap import Bools, Split
from jaxcells.evaluation.calibration import Reliability, reliability
from jaxcells.evaluation.comparison import Estimate, estimate, paired_difference
from jaxcells.evaluation.metrics import Score, SplitMetrics, field_metrics
from jaxcells.evaluation.predictions import Predictions

# Foreground fractions (see `foreground`) up to which a crop counts as "empty", at most a sliver
# of a cell at its edge, and as showing "little".
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline(Estimate):
    """How accurate a classifier is that sees far less than the network, on the same crops.

    Attributes:
      description: what it sees, see `baseline_predictions`.
      difference: how much more accurate the network is, with paired intervals.
      beaten: whether the interval of the difference of balanced accuracy lies above 0. False where
        a class has a single field: no interval can be given, and nothing is shown.
    """

    description: str
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
        unbeaten = [baseline for baseline in self.baselines.values() if not baseline.beaten]
        reached = [f"{b.description} ({b.balanced_accuracy:.3f})" for b in unbeaten]
        text = f"the network is not shown to beat the balanced accuracy of {' or '.join(reached)}"
        return text if reached else None


def gather_evidence(
    tested: Predictions, *, seed: int, batches: Sequence[str] | None = None
) -> Evidence:
    """Gathers what the predictions of tested crops say beyond their figures.

    Args:
      tested: by one network, or by those of several folds (then without features).
      seed: of the bootstrap, and of the crops that are looked at for clusters.
      batches: [N], the batch (plate, day) of every crop, where it is known.
    """
    split = tested.split(seed)
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
    records, groups = tested.records, split.groups
    foreground = np.array([record.foreground for record in records])
    amounts = np.select([foreground <= EMPTY, foreground <= LITTLE], ["empty", "little"], "much")
    # Images of one place in several channels are one field.
    places = {(record.group, record.channel) for record in records}
    values = {
        "channel": np.array([record.channel for record in records]),
        "group": groups if len(places) < len(set(tested.sources)) else groups[:0],
        "batch": np.array(batches or []),
    }
    values = {key: names for key, names in values.items() if len(set(names)) > 1}
    return {
        key: tuple(_subset(name, names == name, tested, split) for name in np.unique(names))
        for key, names in {"foreground": amounts, **values}.items()
    }


def _subset(name: np.str_, rows: Bools, tested: Predictions, split: Split) -> Subset:
    groups = split.groups[rows]
    units = groups if len(set(groups)) > 1 else tested.sources[rows]
    part = dataclasses.replace(split, labels=split.labels[rows], groups=units)
    found = estimate(tested.predicted[None, rows], part)
    scores = found.score("accuracy"), found.score()
    counts, chance = (int(rows.sum()), len(set(units))), 1 / len(set(part.labels))
    return Subset(str(name), *counts, *scores, chance, found.interval_note)


def _baseline(name: str, tested: Predictions, split: Split) -> Baseline:
    classes = tested.baselines[name][None]
    difference = paired_difference(tested.predicted[None], classes, split)
    low, _ = difference.interval_95["balanced_accuracy"]
    beaten, own = low is not None and low > 0, vars(estimate(classes, split))
    return Baseline(**own, description=BASELINES[name], difference=difference, beaten=beaten)


def _clusters(tested: Predictions, seed: int) -> Clusters | None:
    if tested.features is None:
        return None
    rows = np.random.default_rng(seed).permutation(len(tested.labels))[:_MOST_CLUSTERED]
    features, labels, fields = tested.features[rows], tested.labels[rows], tested.sources[rows]
    classes = [labels == label for label in np.unique(labels)]
    within = [
        silhouette_samples(features[of], fields[of])
        for of in classes
        if 1 < len(set(fields[of])) < of.sum()
    ]
    if len(classes) == 1 or not within:
        return None
    by_class = float(silhouette_samples(features, labels).mean())
    return Clusters(by_class, float(np.concatenate(within).mean()), len(rows))


def _suspects(tested: Predictions) -> tuple[Suspect, ...]:
    found = []
    for crop, num_crops, mean in zip(*tested.field_means(tested.calibrated), strict=True):
        label, name = tested.labels[crop], tested.class_names[mean.argmax()]
        if mean.argmax() != label:
            names = tested.records[crop].source, tested.records[crop].label, name
            found.append(Suspect(*names, float(mean[label]), int(num_crops)))
    return tuple(sorted(found, key=lambda suspect: suspect.probability_of_label)[:_MOST_SUSPECTS])
