"""network.png: a network's stages, blocks and shortcuts, and one block beside its twin.

After figs. 2 and 3 of He et al. 2016, Deep residual learning. Lengths are centimetres on paper, and
y grows downwards; letters are as large as they say when the picture is printed at its own size.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Outline

from jaxcells.evaluation.figures import save_figure
from jaxcells.models.summary import Layer, totals
from jaxcells.text import amount, by

_FOLD_ABOVE = 18  # boxes in a column
_SMALL, _LARGE = 6.5, 7.5  # points

# Tints of Okabe and Ito 2008 on which black letters are read, by stage; grey for stem and head.
_PANEL_COLORS = ("#F5F5F5", "#EDF4F9", "#FDF4E5", "#E9F6F1", "#FAF0F6")
_BOX_COLORS = ("#DADADA", "#BBD9EC", "#F7D49B", "#AEDDCB", "#EBC3DA")
_INK = "#333333"
_LINES: dict[str, Any] = {"identity": "-", "projection": (0, (2.2, 1.4))}  # of shortcuts

_TOP = 0.65  # of all that lies below the heading
_BOX_WIDTH, _BOX_HEIGHT = 1.65, 0.37
_GAP = 0.13  # between the boxes of a block
_LEAD = 0.17  # between a fork, a box and a sum
_SUM = 0.09  # radius
_REACH = 0.23  # of a shortcut beyond the boxes
_MARGIN = 0.16  # of a panel
_PANEL = 2 * _MARGIN + _BOX_WIDTH + _REACH
_CENTER = _MARGIN + _BOX_WIDTH / 2  # of the boxes in a panel
_GUTTER = 0.44  # between panels
_TWIN = 3.07  # room for a block with all its layers

_XY = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block as it is drawn: equal ones look alike.

    Attributes:
      stage: 1 for the first.
      output: shape of what it gives, `(H, W, C)`.
      shortcut: "identity", "projection" or, of a plain network, "none".
      boxes: what stands in those of its convolutions.
      operations: all that its branch does, in order, and the relu that may follow the sum.
    """

    stage: int
    output: tuple[int, ...]
    shortcut: str
    boxes: tuple[str, ...]
    operations: tuple[str, ...]

    @property
    def preactivation(self) -> bool:
        return self.operations[0] == "batch norm"


def plot_network(
    layers: Sequence[Layer], path: Path, *, input_shape: Sequence[int], shortcuts: bool, title: str
) -> None:
    """Draws a residual or plain network, 17 cm wide if it has four stages: a printed page.

    Every column is a stage, every box a convolution. Identity shortcuts are solid, projections
    dashed. Where a column would be too high, equal blocks are drawn once, with their number. To the
    right stands one block with all its layers, and the same block with the shortcut taken away; for
    a plain network, added.

    Args:
      layers: rows of `summarize`, of a network with norms.
      path: where the PNG goes.
      input_shape: `(H, W, C)` of the images.
      shortcuts: False for a plain network.
      title: stands before the totals, above the picture.
    """
    figure = Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    parameters, multiply_adds = map(amount, totals(layers))
    heading = f"{title} · {parameters} parameters, {multiply_adds} multiply-adds"
    _text(axes, 0, 0.2, heading, size=_LARGE, ha="left")

    _text(axes, _CENTER, _TOP + 0.1, "image", size=_LARGE, weight="bold")
    _text(axes, _CENTER, _TOP + 0.42, _size(input_shape))
    blocks = _blocks(layers, shortcuts=shortcuts)
    lowest = _draw_network(axes, layers, blocks)

    left = blocks[-1].stage * (_PANEL + _GUTTER) + 0.3
    example = next(b for a, b in itertools.pairwise(blocks) if a.stage == b.stage)
    kind = "pre-activation unit" if example.preactivation else "residual block"
    titles = (kind, "its plain twin") if shortcuts else ("plain block", "its residual twin")
    _draw_twin(axes, left, titles[0], example, shortcut=shortcuts)
    y = _draw_twin(axes, left + _TWIN, titles[1], example, shortcut=not shortcuts)
    y = _draw_legend(axes, left, y + 0.5, example, shortcuts=shortcuts)

    width, height = left + 2 * _TWIN, max(lowest, y) + 0.05
    axes.set(xlim=(0, width), ylim=(height, 0))
    figure.set_size_inches(width / 2.54, height / 2.54)
    save_figure(figure, path, dpi=300)


def _blocks(layers: Iterable[Layer], *, shortcuts: bool) -> list[_Block]:
    """Every block of the network, those of a scanned stack one by one."""
    blocks = []
    for name, group in itertools.groupby(layers, key=lambda layer: layer.block):
        if match := re.match(r"layer(\d+)_", name):
            rows = list(group)
            branch = [layer for layer in rows if not layer.in_shortcut]
            shortcut = "identity" if len(branch) == len(rows) else "projection"
            block = _Block(
                stage=int(match[1]),
                output=branch[-1].output,
                shortcut=shortcut if shortcuts else "none",
                boxes=tuple(_label(layer) for layer in branch if layer.kind == "conv"),
                operations=tuple(itertools.chain(*map(_operations, branch))),
            )
            blocks += [block] * rows[0].repeats
    return blocks


def _operations(layer: Layer) -> tuple[str, ...]:
    return (_label(layer, " conv"),) if layer.kind == "conv" else ("batch norm", "relu")


def _label(layer: Layer, conv: str = "") -> str:
    """What stands in the box of a layer; `conv` follows the kernel of a convolution."""
    conv = f"{layer.kernel}×{layer.kernel}{conv}"
    label = {"conv": conv, "norm": "norm, relu", "mean": "global mean"}.get(layer.kind, layer.kind)
    channels = f", {layer.output[-1]}" if layer.kind in ("conv", "dense") else ""
    return label + channels + (f", /{layer.stride}" if layer.stride > 1 else "")


def _folded(blocks: Sequence[_Block]) -> list[tuple[_Block, int]]:
    """Blocks to draw, and how many each stands for."""
    boxes = collections.Counter(block.stage for block in blocks for _ in block.boxes)
    if max(boxes.values()) <= _FOLD_ABOVE:
        return [(block, 1) for block in blocks]
    return [(block, len(list(same))) for block, same in itertools.groupby(blocks)]


def _draw_network(axes: Axes, layers: Sequence[Layer], blocks: Sequence[_Block]) -> float:
    """Draws a panel for the stem, every stage and the head; returns the lowest y."""
    within = [index for index, layer in enumerate(layers) if layer.block]
    stem = [layer for layer in layers[: within[0]] if layer.kind != "norm"]
    top = _TOP + 0.95
    _wire(axes, [(_CENTER, _TOP + 0.6), (_CENTER, top)], arrow=True)
    y = lowest = _draw_end(axes, 0, top, "stem", stem)
    for stage, group in itertools.groupby(_folded(blocks), key=lambda pair: pair[0].stage):
        x = (stage - 1) * (_PANEL + _GUTTER)
        center = x + _CENTER
        way = [(center, y), (center, y + _GUTTER)]
        if stage > 1:  # up through the gutter to the next column
            before, gutter = center - _PANEL - _GUTTER, x - _GUTTER / 2
            below, above = y + 0.2, top - 0.25
            way = [(before, y), (before, below), (gutter, below), (gutter, above)]
            way += [(center, above), (center, top)]
        _wire(axes, way, arrow=True)
        y = _draw_stage(axes, x, way[-1][1], list(group))
        lowest = max(lowest, y + 0.2)
    _wire(axes, [(center, y), (center, y + _GUTTER)], arrow=True)
    return max(lowest, _draw_end(axes, x, y + _GUTTER, "head", layers[within[-1] + 1 :]))


def _draw_stage(axes: Axes, x: float, top: float, drawn: Sequence[tuple[_Block, int]]) -> float:
    """Draws the panel of a stage and returns its bottom."""
    center = x + _CENTER
    y = start = top + 0.8
    for block, count in drawn:
        fork = y
        y += _LEAD - _GAP
        for text in block.boxes:
            y = _box(axes, center, y + _GAP, text, _BOX_COLORS[block.stage], _BOX_WIDTH)
        y += _LEAD + _SUM
        if block.shortcut != "none":
            _shortcut(axes, center, fork, y, _BOX_WIDTH / 2 + _REACH, block.shortcut)
        if count > 1:  # a frame around a block that stands for many
            at, size = (x + 0.05, fork - 0.05), (_PANEL - 0.1, y + 0.22 - fork)
            _rectangle(axes, at, size, "white", radius=0.08, zorder=1, lw=0.4)
            _text(axes, center - 0.15, y, f"×{count}", weight="bold", ha="right")
        y += _SUM + 0.1
    bottom = y + 0.08
    _wire(axes, [(center, start), (center, bottom)])
    _draw_panel(axes, (x, top), bottom, block.stage, f"stage {block.stage}", _size(block.output))
    return bottom


def _draw_end(axes: Axes, x: float, top: float, name: str, layers: Sequence[Layer]) -> float:
    """Draws the panel of the stem or the head and returns its bottom."""
    output = layers[0].output if name == "stem" else ()
    y = start = top + (0.8 if output else 0.45)
    for layer in layers:
        y = _box(axes, x + _CENTER, y + _GAP, _label(layer), _BOX_COLORS[0], _BOX_WIDTH)
    _wire(axes, [(x + _CENTER, start), (x + _CENTER, y - _BOX_HEIGHT / 2)])
    _draw_panel(axes, (x, top), y + _MARGIN, 0, name, _size(output))
    return y + _MARGIN


def _draw_panel(axes: Axes, at: _XY, bottom: float, stage: int, name: str, size: str) -> None:
    """Draws what lies under the boxes of a stage, with its name and the size of its output."""
    x, top = at
    panel = (_PANEL, bottom - top)
    _rectangle(axes, at, panel, _PANEL_COLORS[stage], radius=0.12, zorder=0, lw=0)
    _text(axes, x + _CENTER, top + 0.26, name, size=_LARGE, weight="bold")
    _text(axes, x + _CENTER, top + 0.58, size)


def _draw_twin(axes: Axes, x: float, title: str, block: _Block, *, shortcut: bool) -> float:
    """Draws a block with all its layers, with or without its shortcut; returns the lowest y."""
    width, center = 1.95, x + 1.2
    _text(axes, center, _TOP + 0.1, title, size=_LARGE, weight="bold")
    _text(axes, center, _TOP + 0.55, "$x$", size=_LARGE)
    start = _TOP + 0.72
    fork = y = start + 0.25
    inside = block.operations if block.preactivation else block.operations[:-1]
    for text in inside:
        color = _BOX_COLORS[block.stage] if "conv" in text else "white"
        y = _box(axes, center, y + _LEAD, text, color, width)
    y += _LEAD + _SUM
    _text(axes, center - 0.2, y, "$F(x)+x$" if shortcut else "$F(x)$", ha="right")
    if shortcut:
        _shortcut(axes, center, fork, y, width / 2 + 0.35, "identity")
        _text(axes, center + width / 2 + 0.55, (fork + y) / 2, "identity", rotation=90)
    y += _SUM
    for text in block.operations[len(inside) :]:
        y = _box(axes, center, y + _LEAD, text, "white", width)
    _wire(axes, [(center, start), (center, y + 0.4)], arrow=True)
    return y + 0.4


def _draw_legend(axes: Axes, x: float, y: float, block: _Block, *, shortcuts: bool) -> float:
    """Explains lines and boxes of a network of such blocks; returns the lowest y."""
    if shortcuts:
        steps = "norm, relu, 1×1 conv" if block.preactivation else "1×1 conv, norm"
        texts = ("identity shortcut", f"projection: {steps}")
        for text, line in zip(texts, _LINES.values(), strict=True):
            _wire(axes, [(x, y), (x + 1.3, y)], color="black", lw=0.9, linestyle=line)
            _text(axes, x + 1.5, y, text, ha="left")
            y += 0.4
    _box(axes, x + 0.65, y - _BOX_HEIGHT / 2, "k×k, C, /s", _BOX_COLORS[0], 1.3)
    order = "preceded" if block.preactivation else "followed"
    meaning = f"k×k convolution, C channels, stride s,\n{order} by norm and relu"
    _text(axes, x + 1.5, y - 0.12, meaning, ha="left", va="top")
    return y + 0.5


def _box(axes: Axes, center: float, top: float, text: str, color: str, width: float) -> float:
    """Draws a box and returns its bottom."""
    at, size = (center - width / 2, top), (width, _BOX_HEIGHT)
    _rectangle(axes, at, size, color, radius=0.06, zorder=3, lw=0.6)
    _text(axes, center, top + _BOX_HEIGHT / 2, text)
    return top + _BOX_HEIGHT


def _shortcut(axes: Axes, x: float, fork: float, y: float, reach: float, kind: str) -> None:
    """Draws a line from the fork around a branch to the sum at (x, y)."""
    side = x + reach
    way = [(x, fork), (side, fork), (side, y), (x + _SUM, y)]
    _wire(axes, way, arrow=True, color="black", lw=0.9, linestyle=_LINES[kind])
    axes.add_patch(Circle((x, y), _SUM, facecolor="white", edgecolor=_INK, lw=0.7, zorder=3))
    axes.plot(x, y, "+", color=_INK, ms=3, mew=0.7, zorder=4)


def _rectangle(axes: Axes, at: _XY, size: _XY, color: str, radius: float, **style: Any) -> None:
    outline = f"round,pad=0,rounding_size={radius}"
    axes.add_patch(FancyBboxPatch(at, *size, boxstyle=outline, fc=color, ec=_INK, **style))


def _wire(axes: Axes, points: Sequence[_XY], *, arrow: bool = False, **style: Any) -> None:
    """Draws a line from point to point."""
    head = "-|>,head_length=0.45,head_width=0.18" if arrow else "-"
    look: dict[str, Any] = {"color": _INK, "lw": 0.7, "zorder": 2, "joinstyle": "round"} | style
    way = FancyArrowPatch(path=Outline(points), arrowstyle=head, mutation_scale=7, **look)
    axes.add_patch(way)


def _text(axes: Axes, x: float, y: float, text: str, *, size: float = _SMALL, **style: Any) -> None:
    look: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": 5} | style
    axes.text(x, y, text, fontsize=size, **look)


def _size(shape: Sequence[int]) -> str:
    return by(shape).replace("x", "×")
