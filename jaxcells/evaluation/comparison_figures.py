"""Accuracy against training time, and the curves of several experiments on one axis."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from jaxcells.evaluation import figures
from jaxcells.evaluation.comparison import Estimate
from jaxcells.evaluation.comparison_table import Row
from jaxcells.text import shortened_apart

# More experiments than colours take the next line style.
_COLORED = cycler(ls=["-", "--", ":", "-."]) * cycler(color=figures.COLORS)
LINE_STYLES: list[dict[str, Any]] = list(_COLORED)
# Units of time, and the seconds up to which each is used.
_UNITS = (("s", 1, 300), ("min", 60, 3 * 3600), ("h", 3600, float("inf")))


@rc_context(figures.PAGE)
def draw_accuracy_against_time(rows: Sequence[Row], references: Mapping[str, float]) -> Figure:
    """Draw balanced accuracy with its 95 % interval against the training time.

    Validation, by which the choice is made, is a filled disc; test, a hollow square beside it. The
    chosen experiment has a ring.

    Args:
      rows: the experiments.
      references: "chance" and "brightness" in balanced accuracy, see `draw_references`.
    """
    longest = max(row.train_s for row in rows)
    unit, seconds, _ = next(entry for entry in _UNITS if longest <= entry[2])
    figure = Figure(figsize=(6.3, 3.8), layout="constrained")
    axes = figure.subplots()
    figures.log_axis_if_wide(axes.xaxis, [row.train_s / seconds for row in rows])
    keys: list[Artist] = []
    names = shortened_apart([row.name for row in rows], 28)
    for row, name, style in zip(rows, names, itertools.cycle(LINE_STYLES), strict=False):
        x, y = row.train_s / seconds, row.validation.balanced_accuracy
        _draw_estimate(axes, x, row.validation, style)
        _draw_estimate(axes, x, row.test, style, aside=True)
        if row.chosen:
            axes.plot(x, y, "o", ms=14, mfc="none", mec=style["color"], mew=1.6)
        keys.append(Line2D([], [], marker="o", ms=6, label=name, **style))
    axes.margins(x=0.08)
    figures.draw_references(axes, references)
    axes.set(xlabel=f"training time ({unit})", ylabel="balanced accuracy")
    grey: dict[str, Any] = {"color": "#555555", "linestyle": "none"}
    keys += [
        Line2D([], [], marker="o", ms=6, label="validation", **grey),
        Line2D([], [], marker="s", ms=5, mfc="white", label="test (moved aside)", **grey),
        Line2D([], [], marker="o", ms=11, mfc="none", mew=1.6, label="chosen", **grey),
        *axes.get_legend_handles_labels()[0],
    ]
    figure.legend(handles=keys, loc="outside right upper")
    return figure


@rc_context(figures.PAGE)
def draw_curves_together(
    records: Mapping[str, Sequence[figures.Records]], references: Mapping[str, float]
) -> Figure:
    """Draw training loss and validation balanced accuracy of all experiments by epoch.

    Of several seeds each is a thin line and their mean, over the epochs that all have, a thick one.

    Args:
      records: {experiment: for each seed the lines of metrics.jsonl}.
      references: "chance" and "brightness" in balanced accuracy, see `draw_references`.
    """
    figure = Figure(figsize=(7.2, 3.3), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    keys: list[Artist] = []
    for (name, seeds), style in zip(records.items(), itertools.cycle(LINE_STYLES), strict=False):
        _draw_seeds(loss_axes, seeds, "train", "loss", style)
        _draw_seeds(accuracy_axes, seeds, "val", "balanced_accuracy", style)
        keys.append(Line2D([], [], lw=1.6, label=name, **style))
    figures.draw_references(accuracy_axes, references)
    keys += accuracy_axes.get_legend_handles_labels()[0]
    losses = [loss for line in loss_axes.get_lines() for loss in line.get_ydata()]
    figures.log_axis_if_wide(loss_axes.yaxis, losses)
    loss_axes.set(title="Training loss (nats)", xlabel="epoch")
    accuracy_axes.set(title="Validation balanced accuracy", xlabel="epoch")
    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 5))
    return figure


@rc_context(figures.PAGE)
def draw_learning_curves(curves: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw validation balanced accuracy with its 95 % interval against the training images.

    Args:
      curves: {what was trained: its rows, by their number of training images}.
    """
    figure = Figure(figsize=(6.3, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    for (name, rows), style in zip(curves.items(), itertools.cycle(LINE_STYLES), strict=False):
        numbers = [row.training_images for row in rows]
        axes.plot(numbers, [row.validation.balanced_accuracy for row in rows], label=name, **style)
        for row in rows:
            _draw_estimate(axes, row.training_images, row.validation, style)
    shown = sorted({row.training_images for rows in curves.values() for row in rows})
    axes.set_xticks(shown, labels=list(map(str, shown)))
    axes.minorticks_off()
    axes.set(xlabel="training images", ylabel="balanced accuracy, validation")
    axes.legend(loc="lower right")
    return figure


def _draw_seeds(
    axes: Axes, seeds: Sequence[figures.Records], split: str, key: str, style: Mapping[str, Any]
) -> None:
    """Draw a curve for each seed, and their mean where all are."""
    curves = [figures.epoch_curve(records, split, [key]) for records in seeds]
    curves = [curve for curve in curves if curve["epoch"].size]
    if not curves:
        return
    epochs = functools.reduce(np.intersect1d, [curve["epoch"] for curve in curves])
    mean = np.mean([c[key][np.isin(c["epoch"], epochs)] for c in curves], axis=0)
    for curve in curves if len(curves) > 1 else []:
        axes.plot(curve["epoch"], curve[key], lw=0.6, alpha=0.45, **style)
    axes.plot(epochs, mean, lw=1.5, marker="o" if len(epochs) < 30 else None, ms=2.6, **style)


def _draw_estimate(
    axes: Axes, x: float, estimate: Estimate, style: dict[str, Any], *, aside: bool = False
) -> None:
    """Draw a balanced accuracy with its interval."""
    y = estimate.balanced_accuracy
    ends = [end for end in estimate.interval_95["balanced_accuracy"] if end is not None]
    axes.update_datalim([(x, end) for end in (y, *ends)])
    axes.autoscale_view()
    # Fixed on paper, not in seconds; for this reason matplotlib leaves it out of the limits.
    place = offset_copy(
        axes.transData, axes.get_figure(root=True), x=7 if aside else 0, units="points"
    )
    style = style | {"transform": place}
    axes.plot([x] * len(ends), ends, lw=1 if aside else 1.6, marker="_", ms=5, **style)
    marker, size, face = ("s", 5, "white") if aside else ("o", 6, style["color"])
    axes.plot(x, y, marker=marker, ms=size, mfc=face, **style)
