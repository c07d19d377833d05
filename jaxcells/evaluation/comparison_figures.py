"""Accuracy against training time, and the curves of several experiments on one axis."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import offset_copy

from jaxcells.evaluation.comparison_table import Row
from jaxcells.evaluation.figures import epoch_curve, save_figure
from jaxcells.text import shortened

# Okabe and Ito 2008, without the yellow, which is lost on white. More series than colours take
# the next line style and marker.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")
_DPI = 300
_FONT = 9  # points, at the width of a page
_LABEL_HEIGHT = 1.45 * _FONT
_WORTH_A_LOGARITHM = 4  # ratio of the largest to the smallest value
# Units of time, and the seconds up to which each is used.
_UNITS = (("s", 1, 300), ("min", 60, 3 * 3600), ("h", 3600, float("inf")))


def plot_accuracy_against_time(rows: Sequence[Row], path: str | Path) -> None:
    """Draw balanced accuracy with its 95 % interval against the training time.

    Validation, by which the choice is made, is a filled disc; test, a hollow square beside it. The
    chosen experiment has a ring and a bold name.

    Args:
      rows: the experiments; those without figures or time are left out.
      path: where the PNG goes.
    """
    shown = [(number, row) for number, row in enumerate(rows) if row.validation and row.train_s]
    longest = max((row.train_s or 0 for _, row in shown), default=0)
    unit, seconds, _ = next(entry for entry in _UNITS if longest <= entry[2])

    figure = Figure(figsize=(6.3, 3.8), layout="constrained")
    axes = figure.subplots()
    times = [(row.train_s or 0) / seconds for _, row in shown]
    if _spread(times):
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis, times)
    flags = []
    for x, (number, row) in zip(times, shown, strict=True):
        color = _COLORS[number % len(_COLORS)]
        top = _draw_estimate(figure, axes, x, row.validation, color, filled=True)
        if row.test:
            _draw_estimate(figure, axes, x, row.test, color, filled=False)
        if row.chosen and row.validation:
            y = row.validation["balanced_accuracy"]
            axes.plot(x, y, "o", ms=14, mfc="none", mec=color, mew=1.6)
        flags.append((x, top, shortened(row.name, 28), color, row.chosen))
    axes.margins(x=0.08)
    axes.set_xlabel(f"training time ({unit})", fontsize=_FONT)
    axes.set_ylabel("balanced accuracy", fontsize=_FONT)
    _tidy(axes)
    grey: dict[str, Any] = {"color": "#555555", "linestyle": "none"}
    keys = [
        Line2D([], [], marker="o", ms=6, label="validation", **grey),
        Line2D([], [], marker="s", ms=5, mfc="white", label="test (moved aside)", **grey),
        Line2D([], [], marker="o", ms=11, mfc="none", mew=1.6, label="chosen", **grey),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=_FONT)
    _draw_flags(figure, axes, flags)
    save_figure(figure, path, dpi=_DPI)


def plot_curves_together(
    records: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: str | Path
) -> None:
    """Draw training loss and validation balanced accuracy of all experiments by epoch.

    Of several seeds each is a thin line and their mean, over the epochs that all have, a thick one.

    Args:
      records: {experiment: for each seed the lines of metrics.jsonl}.
      path: where the PNG goes.
    """
    figure = Figure(figsize=(7.2, 3.3), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for axes, split, key, title in (
        (loss_axes, "train", "loss", "Training loss (nats)"),
        (accuracy_axes, "val", "balanced_accuracy", "Validation balanced accuracy"),
    ):
        drawn: list[float] = []
        for number, seeds in enumerate(records.values()):
            curves = [epoch_curve(lines, split, [key]) for lines in seeds]
            drawn += _draw_seeds(axes, [(c["epoch"], c[key]) for c in curves], number)
        axes.set_title(title, fontsize=_FONT + 1)
        axes.set_xlabel("epoch", fontsize=_FONT)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        if key == "loss" and _spread(drawn):
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis, drawn)
        _tidy(axes)
    keys = [Line2D([], [], lw=1.6, label=name, **_style(n)) for n, name in enumerate(records)]
    columns = min(len(keys), 5)
    legend = figure.legend(
        handles=keys, loc="outside lower center", ncols=columns, frameon=False, fontsize=_FONT
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    save_figure(figure, path, dpi=_DPI)


def _style(number: int) -> dict[str, Any]:
    rounds, color = divmod(number, len(_COLORS))
    return {"color": _COLORS[color], "linestyle": _LINES[rounds % len(_LINES)]}


def _draw_seeds(
    axes: Axes,
    curves: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]],
    number: int,
) -> list[float]:
    """Draw the curves (epochs, values) of one experiment and return the values."""
    curves = [curve for curve in curves if curve[0].size]
    if not curves:
        return []
    epochs = sorted(set.intersection(*(set(epochs) for epochs, _ in curves)))
    mean = [np.mean([values[at == epoch] for at, values in curves]) for epoch in epochs]
    if len(curves) > 1:
        for at, values in curves:
            axes.plot(at, values, lw=0.6, alpha=0.45, **_style(number))
    marker = "o" if len(epochs) < 30 else None
    axes.plot(epochs, mean, lw=1.5, marker=marker, ms=2.6, **_style(number))
    return [float(value) for _, values in curves for value in values]


def _draw_estimate(
    figure: Figure,
    axes: Axes,
    x: float,
    figures: Mapping[str, Any] | None,
    color: str,
    *,
    filled: bool,
) -> float:
    """Draw a balanced accuracy with its interval and return the upper end of both."""
    assert figures is not None
    y, (low, high) = figures["balanced_accuracy"], figures["interval_95"]["balanced_accuracy"]
    ends = [y if low is None else low, y if high is None else high]
    axes.update_datalim([(x, min(y, *ends)), (x, max(y, *ends))])
    axes.autoscale_view()
    # Fixed on paper, not in seconds; for this reason matplotlib leaves it out of the limits.
    aside = offset_copy(axes.transData, figure, x=0 if filled else 7, units="points")
    style: dict[str, Any] = {"color": color, "transform": aside}
    if low is not None:
        axes.plot([x, x], [low, high], lw=1.6 if filled else 1, marker="_", ms=5, **style)
    face = color if filled else "white"
    axes.plot(x, y, marker="o" if filled else "s", ms=6 if filled else 5, mfc=face, **style)
    return max(y, *ends)


def _draw_flags(
    figure: Figure, axes: Axes, flags: Sequence[tuple[float, float, str, str, bool]]
) -> None:
    """Write names above the axes, a line down from the start of each to its point (x, top).

    Where names would meet, the one further left is a line higher: no line then crosses a name.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the axes stay where they are; saving makes room above
    box = axes.get_window_extent()
    pixels = figure.dpi / 72
    placed: list[tuple[float, int]] = []  # pixel of the start, row
    for x, top, name, color, bold in sorted(flags, key=lambda flag: flag[:2], reverse=True):
        start, base = axes.transData.transform((x, top))
        text = axes.text(
            0, 0, name, fontsize=_FONT, weight="bold" if bold else "normal", parse_math=False
        )
        end = start + text.get_window_extent().width + 8 * pixels
        row = 1 + max((row for other, row in placed if other <= end), default=-1)
        placed.append((start, row))
        height = 1 + (4 + row * _LABEL_HEIGHT) * pixels / box.height
        text.set(x=x, y=height, transform=axes.get_xaxis_transform(), va="bottom")
        text.set_transform(offset_copy(axes.get_xaxis_transform(), figure, x=3, units="points"))
        axes.plot(
            [x, x],
            [(base - box.y0) / box.height, height + 0.7 * _LABEL_HEIGHT * pixels / box.height],
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            lw=0.7,
            color=color,
            zorder=0,
        )


def _spread(values: Sequence[float]) -> bool:
    """Whether values ask for a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) >= _WORTH_A_LOGARITHM * min(values)


def _plain_numbers(axis: Axis, values: Sequence[float]) -> None:
    """Label a logarithmic axis with numbers, the fewer of a decade the more decades there are."""
    ratio = max(values) / min(values)
    subs = (1, 2, 3, 5) if ratio < 20 else (1, 2, 5) if ratio < 1000 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FormatStrFormatter("%g"))


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_FONT)
