"""Figures of a split and of its classes, from probabilities."""

import dataclasses
import textwrap
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from sklearn.metrics import confusion_matrix

from jaxcells.evaluation import bootstrap
from jaxcells.evaluation.bootstrap import NO_INTERVAL, Array, Bools, Interval, Ints, Split
from jaxcells.evaluation.predictions import Predictions
from jaxcells.text import shortened, text_table

# A softmax in float32 underflows to 0 below this: one crop then costs at most 87.3 nats of loss.
_SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)
_WIDTH = 80  # of the summary
_TOP = 5
_CURVES = ("roc_auc", "average_precision")
_SUMMARY = ("accuracy", "balanced_accuracy", "macro_f1", "matthews", "roc_auc")


@dataclasses.dataclass(frozen=True)
class Score:
    """A figure.

    Attributes:
      value: None where it is 0/0.
      interval_95: with other fields (groups), see `classification_metrics`.
    """

    value: float | None
    interval_95: Interval

    def __str__(self) -> str:
        """For people: 0.913 (0.850 to 0.951)."""
        low, high = self.interval_95
        number = "none" if self.value is None else f"{self.value:z.3f}"
        return f"{number} (no interval)" if low is None else f"{number} ({low:z.3f} to {high:z.3f})"


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
      interval_95: of accuracy and balanced_accuracy, (None, None) where nothing tells how units
        differ.
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


def classification_metrics(probabilities: npt.ArrayLike, split: Split) -> SplitMetrics:
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
      split: labels, names and independent units of the crops.

    Raises:
      ValueError: NaN or rows that are no probabilities, of another number than there are labels.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), split.labels
    if not len(labels) or probabilities.shape != (len(labels), len(split.class_names)):
        shape = probabilities.shape
        raise ValueError(f"{shape} for {len(labels)} crops of {len(split.class_names)} classes")
    # bfloat16 logits leave sums off by a few thousandths; NaN fails every comparison.
    if not (np.abs(probabilities.sum(axis=1) - 1) < 1e-2).all() or probabilities.min() < 0:
        raise ValueError("rows that are no probabilities: NaN, negative, or a sum other than 1")
    predicted = probabilities.argmax(axis=1)
    hits, crops = bootstrap.count_by_unit(predicted == labels, split)
    means = bootstrap.accuracies(hits, crops)
    intervals, note = bootstrap.accuracy_intervals(hits, crops, split)
    likelihood = probabilities[np.arange(len(labels)), labels]
    confusion = confusion_matrix(labels, predicted, labels=range(len(split.class_names)))
    scores, per_class = _scores(probabilities, predicted, split)
    for key, mean in zip(bootstrap.KEYS, means, strict=True):
        scores[key] = Score(mean, intervals[key])
    absent = tuple(name for name, row in per_class.items() if not row.support)
    # The same figures by other names, but where a class is absent.
    scores["weighted_recall"] = scores["accuracy"]
    if not absent:
        scores["macro_recall"] = scores["balanced_accuracy"]
    return SplitMetrics(
        *means,
        loss=float(-np.log(np.maximum(likelihood, _SMALLEST_PROBABILITY)).mean()),
        per_class=per_class,
        confusion_matrix=tuple(map(tuple, confusion.tolist())),
        interval_95=intervals,
        interval_note=note,
        absent_classes=absent,
        num_crops=len(labels),
        num_fields=len(crops),
        scores=scores,
    )


def split_metrics(predictions: Predictions, *, seed: int) -> SplitMetrics:
    """`classification_metrics` of crops, with intervals over their independent fields (groups)."""
    return classification_metrics(predictions.probabilities, predictions.split(seed))


def field_metrics(predictions: Predictions, *, seed: int) -> SplitMetrics:
    """`classification_metrics` of whole fields (images), by the mean of their crops' probabilities.

    Groups stay what is independent; `num_crops` is then the number of fields.

    Args:
      predictions: of crops; all of a field are of its class.
      seed: of the replicates.
    """
    first, _, means = predictions.field_means(predictions.probabilities)
    crops = predictions.split(seed)
    fields = dataclasses.replace(crops, labels=crops.labels[first], groups=crops.groups[first])
    return classification_metrics(means, fields)


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


def areas(scores: Array, positive: Bools, weights: Array) -> tuple[Array, Array]:
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


def _figures(shares: Array, predicted: Ints, split: Split, weights: Array) -> dict[str, Array]:
    """Figures of the split [R] and of its classes [R, K] by name, for weights of crops [N, R]."""
    labels, crops = split.labels, np.arange(len(predicted))
    classes = np.arange(len(split.class_names))
    cells = labels * len(classes) + predicted
    one_hot = csr_array((np.ones(len(crops)), (cells, crops)), (len(classes) ** 2, len(crops)))
    figures = confusion_figures((one_hot @ weights).T.reshape(-1, len(classes), len(classes)))
    smallest = np.finfo(np.float64).eps
    square = ((shares - (labels[:, None] == classes)) ** 2).sum(axis=1)
    means = {
        "log_loss": -np.log(np.clip(shares[crops, labels], smallest, 1 - smallest)),
        "brier": square / 2 if len(classes) == 2 else square,
    }
    if len(classes) > _TOP:
        top = np.argsort(shares, axis=1, kind="stable")[:, -_TOP:]
        means["top_5_accuracy"] = (top == labels[:, None]).any(axis=1).astype(np.float64)
    figures |= {key: values @ weights / weights.sum(axis=0) for key, values in means.items()}
    under = np.array([areas(shares[:, k], labels == k, weights) for k in classes])
    for key, values in zip(_CURVES, under.transpose(1, 2, 0), strict=True):
        figures |= {key: values, f"macro_{key}": values.mean(axis=1)}
    return figures


def _scores(
    probabilities: Array, predicted: Ints, split: Split
) -> tuple[dict[str, Score], dict[str, ClassMetrics]]:
    """Figures of the split, and of every class, with their intervals."""
    drawn = bootstrap.weights_of(split)
    parts = [_figures(probabilities, predicted, split, weights) for weights in drawn]
    figures = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    per_class = {}
    for k, name in enumerate(split.class_names):
        true, called = split.labels == k, predicted == k
        rests_on = {"precision": called, "recall": true, "specificity": ~true}
        trials = {key: len(np.unique(split.groups[crops])) for key, crops in rests_on.items()}
        of_class = {key: values[:, k] for key, values in figures.items() if values.ndim == 2}
        row = {key: _score(values, trials.get(key)) for key, values in of_class.items()}
        per_class[name] = ClassMetrics(
            **{key: score.value for key, score in row.items()},
            support=int(true.sum()),
            interval_95={key: score.interval_95 for key, score in row.items()},
        )
    whole = {key: _score(values) for key, values in figures.items() if values.ndim == 1}
    for key in _CURVES:
        whole[key] = whole.pop(f"macro_{key}")
    return whole, per_class


def _score(values: Array, trials: int | None = None) -> Score:
    """A figure with its percentile interval; NaN is 0/0.

    Args:
      values: [1 + R], the figure and the same of every replicate; R may be 0, for no interval.
      trials: independent units behind a share, for an exact binomial bound where it is 0 or 1.
    """
    value, replicates = float(values[0]), values[1:][~np.isnan(values[1:])]
    if np.isnan(value):
        return Score(None, NO_INTERVAL)
    if len(replicates) and trials and value in (0, 1):
        bound = bootstrap.bound_without_error(trials)
        return Score(value, (bound, 1.0) if value else (0.0, 1 - bound))
    if not len(replicates) or np.ptp(replicates) < 10.0**-bootstrap.DECIMALS:
        return Score(value, NO_INTERVAL)
    return Score(value, bootstrap.percentile_interval(replicates))


def summary_table(metrics: SplitMetrics, title: str) -> str:
    """The figures of `classification_metrics` as plain text, at most 80 columns wide."""
    header = ("class", "precision", "recall", "F1", "support")
    rows = []
    for name, row in metrics.per_class.items():
        ratios = ["-" if x is None else f"{x:.3f}" for x in (row.precision, row.recall, row.f1)]
        rows.append([name, *ratios, str(row.support)])
    lines = [
        shortened(title, _WIDTH),
        f"{metrics.num_crops} crops from {metrics.num_fields} independent fields (groups); "
        "95 % intervals over these",
        f"\n{text_table(header, rows, width=_WIDTH)}\n",
        *(f"{key.replace('_', ' ')} {metrics.scores[key]}" for key in _SUMMARY),
        f"loss {metrics.loss:.3f}",
    ]
    absent = f"not in this split: {', '.join(metrics.absent_classes)}"
    notes = [metrics.interval_note, absent if metrics.absent_classes else None]
    lines += [textwrap.fill(f"note: {note}", _WIDTH) for note in notes if note]
    return "\n".join(lines)
