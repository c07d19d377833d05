"""The pictures of a report, as SVG that a page holds within itself."""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.metrics import precision_recall_curve, roc_curve

from jaxcells.evaluation.calibration import Reliability
from jaxcells.evaluation.comparison_figures import LINE_STYLES
from jaxcells.evaluation.figures import PAGE
from jaxcells.evaluation.metrics import Score
from jaxcells.evaluation.predictions import Predictions
from jaxcells.text import shortened

_WIDTH = 4.6  # inches; a telephone shows them at three quarters of that
_MARKERS = "osD^vP*X"
_CHANCE: dict[str, Any] = {"color": "#555555", "ls": ":", "lw": 1}
_MANY_POINTS = 1500  # more are drawn as pixels
# Text stays text, in the fonts of the page; "$" and "_" in names are letters, not formulas.
_STYLE: Any = PAGE | {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxcells",
    "text.parse_math": False,
}
_METADATA: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # none, so that it repeats
# A curve, 1 if it gives x before y or -1, its axes, and what joins its points.
_CURVES: dict[str, tuple[Callable[..., Any], int, str, str, str]] = {
    "roc": (roc_curve, 1, "false positive rate", "true positive rate (recall)", "default"),
    "precision_recall": (precision_recall_curve, -1, "recall", "precision", "steps-post"),
}


def as_svg(figure: Figure, name: str, title: str, text: str) -> Markup:
    """Returns a figure as an element of a page.

    Args:
      figure: of matplotlib.
      name: stands before every id in it, so that no two figures of a page share one.
      title: what is shown.
      text: what is to be seen in it, for those who do not see it.
    """
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(file, format="svg", metadata=_METADATA, transparent=True)
    _, _, drawn = file.getvalue().partition("<svg ")
    drawn = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawn)
    opening, _, inner = drawn.partition(">")
    said = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(text)}'
    label = f'role="img" aria-labelledby="{name}-title {name}-text"'
    return Markup(f"<svg {label} {opening}>{said}</desc>{inner}")


@matplotlib.rc_context(_STYLE)
def draw_against_rest(predictions: Predictions, kind: Literal["roc", "precision_recall"]) -> Figure:
    """Draws the ROC or the precision-recall curve of every class against all others."""
    curve, order, *labels, steps = _CURVES[kind]
    figure, axes = _square(*labels)
    if kind == "roc":
        axes.plot([0, 1], [0, 1], label="chance", **_CHANCE)
    looks = itertools.cycle(LINE_STYLES)
    for label, (name, style) in enumerate(zip(predictions.class_names, looks, strict=False)):
        right = predictions.labels == label
        if right.any() and not right.all():
            xy = curve(right, predictions.probabilities[:, label])[:2][::order]
            axes.plot(*xy, drawstyle=steps, label=_label(name), **style)
    return _with_legend(figure)


@matplotlib.rc_context(_STYLE)
def draw_reliability(found: Reliability) -> Figure:
    """Draws how often the network is right by how sure it is, before and after calibration."""
    figure, axes = _square("mean probability of the predicted class", "share that is right")
    axes.plot([0, 1], [0, 1], label="as sure as right", **_CHANCE)
    kinds = {
        "as trained": (found.bins, LINE_STYLES[1]),
        "calibrated": (found.bins_calibrated, LINE_STYLES[0]),
    }
    for name, (bins, style) in kinds.items():
        points = np.array([(b.confidence, b.accuracy, b.count) for b in bins if b.count])
        x, y, counts = points.T
        axes.plot(x, y, lw=1, label=name, **style)
        axes.scatter(x, y, 10 + 150 * counts / counts.sum(), color=style["color"])
    return _with_legend(figure)


@matplotlib.rc_context(_STYLE)
def draw_intervals(rows: Mapping[str, Sequence[Score]], names: Sequence[str]) -> Figure:
    """Draws shares with their 95 % intervals, some for each row: a forest plot.

    Args:
      rows: {name of the row: a share for each name}.
      names: what the shares are.
    """
    height = 1 + len(rows) * (0.25 + 0.12 * len(names))
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    for number, (name, style, marker) in enumerate(zip(names, LINE_STYLES, _MARKERS, strict=False)):
        places = np.arange(len(rows)) + 0.2 * (number - (len(names) - 1) / 2)
        scores = [of_row[number] for of_row in rows.values()]
        values = [np.nan if score.value is None else score.value for score in scores]
        axes.plot(values, places, ls="", marker=marker, ms=5, color=style["color"], label=name)
        for place, score in zip(places, scores, strict=True):
            ends = [end for end in score.interval_95 if end is not None]
            axes.plot(ends, [place] * len(ends), lw=1.6, color=style["color"])
    axes.set_yticks(range(len(rows)), [shortened(name, 30) for name in rows])
    axes.set(xlabel=", ".join(names), xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    return _with_legend(figure) if len(names) > 1 else figure


@matplotlib.rc_context(_STYLE)
def draw_feature_map(predictions: Predictions) -> Figure:
    """Draws the crops of one network in the two directions in which their features differ most.

    A line joins every crop to the mean of its group (field) and class, which is a large mark.
    """
    figure = Figure(figsize=(_WIDTH, _WIDTH + 0.5), layout="constrained")
    axes, pca = figure.subplots(), PCA(2, random_state=0)
    points = pca.fit_transform(predictions.features)
    looks = zip(itertools.cycle(LINE_STYLES), itertools.cycle(_MARKERS), strict=False)
    for label, name in enumerate(predictions.class_names):
        style, marker = next(looks)
        look: dict[str, Any] = {"color": style["color"], "marker": marker, "ls": ""}
        of_class = predictions.labels == label
        crops, groups = points[of_class], predictions.groups[of_class]
        means = [crops[groups == group].mean(axis=0) for group in np.unique(groups)]
        ends = np.array(means)[np.unique(groups, return_inverse=True)[1]]
        lines = np.stack([crops, ends, np.full_like(crops, np.nan)], axis=1).reshape(-1, 2)
        many = len(points) > _MANY_POINTS
        axes.plot(*lines.T, color=style["color"], lw=0.4, alpha=0.6, rasterized=many)
        axes.plot(*crops.T, ms=3, mew=0, alpha=0.6, rasterized=many, **look)
        axes.plot(*np.transpose(means), ms=7, mec="black", label=_label(name), **look)
    for axis, share in zip("xy", pca.explained_variance_ratio_, strict=True):
        axes.set(**{f"{axis}label": f"{share:.0%} of the variance", f"{axis}ticks": []})
    return _with_legend(figure)


def _label(name: str) -> str:
    """A class as a label of lines: matplotlib would leave out one that begins with "_"."""
    return "\u200b" * name.startswith("_") + shortened(name, 24)


def _square(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, _WIDTH + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return figure, axes


def _with_legend(figure: Figure) -> Figure:
    """Puts a legend below the figure, where no line is."""
    figure.legend(loc="outside lower center", ncols=2)
    return figure
