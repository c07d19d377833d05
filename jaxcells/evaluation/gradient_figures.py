"""gradients.png: the gradient's norm in every layer, and a caption computed from the numbers."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxcells.evaluation import prose
from jaxcells.evaluation.figures import COLORS, PAGE, save_figure
from jaxcells.text import markdown_table

# The dashes tell the lines apart in grey too.
_DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1))]
_STYLES = cycler(color=[COLORS[n] for n in (1, 0, 2)], linestyle=_DASHES, marker="os^")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One network in one state.

    Attributes:
      network: its name.
      norms: whether it has its batch norms.
      step: number of updates made before.
      losses: of the batch of every step so far, and of the batch that this is measured on, `[S+1]`.
      layers: names of those on the way from image to logits, as torchvision has them: `conv1`,
        `layer1_0/conv1`, …, `fc`.
      gradient_norms: L2 norm of the loss's gradient with respect to each layer's kernel, `[L]`.
    """

    network: str
    norms: bool
    step: int
    losses: Sequence[float]
    layers: Sequence[str]
    gradient_norms: npt.NDArray[np.float64]

    @property
    def stages(self) -> npt.NDArray[np.int64]:
        """The stage of every layer, 0 for the stem and the head, `[L]`."""
        matches = [re.match(r"layer(\d+)_", layer) for layer in self.layers]
        return np.array([int(match[1]) if match else 0 for match in matches])

    @property
    def ends(self) -> tuple[float, float, float]:
        """The gradient's geometric mean in the first stage and in the last, and their ratio."""
        with np.errstate(divide="ignore", invalid="ignore"):
            logs, stages = np.log(self.gradient_norms), self.stages
            first, last = (np.exp(logs[stages == s].mean()) for s in (1, stages.max()))
            return float(first), float(last), float(first / last)

    @property
    def diverged(self) -> int | None:
        """The first step at which anything was not finite, so far."""
        finite = np.isfinite(self.losses)
        finite[-1] &= np.isfinite(self.gradient_norms).all()
        return None if finite.all() else int(finite.argmin())


@rc_context(PAGE)
def plot_gradients(measured: Sequence[Measurement], path: Path) -> None:
    """Draws the gradient's norm against depth: with norms and without, before training and after.

    Args:
      measured: networks of one depth, up to three, each with norms and without and in two states.
      path: where the PNG goes; 17 cm wide.
    """
    styles = dict(zip(dict.fromkeys(m.network for m in measured), _STYLES, strict=False))
    figure = Figure(figsize=(6.7, 4.9), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    panels = itertools.groupby(sorted(measured, key=_panel), key=_panel)
    for axes, letter, (_, group) in zip(grid.flat, "abcd", panels, strict=True):
        shown = list(group)
        axes.set(yscale="log", xlim=(0.5, len(shown[0].layers) + 0.5))
        axes.margins(y=0.1)
        title = f"{letter}  {'With' if shown[0].norms else 'Without'} norms, {_state(shown[0])}"
        for m in shown:
            look = styles[m.network] | {"lw": 1.2, "ms": 2.6, "markevery": 1 + len(m.layers) // 35}
            axes.plot(range(1, len(m.layers) + 1), m.gradient_norms, label=m.network, **look)
            if m.diverged is not None:
                title += f"\n    {m.network} diverged at step {m.diverged}"
        axes.set_title(title, loc="left")
        _mark_stages(axes, shown[0].stages)
    figure.supxlabel("layer, from image to logits")
    figure.supylabel("norm of the kernel's gradient")
    handles = grid[0, 0].get_lines()
    figure.legend(handles=handles, loc="outside upper center", ncols=3, handlelength=3.2)
    save_figure(figure, path, dpi=300)


def describe_gradients(measured: Sequence[Measurement], *, setting: str) -> str:
    """Writes the caption of the figure in Markdown: every statement follows from the numbers.

    Args:
      measured: see `plot_gradients`.
      setting: what a reader must know of the training, in words.
    """
    header = ("network", "norms", "state", "loss", "first stage", "last stage", "first / last")
    rows = []
    for m in sorted(measured, key=_panel):
        fate = "" if m.diverged is None else f", diverged at step {m.diverged}"
        numbers = [f"{value:.3g}" for value in (m.losses[-1], *m.ends)]
        rows.append([m.network, "with" if m.norms else "without", _state(m) + fate, *numbers])
    plain = [m for m in measured if m.norms and m.network.startswith("plain")]
    said = prose.paragraphs(
        "gradients",
        {"[table]": [markdown_table(header, rows, left=3)]},
        steps=max(m.step for m in measured),
        setting=setting,
        plain=plain[0].network,
        found=[f"{m.ends[2]:.3g} {_state(m)}" for m in plain],
    )
    return "\n\n".join(said)


def _panel(m: Measurement) -> tuple[int, bool]:
    """Panels are in the order of reading."""
    return m.step, not m.norms


def _mark_stages(axes: Axes, stages: npt.NDArray[np.int64]) -> None:
    """Shades every second stage and writes its number at the upper edge."""
    look: dict[str, Any] = {"color": "#555555", "fontsize": 7, "ha": "center", "va": "top"}
    for stage in range(1, stages.max() + 1):
        inside = 1 + np.flatnonzero(stages == stage)
        if stage % 2:
            axes.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color="black", alpha=0.05, lw=0)
        name = f"stage {stage}" if len(inside) > 0.15 * len(stages) else f"{stage}"
        axes.text(inside.mean(), 0.98, name, transform=axes.get_xaxis_transform(), **look)


def _state(m: Measurement) -> str:
    return f"after {m.step} steps" if m.step else "at initialisation"
