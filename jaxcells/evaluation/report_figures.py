"""The pictures of a report, as SVG that a page holds within itself."""

import dataclasses
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.metrics import precision_recall_curve, roc_curve

from jaxcells.evaluation.calibration import Reliability
from jaxcells.evaluation.comparison_figures import LINE_STYLES
from jaxcells.evaluation.figures import PAGE
from jaxcells.evaluation.metrics import ClassMetrics, Score
from jaxcells.evaluation.predictions import Predictions
from jaxcells.text import shortened

_WIDTH = 4.6  # inches; a telephone shows them at three quarters of that
_GREY = "#555555"
_MARKERS = "osD^vP*X"
_MANY_POINTS = 1500  # more are drawn as pixels
# Text stays text, in the fonts of the page; "$" and "_" in names are letters, not formulas.
_STYLE: dict[str, Any] = PAGE | {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxcells",
    "text.parse_math": False,
}
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # none, so that it repeats


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure with what is said about it.

    Attributes:
      name: without a blank; no other picture of the page has it.
      title: what is shown.
      text: how to read it, below the figure, and what it shows for those who do not see it.
      figure: of matplotlib.
    """

    name: str
    title: str
    text: str
    figure: Figure

    @property
    def svg(self) -> Markup:
        """The figure as an element of a page, with names of its own and a description."""
        file = io.StringIO()
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(file, format="svg", metadata=_METADATA, transparent=True)
        text = file.getvalue()[file.getvalue().index("<svg") :]
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", text)
        label = f"{self.name}-title {self.name}-text"
        said = (
            f'<title id="{self.name}-title">{escape(self.title)}</title>'
            f'<desc id="{self.name}-text">{escape(self.text)}</desc>'
        )
        opened = text.replace("<svg ", f'<svg role="img" aria-labelledby="{label}" ', 1)
        return Markup(opened.replace(">", f">{said}", 1))


def draw_roc(predictions: Predictions) -> Figure:
    """Draws the receiver operating characteristic of every class against all others."""
    figure, axes = _square("false positive rate", "true positive rate (recall)")
    axes.plot([0, 1], [0, 1], color=_GREY, ls=":", lw=1, label="chance")
    for right, probability, style in _one_against_rest(predictions):
        false_rate, true_rate, _ = roc_curve(right, probability)
        axes.plot(false_rate, true_rate, **style)
    return _with_legend(figure)


def draw_precision_recall(predictions: Predictions) -> Figure:
    """Draws precision against recall of every class against all others."""
    figure, axes = _square("recall", "precision")
    for right, probability, style in _one_against_rest(predictions):
        precision, recall, _ = precision_recall_curve(right, probability)
        axes.plot(recall, precision, drawstyle="steps-post", **style)
    return _with_legend(figure)


def _one_against_rest(
    predictions: Predictions,
) -> Iterator[tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64], dict[str, Any]]]:
    """For every class that some crops are of and some not: which are, probabilities, a style."""
    styles = itertools.cycle(LINE_STYLES)
    for number, (name, style) in enumerate(zip(predictions.class_names, styles, strict=False)):
        right = predictions.labels == number
        if right.any() and not right.all():
            label = {"label": shortened(name, 24), "lw": 1.5}
            yield right, predictions.probabilities[:, number], style | label


@matplotlib.rc_context(_STYLE)
def draw_points(
    rows: Mapping[str, Sequence[Score]], names: Sequence[str], label: str, limits: tuple[float, ...]
) -> Figure:
    """Draws figures with their 95 % intervals, a row for each: a forest plot.

    Args:
      rows: {name of the row: a figure for each name}.
      names: what the figures are.
      label: of the axis.
      limits: of the axis.
    """
    figure = Figure(figsize=(_WIDTH, 1 + (0.26 + 0.12 * len(names)) * len(rows)), layout="constrained")
    axes = figure.subplots()
    for number, (name, style) in enumerate(zip(names, LINE_STYLES, strict=False)):
        look: dict[str, Any] = {"color": style["color"], "marker": _MARKERS[number], "ms": 5}
        place = (number - (len(names) - 1) / 2) * 0.22
        for row, scores in enumerate(rows.values()):
            ends = [end for end in scores[number].interval_95 if end is not None]
            axes.plot(ends, [row + place] * len(ends), color=style["color"], lw=1.6)
            if scores[number].value is not None:
                shown = name if not row else None
                axes.plot(scores[number].value, row + place, ls="", label=shown, **look)
    axes.set_yticks(range(len(rows)), [shortened(name, 30) for name in rows])
    axes.set(xlabel=label, xlim=limits, ylim=(len(rows) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    return _with_legend(figure) if len(names) > 1 else figure


def draw_reliability(reliability: Reliability) -> Figure:
    """Draws how often the network is right, by how sure it is, before and after calibration."""
    figure, axes = _square("probability of the predicted class", "share that is right")
    axes.plot([0, 1], [0, 1], color=_GREY, ls=":", lw=1, label="as sure as right")
    for label, bins, style in (
        ("as trained", reliability.bins, LINE_STYLES[1]),
        ("calibrated", reliability.calibrated_bins, LINE_STYLES[0]),
    ):
        full = [b for b in bins if b.count]
        x, y = [b.confidence for b in full], [b.accuracy for b in full]
        axes.plot(x, y, color=style["color"], lw=1, marker="os"[label == "as trained"], label=label)
    return _with_legend(figure)


@matplotlib.rc_context(_STYLE)
def draw_feature_map(predictions: Predictions, *, fields: bool) -> Figure:
    """Draws the two main directions of the pooled features, with a mark for every crop.

    Args:
      predictions: of one network.
      fields: join the crops of a group (field) with their mean.
    """
    points = PCA(2, random_state=0).fit(predictions.features)
    shares, xy = points.explained_variance_ratio_, points.transform(predictions.features)
    figure = Figure(figsize=(_WIDTH, _WIDTH), layout="constrained")
    axes = figure.subplots()
    many = len(xy) > _MANY_POINTS
    groups, index = np.unique(predictions.groups, return_inverse=True)
    means = np.stack([xy[index == number].mean(axis=0) for number in range(len(groups))])
    styles = zip(itertools.cycle(LINE_STYLES), itertools.cycle(_MARKERS), strict=False)
    for (number, name), (style, marker) in zip(
        enumerate(predictions.class_names), styles, strict=False
    ):
        of_class, color = predictions.labels == number, style["color"]
        mine = of_class.nonzero()[0]
        look: dict[str, Any] = {"color": color, "marker": marker, "ls": "", "rasterized": many}
        size, alpha = (2, 0.5) if fields else (4, 0.8)
        label = None if fields else shortened(name, 24)
        axes.plot(*xy[mine].T, ms=size, mew=0.3, mec="white", alpha=alpha, label=label, **look)
        if fields:
            lines = np.stack([xy[mine], means[index[mine]], np.full((len(mine), 2), np.nan)], axis=1)
            axes.plot(*lines.reshape(-1, 2).T, color=color, lw=0.5, alpha=0.5, rasterized=many)
            own = np.unique(index[mine])
            look |= {"label": shortened(name, 24), "rasterized": False}
            axes.plot(*means[own].T, ms=6, mew=1, mec="black", **look)
    for axis, share in zip("xy", shares, strict=True):
        axes.set(**{f"{axis}label": f"{share:.0%} of the variance", f"{axis}ticks": []})
    return _with_legend(figure)


@matplotlib.rc_context(_STYLE)
def _square(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, _WIDTH), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return figure, axes


def _with_legend(figure: Figure) -> Figure:
    """Puts the legend below the figure, where no line is."""
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure
