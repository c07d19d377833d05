"""Figures of a split, with confidence intervals, from probabilities."""

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from sklearn.metrics import confusion_matrix

from jaxcells.evaluation.predictions import Predictions
from jaxcells.text import shortened, some, text_table

# A softmax in float32 underflows to 0 below this: one crop then costs at most 87.3 nats of loss.
_SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)
# With fewer units than this in a class, no interval over units keeps its promise.
_FEW_UNITS = 5
_LEVEL = 0.95
_ENDS = (1 - _LEVEL) / 2, (1 + _LEVEL) / 2
# Below any difference of two accuracies, above what rounding leaves of a sum that is zero.
DECIMALS = 12
_WIDTH = 80  # of the summary
_KEYS = ("accuracy", "balanced_accuracy")
_TOP = 5
_CURVES = ("roc_auc", "average_precision")
_SUMMARY = ("accuracy", "balanced_accuracy", "macro_f1", "matthews", "roc_auc")
# Replicates are drawn and used in chunks of so many numbers: 16 MB each.
_CHUNK = 2_000_000

# (low, high), or (None, None) where a class has a single unit: nothing then tells how much units
# of it differ.
Interval = tuple[float | None, ...]
_NONE: Interval = (None, None)

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
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

    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[Any]
    class_names: Sequence[str]
    num_bootstrap: int = 2000
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Score:
    """A figure.

    Attributes:
      value: None where it is 0/0.
      interval_95: with other fields (groups), see `classification_metrics`.
    """

    value: float | None
    interval_95: Interval


@dataclasses.dataclass(frozen=True)
class ClassMetrics:
    """Figures of one class against the others; None is 0/0.

    Attributes:
      precision: None of a class never predicted.
      recall: None of a class not in the split.
      f1: None of a class that is both.
      support: number of crops.
      specificity: share of the other classes' crops that are not called this class; None where
        there are no others.
      roc_auc: area under the ROC curve; None of a class not in the split, or alone in it.
      average_precision: area under the steps of the precision-recall curve; None of a class not in
        the split.
      interval_95: of all but support, by name.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    specificity: float | None
    roc_auc: float | None
    average_precision: float | None
    interval_95: Mapping[str, Interval]


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
      scores: figures by name, those above too, see `classification_metrics`.
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
    scores: Mapping[str, Score]


def classification_metrics(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    class_names: Sequence[str],
    groups: Sequence[str] | npt.NDArray[Any] | None = None,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> SplitMetrics:
    """Figures of one split and of its classes, with 95 % intervals.

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
    6, 86 % with 3, 65 % with 2. At an accuracy of 0.95: 90 % with 30 units, 87 % with 12. Intervals
    of the area under ROC, at 0.92: 93 % with 30 units a class, 90 % with 12, 88 % with 6, and 85 %
    with 3 where there was one.

    `scores` has, with scikit-learn's values: accuracy and balanced_accuracy as above; precision,
    recall and F1 as means over classes ("macro_") and weighted by support ("weighted_"); Cohen's
    kappa; the multiclass Matthews correlation, 0 where a single class is present or predicted;
    log_loss, to which no crop adds more than 36.0 nats; the Brier score, halved for two classes;
    the areas under ROC and precision-recall curves, each class against the others, as means over
    classes; and top_5_accuracy of more than five classes. Where scikit-learn warns that a figure
    is undefined (0/0, also in one class of a mean), it is None. Replicates in which a figure is 0/0
    are left out of its interval. Where a figure is the same in all replicates the bootstrap says
    nothing: a precision, recall or specificity of 1 or 0 then has an exact binomial bound with the
    units that it rests on for trials, and other figures have no interval.

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
    predicted = probabilities.argmax(axis=1)
    hits, crops = count_by_unit(predicted == labels, split)
    accuracy, balanced_accuracy = accuracies(hits, crops)
    intervals, note = accuracy_intervals(hits, crops, split)
    likelihood = probabilities[np.arange(len(labels)), labels]
    confusion = confusion_matrix(labels, predicted, labels=range(len(class_names)))
    scores, of_classes = _scores(probabilities, predicted, split)
    scores["accuracy"] = Score(accuracy, intervals["accuracy"])
    scores["balanced_accuracy"] = Score(balanced_accuracy, intervals["balanced_accuracy"])
    # The same figures by other names, but where a class is absent.
    scores["weighted_recall"] = scores["accuracy"]
    if (confusion.sum(axis=1) > 0).all():
        scores["macro_recall"] = scores["balanced_accuracy"]
    per_class = {}
    for name, support, row in zip(class_names, confusion.sum(axis=1), of_classes, strict=True):
        values = {key: score.value for key, score in row.items()}
        ends = {key: score.interval_95 for key, score in row.items()}
        per_class[name] = ClassMetrics(support=int(support), interval_95=ends, **values)
    return SplitMetrics(
        accuracy=accuracy,
        balanced_accuracy=balanced_accuracy,
        loss=float(-np.log(np.maximum(likelihood, _SMALLEST_PROBABILITY)).mean()),
        per_class=per_class,
        confusion_matrix=tuple(map(tuple, confusion.tolist())),
        interval_95=intervals,
        interval_note=note,
        absent_classes=tuple(name for name, row in per_class.items() if not row.support),
        num_crops=len(labels),
        num_fields=len(crops),
        scores=scores,
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


def field_metrics(predictions: Predictions, *, seed: int) -> SplitMetrics:
    """`classification_metrics` of whole fields (images), by the mean of their crops' probabilities.

    Groups stay what is independent; `num_crops` is then the number of fields.

    Args:
      predictions: of crops; all of a field are of its class.
      seed: of the replicates.
    """
    _, first, field = np.unique(predictions.sources, return_index=True, return_inverse=True)
    sums = np.zeros((len(first), len(predictions.class_names)))
    np.add.at(sums, field, predictions.probabilities)
    return classification_metrics(
        sums / np.bincount(field)[:, None],
        predictions.labels[first],
        class_names=predictions.class_names,
        groups=predictions.groups[first],
        seed=seed,
    )


def confusion_figures(confusion: Array) -> dict[str, Array]:
    """Figures that depend on a confusion matrix alone; NaN is 0/0.

    Args:
      confusion: [..., K, K], weights of crops; rows are true classes, columns predictions.

    Returns:
      precision, recall, f1 and specificity of every class [..., K], the others [...]. Kappa is
      Cohen's (1960), Matthews' the correlation R_K of Gorodkin (2004), 0 where a single class is
      present or predicted.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    true, called = confusion.sum(axis=-1), confusion.sum(axis=-2)
    total = true.sum(axis=-1)
    others = total[..., None] - true
    with np.errstate(invalid="ignore"):
        figures: dict[str, Array] = {
            "precision": hits / called,
            "recall": hits / true,
            "f1": 2 * hits / (true + called),
        }
        for key, values in list(figures.items()):
            weighted = np.where(true > 0, values * true, 0).sum(axis=-1) / total
            figures |= {f"macro_{key}": values.mean(axis=-1), f"weighted_{key}": weighted}
        figures["specificity"] = (others - called + hits) / others
        # Sums of what is off the diagonal, which are exactly 0 where there is nothing.
        apart = 1 - np.eye(confusion.shape[-1])
        wrong = (confusion * apart).sum(axis=(-2, -1))
        by_chance = (true[..., :, None] * called[..., None, :] * apart).sum(axis=(-2, -1)) / total
        figures["cohen_kappa"] = 1 - wrong / by_chance
        spread = (total**2 - (true**2).sum(axis=-1)) * (total**2 - (called**2).sum(axis=-1))
        covariance = hits.sum(axis=-1) * total - (true * called).sum(axis=-1)
        figures["matthews"] = np.where(spread > 0, covariance / np.sqrt(spread), 0)
    return figures


def areas(scores: Array, positive: npt.NDArray[np.bool_], weights: Array) -> tuple[Array, Array]:
    """Areas under the ROC and the precision-recall curve in every replicate; NaN is undefined.

    Crops of one score enter the curves together. The ROC curve is joined by lines, the other one
    goes in steps, as in scikit-learn.

    Args:
      scores: float [N], higher for crops that rather belong to the class.
      positive: bool [N], which do.
      weights: float [N, R], how much each crop counts in each replicate.

    Returns:
      [R] and [R]; ROC needs crops of both kinds, the other one positive crops.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    weights, positive = weights[order], positive[order, None]
    found = np.cumsum(np.where(positive, weights, 0), axis=0)[ends]
    false = np.cumsum(np.where(positive, 0, weights), axis=0)[ends]
    start = np.zeros((1, weights.shape[1]))
    gained, wrong = np.diff(found, axis=0, prepend=start), np.diff(false, axis=0, prepend=start)
    with np.errstate(invalid="ignore"):
        below = (wrong * (found - gained / 2)).sum(axis=0) / (found[-1] * false[-1])
        precision = np.where(found > 0, found / (found + false), 0)
        return below, (gained * precision).sum(axis=0) / found[-1]


def _figures(
    probabilities: Array, predicted: Ints, split: Split, weights: Array
) -> dict[str, Array]:
    """Figures of the split [R] and of its classes [R, K] by name, for weights of crops [N, R]."""
    labels, crops = split.labels, np.arange(len(predicted))
    classes = np.arange(len(split.class_names))
    cells = labels * len(classes) + predicted
    one_hot = csr_array((np.ones(len(crops)), (cells, crops)), (len(classes) ** 2, len(crops)))
    figures = confusion_figures((one_hot @ weights).T.reshape(-1, len(classes), len(classes)))
    smallest = np.finfo(np.float64).eps
    square = ((probabilities - (labels[:, None] == classes)) ** 2).sum(axis=1)
    means = {
        "log_loss": -np.log(np.clip(probabilities[crops, labels], smallest, 1 - smallest)),
        "brier": square / 2 if len(classes) == 2 else square,
    }
    if len(classes) > _TOP:
        top = np.argsort(probabilities, axis=1, kind="stable")[:, -_TOP:]
        means["top_5_accuracy"] = (top == labels[:, None]).any(axis=1).astype(np.float64)
    figures |= {key: values @ weights / weights.sum(axis=0) for key, values in means.items()}
    under = np.array([areas(probabilities[:, k], labels == k, weights) for k in classes])
    for key, values in zip(_CURVES, under.transpose(1, 2, 0), strict=True):
        figures |= {key: values, f"macro_{key}": values.mean(axis=1)}
    return figures


def _scores(
    probabilities: Array, predicted: Ints, split: Split
) -> tuple[dict[str, Score], list[dict[str, Score]]]:
    """Figures of the split, and of every class, with their intervals."""
    parts = [_figures(probabilities, predicted, split, drawn) for drawn in weights_of(split)]
    figures = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    rows = []
    for k in range(len(split.class_names)):
        true, called = split.labels == k, predicted == k
        rests_on = {"precision": called, "recall": true, "specificity": ~true}
        trials = {key: len(np.unique(split.groups[crops])) for key, crops in rests_on.items()}
        of_class = {key: values[:, k] for key, values in figures.items() if values.ndim == 2}
        rows.append({key: _score(values, trials.get(key)) for key, values in of_class.items()})
    whole = {key: _score(values) for key, values in figures.items() if values.ndim == 1}
    for key in _CURVES:
        whole[key] = whole.pop(f"macro_{key}")
    return whole, rows


def _score(values: Array, trials: int | None = None) -> Score:
    """A figure with its percentile interval; NaN is 0/0.

    Args:
      values: [1 + R], the figure and the same of every replicate; R may be 0, for no interval.
      trials: independent units behind a share, for an exact binomial bound where it is 0 or 1.
    """
    value, replicates = float(values[0]), values[1:][~np.isnan(values[1:])]
    if np.isnan(value):
        return Score(None, _NONE)
    if len(replicates) and trials and value in (0, 1):
        bound = _bound_without_error(trials)
        return Score(value, (bound, 1.0) if value else (0.0, 1 - bound))
    if not len(replicates) or np.ptp(replicates) < 10.0**-DECIMALS:
        return Score(value, _NONE)
    return Score(value, tuple((np.quantile(replicates, _ENDS).round(DECIMALS) + 0.0).tolist()))


def _bound_without_error(trials: int) -> float:
    """Lower end of the exact 95 % interval of a share, where no trial failed."""
    return float(((1 - _LEVEL) / 2) ** (1 / trials))


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
    for key in _SUMMARY:
        value, (low, high) = metrics.scores[key].value, metrics.scores[key].interval_95
        if value is not None:
            interval = "none" if low is None else f"{low:.3f} to {high:.3f}"
            lines.append(f"{key.replace('_', ' ')} {value:.3f}, 95 % interval {interval}")
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


def count_by_unit(right: npt.NDArray[np.bool_], split: Split) -> tuple[Ints, Ints]:
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
        return bootstrap_intervals(hits, crops, split)
    num_units = fewest * len(np.unique(_strata(crops)))
    lower = _bound_without_error(num_units)
    exact = (
        f"nothing is called wrongly: the lower bounds are the exact binomial ones of {num_units} "
        "independent fields (groups) without an error"
    )
    notes = [*_notes_on_few_units(units_of, split.class_names), exact]
    return dict.fromkeys(_KEYS, (lower, 1.0)), "; ".join(notes)


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
    quantiles = [np.quantile(mean, _ENDS).round(DECIMALS) + 0.0 for mean in means]
    intervals = [tuple(pair.tolist()) for pair in quantiles]
    return dict(zip(_KEYS, intervals, strict=True)), "; ".join(notes) or None


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
    weights = _draw(_strata(crops), repeats, num_bootstrap, np.random.default_rng(seed))
    return weights, values, crops


def weights_of(split: Split) -> Iterator[Array]:
    """Yields weights of crops: [N, 1] ones, then [N, R] in some replicates at a time.

    Units are drawn as for `classification_metrics`; no replicate comes where a class has one unit.
    """
    yield np.ones((len(split.labels), 1))
    unit = np.unique(split.groups, return_inverse=True)[1]
    _, crops = count_by_unit(np.zeros(len(unit), bool), split)
    if 1 in (crops > 0).sum(axis=0):
        return
    rng, strata, repeats = np.random.default_rng(split.seed), _strata(crops), np.ones(len(crops))
    step = max(1, _CHUNK // max(len(unit), len(split.class_names) ** 2))
    for start in range(0, split.num_bootstrap, step):
        number = min(step, split.num_bootstrap - start)
        yield np.ascontiguousarray(_draw(strata, repeats, number, rng).T)[unit]


def _draw(strata: Ints, repeats: npt.NDArray[Any], number: int, rng: np.random.Generator) -> Array:
    """Weights of kinds of units in some replicates [R, M], see `_replicates`."""
    weights = np.empty((number, len(strata)))
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
