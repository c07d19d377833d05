"""gradients.png: the gradient's norm in every layer, and a caption computed from the numbers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from jaxcells.evaluation.figures import save_figure

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito 2008; the dashes tell the lines apart in grey too.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#D55E00", "linestyle": "-", "marker": "o"},
    {"color": "#0072B2", "linestyle": (0, (5, 1.5)), "marker": "s"},
    {"color": "#009E73", "linestyle": (0, (1.5, 1)), "marker": "^"},
)
_SMALL, _LARGE = 7.5, 8.5  # points


@dataclasses.dataclass(frozen=True)
class _Curve:
    """One network in one state, without the projections on its shortcuts."""

    network: str
    norms: bool
    step: int
    loss: float
    depth: npt.NDArray[np.int64]
    stage: npt.NDArray[np.int64]  # 0 for the stem and the head
    gradient_norm: npt.NDArray[np.float64]
    diverged: int | None  # the first step at which anything was not finite, up to this one

    @property
    def first_stage(self) -> float:
        return _geometric_mean(self.gradient_norm[self.stage == 1])

    @property
    def last_stage(self) -> float:
        return _geometric_mean(self.gradient_norm[self.stage == self.stage.max()])

    @property
    def ratio(self) -> float:
        """How many times larger the first stage's gradient is than the last's."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.divide(self.first_stage, self.last_stage))


def plot_gradients(rows: Rows, losses: Rows, path: str | Path) -> None:
    """Draws the gradient's norm against depth: with norms and without, before training and after.

    Args:
      rows: the lines of gradients.csv, each with network, norms (bool), step, loss, depth (None for
        a projection), layer and gradient_norm.
      losses: the lines of losses.csv, each with network, norms, step and loss.
      path: where the PNG goes; 17 cm wide.
    """
    curves = _curves(rows, losses)
    networks = dict.fromkeys(curve.network for curve in curves)
    styles = dict(zip(networks, _STYLES, strict=False))
    figure = Figure(figsize=(6.7, 4.9), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, (letter, title, shown) in zip(panels.flat, _panels(curves), strict=True):
        _draw_panel(axes, shown, styles)
        notes = [f"\n    {_in_words(curve)}" for curve in shown if curve.diverged is not None]
        axes.set_title("".join([f"{letter}  {title}", *notes]), fontsize=_LARGE, loc="left")
    for axes in panels[-1]:
        axes.set_xlabel("layer, from image to logits", fontsize=_LARGE)
    for axes in panels[:, 0]:
        axes.set_ylabel("norm of the kernel's gradient", fontsize=_LARGE)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=len(labels),
        frameon=False,
        fontsize=_LARGE,
        handlelength=3.2,
    )
    save_figure(figure, path, dpi=300)


def describe_gradients(rows: Rows, losses: Rows, *, setting: str) -> str:
    """Writes the caption of the figure in Markdown: every statement follows from the numbers.

    Args:
      rows: see `plot_gradients`.
      losses: see `plot_gradients`.
      setting: what a reader must know of the training, in words.
    """
    curves = _curves(rows, losses)
    last = max(curve.step for curve in curves)
    about = (
        "L2 norm of the gradient of the loss with respect to each layer's kernel, against the "
        "number of the layer on the way from image to logits (projections on shortcuts left out), "
        "for networks of one depth with and without shortcuts and batch norm: at random "
        f"initialisation and after {last} steps of training, on the same batch. One run each; "
        f"{setting}. Kernels of different stages differ in shape: a curve may jump where a stage "
        "begins, and two networks are best compared at one layer."
    )
    found = "; ".join(
        f"({letter}) {title.lower()}, {', '.join(_in_words(curve) for curve in shown)}"
        for letter, title, shown in _panels(curves)
    )
    ratios = f"Norm in the first stage over that in the last, and median of all layers: {found}."
    return "\n\n".join([about, ratios, *_plain_in_words(curves), "\n".join(_table(curves))])


def _curves(rows: Rows, losses: Rows) -> list[_Curve]:
    groups: dict[tuple[str, bool, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["depth"] is not None:
            groups.setdefault((row["network"], row["norms"], row["step"]), []).append(row)
    curves = []
    for (network, norms, step), layers in groups.items():
        layers.sort(key=lambda row: int(row["depth"]))
        stages = [re.match(r"layer(\d+)_", row["layer"]) for row in layers]
        gradient_norm = np.array([row["gradient_norm"] for row in layers], float)
        # Everything that was seen of this network so far, in the order of the steps.
        seen = [
            (row["step"], row["loss"])
            for row in losses
            if (row["network"], row["norms"]) == (network, norms) and row["step"] <= step
        ]
        seen += [(step, value) for value in (layers[0]["loss"], *gradient_norm)]
        curves.append(
            _Curve(
                network=network,
                norms=norms,
                step=step,
                loss=layers[0]["loss"],
                depth=np.array([row["depth"] for row in layers]),
                stage=np.array([int(stage[1]) if stage else 0 for stage in stages]),
                gradient_norm=gradient_norm,
                diverged=min((s for s, value in seen if not math.isfinite(value)), default=None),
            )
        )
    return curves


def _draw_panel(
    axes: Axes, curves: Sequence[_Curve], styles: Mapping[str, Mapping[str, Any]]
) -> None:
    axes.set_yscale("log")
    axes.margins(y=0.1)
    for curve in curves:
        style = styles[curve.network]
        every = max(1, len(curve.depth) // 34)
        axes.plot(
            *(curve.depth, curve.gradient_norm),
            **style,
            label=curve.network,
            lw=1.2,
            ms=2.6,
            markevery=every,
        )
    _mark_stages(axes, curves[0])
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=_SMALL)
    axes.grid(axis="y", alpha=0.3, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0.5, curves[0].depth.max() + 0.5)


def _mark_stages(axes: Axes, curve: _Curve) -> None:
    """Shades every second stage and writes its number at the upper edge."""
    for stage in range(1, curve.stage.max() + 1):
        inside = curve.depth[curve.stage == stage]
        low, high = inside.min() - 0.5, inside.max() + 0.5
        if stage % 2:
            axes.axvspan(low, high, color="black", alpha=0.05, lw=0)
        wide = high - low > 0.15 * len(curve.depth)
        axes.text(
            *((low + high) / 2, 0.98),
            f"stage {stage}" if wide else f"{stage}",
            ha="center",
            va="top",
            color="#555555",
            fontsize=_SMALL - 0.5,
            transform=axes.get_xaxis_transform(),
        )


def _panels(curves: Sequence[_Curve]) -> list[tuple[str, str, list[_Curve]]]:
    """Returns letter, title and curves of every panel, in the order of reading."""
    keys = sorted({(curve.step, not curve.norms) for curve in curves})
    return [
        (
            letter,
            f"{'Without' if without else 'With'} norms, {_state(step)}",
            [curve for curve in curves if (curve.step, not curve.norms) == (step, without)],
        )
        for letter, (step, without) in zip("abcd", keys, strict=True)
    ]


def _state(step: int) -> str:
    return f"after {step} steps" if step else "at initialisation"


def _in_words(curve: _Curve) -> str:
    if curve.diverged is not None:
        return f"{curve.network} diverged at step {curve.diverged}"
    median = float(np.median(curve.gradient_norm))
    return f"{curve.network} {_number(curve.ratio)} (median {_number(median)})"


def _plain_in_words(curves: Sequence[_Curve]) -> list[str]:
    """Holds the plain network with norms against what He et al. say of such networks."""
    plain = [curve for curve in curves if curve.norms and curve.network.startswith("plain")]
    if not plain:
        return []
    return [
        "He et al. (2016, Deep residual learning, section 4.1) report that plain networks with "
        "norms have healthy gradients. Here, in the first stage beside the last, that of "
        f"{plain[0].network} with norms is {', and '.join(_comparison(curve) for curve in plain)}."
    ]


def _comparison(curve: _Curve) -> str:
    if curve.diverged is not None:
        found = "not finite"
    elif not curve.first_stage:
        found = "zero in a layer"
    elif curve.ratio < 1:
        found = f"{_number(1 / curve.ratio)} times smaller"
    else:
        found = f"{_number(curve.ratio)} times larger"
    return f"{found} {_state(curve.step)}"


def _table(curves: Sequence[_Curve]) -> list[str]:
    lines = [
        "| network | norms | state | loss | first stage | last stage | first / last | smallest "
        "| largest |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for _, _, shown in _panels(curves):
        for curve in shown:
            numbers = (
                *(curve.loss, curve.first_stage, curve.last_stage, curve.ratio),
                *(float(curve.gradient_norm.min()), float(curve.gradient_norm.max())),
            )
            cells = [curve.network, "with" if curve.norms else "without", _state(curve.step)]
            lines.append(f"| {' | '.join([*cells, *map(_number, numbers)])} |")
    return [*lines, "", "Stages are geometric means over their layers."]


def _geometric_mean(values: npt.NDArray[np.float64]) -> float:
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(values).mean()))


def _number(value: float) -> str:
    """Returns three significant digits, as people write them."""
    if 1000 <= value < 10_000:
        return f"{value:.0f}"
    return f"{value:.3g}"
