"""network.png: a network's stages, blocks and shortcuts, and one block beside its twin.

After figs. 2 and 3 of He et al. 2016, Deep residual learning. Lengths are centimetres on paper, and
y grows downwards; letters are as large as they say when the picture is printed at its own size.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Outline

from jaxcells.evaluation.figures import save_figure
from jaxcells.models.summary import Layer, totals

_FOLD_ABOVE = 18  # boxes in a column
_SMALL, _LARGE = 6.5, 7.5  # points

# A stage's panel and boxes: tints of Okabe and Ito 2008 on which black letters are read.
_TINTS = (
    ("#EDF4F9", "#BBD9EC"),
    ("#FDF4E5", "#F7D49B"),
    ("#E9F6F1", "#AEDDCB"),
    ("#FAF0F6", "#EBC3DA"),
)
_GREY = ("#F5F5F5", "#DADADA")
_INK = "#333333"
_IDENTITY: dict[str, Any] = {"color": "black", "lw": 0.9}
_PROJECTION: dict[str, Any] = _IDENTITY | {"linestyle": (0, (2.2, 1.4))}

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


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block: its stage, the layers of its branch, and whether its shortcut is a projection."""

    stage: int
    branch: tuple[Layer, ...]
    projection: bool

    @property
    def convolutions(self) -> list[Layer]:
        return [layer for layer in self.branch if layer.kind == "conv"]

    @property
    def preactivation(self) -> bool:
        return self.branch[0].kind == "norm"

    @property
    def color(self) -> str:
        return _TINTS[(self.stage - 1) % len(_TINTS)][1]

    @property
    def look(self) -> tuple[Any, ...]:
        """Equal for blocks that are drawn alike."""
        boxes = [(layer.kernel, layer.stride, layer.output) for layer in self.convolutions]
        return (self.stage, self.projection, *boxes)


def plot_network(
    layers: Sequence[Layer],
    path: str | Path,
    *,
    input_shape: Sequence[int],
    shortcuts: bool = True,
    title: str = "",
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
    parameters, multiply_adds = totals(layers)
    heading = f"{_amount(parameters)} parameters, {_amount(multiply_adds)} multiply-adds"
    _text(axes, 0, 0.2, " · ".join(filter(None, [title, heading])), size=_LARGE, ha="left")

    top = 0.65
    blocks = _blocks(layers)
    lowest = _draw_network(axes, top, layers, blocks, input_shape, shortcuts=shortcuts)

    left = blocks[-1].stage * (_PANEL + _GUTTER) + 0.3
    example = next(b for a, b in itertools.pairwise(blocks) if a.stage == b.stage)
    kind = "pre-activation unit" if example.preactivation else "residual block"
    titles = (kind, "its plain twin") if shortcuts else ("plain block", "its residual twin")
    y = _draw_twin(axes, left, top, titles[0], example, shortcut=shortcuts)
    _draw_twin(axes, left + _TWIN, top, titles[1], example, shortcut=not shortcuts)
    y = _draw_legend(axes, left, y + 0.5, example, shortcuts=shortcuts)

    width, height = left + 2 * _TWIN, max(lowest, y) + 0.05
    axes.set(xlim=(0, width), ylim=(height, 0))
    figure.set_size_inches(width / 2.54, height / 2.54)
    save_figure(figure, path, dpi=300)


def _blocks(layers: Iterable[Layer]) -> list[_Block]:
    """Every block of the network, those of a scanned stack one by one."""
    blocks = []
    for name, group in itertools.groupby(layers, key=lambda layer: layer.block):
        if match := re.match(r"layer(\d+)_", name):
            rows = list(group)
            branch = tuple(layer for layer in rows if not layer.in_shortcut)
            block = _Block(int(match[1]), branch, projection=len(branch) < len(rows))
            blocks += [block] * rows[0].repeats
    return blocks


def _folded(blocks: Sequence[_Block]) -> list[tuple[_Block, int]]:
    """Blocks to draw, and how many each stands for."""
    boxes = [
        sum(len(block.convolutions) for block in stage)
        for _, stage in itertools.groupby(blocks, key=lambda block: block.stage)
    ]
    if max(boxes) <= _FOLD_ABOVE:
        return [(block, 1) for block in blocks]
    runs = (list(run) for _, run in itertools.groupby(blocks, key=lambda block: block.look))
    return [(run[0], len(run)) for run in runs]


def _draw_network(
    axes: Axes,
    top: float,
    layers: Sequence[Layer],
    blocks: Sequence[_Block],
    input_shape: Sequence[int],
    *,
    shortcuts: bool,
) -> float:
    """Draws a panel for the stem, every stage and the head; returns the lowest y."""
    within = [index for index, layer in enumerate(layers) if layer.block]
    stem = [layer for layer in layers[: within[0]] if layer.kind != "norm"]
    head = layers[within[-1] + 1 :]

    _text(axes, _CENTER, top + 0.1, "image", size=_LARGE, weight="bold")
    _text(axes, _CENTER, top + 0.42, _by(input_shape))
    _wire(axes, [(_CENTER, top + 0.6), (_CENTER, top + 0.95)], arrow=True)
    top += 0.95
    y = lowest = _draw_end(axes, 0, top, "stem", _by(stem[0].output), stem)
    for stage, group in itertools.groupby(_folded(blocks), key=lambda pair: pair[0].stage):
        x = (stage - 1) * (_PANEL + _GUTTER)
        center = x + _CENTER
        if stage == 1:
            _wire(axes, [(center, y), (center, y + _GUTTER)], arrow=True)
            y += _GUTTER
        else:  # up through the gutter to the next column
            below, above, gutter = y + 0.2, top - 0.25, x - _GUTTER / 2
            before = center - _PANEL - _GUTTER
            bends = [(before, below), (gutter, below), (gutter, above), (center, above)]
            _wire(axes, [(before, y), *bends, (center, top)], arrow=True)
            lowest = max(lowest, below)
            y = top
        y = _draw_stage(axes, x, y, list(group), shortcuts=shortcuts)
    _wire(axes, [(center, y), (center, y + _GUTTER)], arrow=True)
    return max(lowest, _draw_end(axes, x, y + _GUTTER, "head", "", head))


def _draw_stage(
    axes: Axes, x: float, top: float, drawn: Sequence[tuple[_Block, int]], *, shortcuts: bool
) -> float:
    """Draws the panel of a stage and returns its bottom."""
    block = drawn[0][0]
    start = y = top + _draw_heading(
        axes, x, top, f"stage {block.stage}", _by(block.branch[-1].output)
    )
    center = x + _CENTER
    for block, count in drawn:
        fork = y
        y += _LEAD - _GAP
        for layer in block.convolutions:
            y = _box(axes, center, y + _GAP, _label(layer), block.color)
        y += _LEAD + _SUM
        if shortcuts:
            style = _PROJECTION if block.projection else _IDENTITY
            _shortcut(axes, center, fork, y, _BOX_WIDTH / 2 + _REACH, **style)
        if count > 1:
            _stack(axes, x, fork - 0.05, y + 0.17)
            _text(axes, center - 0.15, y, f"×{count}", weight="bold", ha="right")
            y += 0.1
        y += _SUM + 0.1
    _wire(axes, [(center, start), (center, y + 0.08)])
    panel = _TINTS[(block.stage - 1) % len(_TINTS)][0]
    _rectangle(axes, x, top, _PANEL, y + 0.08 - top, panel, radius=0.12, zorder=0, lw=0)
    return y + 0.08


def _draw_end(
    axes: Axes, x: float, top: float, name: str, size: str, layers: Sequence[Layer]
) -> float:
    """Draws the panel of the stem or the head and returns its bottom."""
    panel, fill = _GREY
    start = y = top + _draw_heading(axes, x, top, name, size)
    for layer in layers:
        y = _box(axes, x + _CENTER, y + _GAP, _label(layer), fill)
    _wire(axes, [(x + _CENTER, start), (x + _CENTER, y - _BOX_HEIGHT / 2)])
    _rectangle(axes, x, top, _PANEL, y + _MARGIN - top, panel, radius=0.12, zorder=0, lw=0)
    return y + _MARGIN


def _draw_heading(axes: Axes, x: float, top: float, name: str, size: str) -> float:
    """Writes the name of a panel and the size of its output; returns the height of both."""
    _text(axes, x + _CENTER, top + 0.26, name, size=_LARGE, weight="bold")
    _text(axes, x + _CENTER, top + 0.58, size)
    return 0.8 if size else 0.45


def _draw_twin(
    axes: Axes, x: float, top: float, title: str, block: _Block, *, shortcut: bool
) -> float:
    """Draws a block with all its layers, with or without its shortcut; returns the lowest y."""
    width, center = 1.95, x + 1.2
    _text(axes, center, top + 0.1, title, size=_LARGE, weight="bold")
    _text(axes, center, top + 0.55, "$x$", size=_LARGE)
    start = top + 0.72
    fork = y = start + 0.25
    for text in _operations(block):
        y = _box(axes, center, y + _LEAD, text, block.color if "conv" in text else "white", width)
    y += _LEAD + _SUM
    _text(axes, center - 0.2, y, "$F(x)+x$" if shortcut else "$F(x)$", ha="right")
    if shortcut:
        _shortcut(axes, center, fork, y, width / 2 + 0.35, **_IDENTITY)
        _text(axes, center + width / 2 + 0.55, (fork + y) / 2, "identity", rotation=90)
    y += _SUM
    if not block.preactivation:
        y = _box(axes, center, y + _LEAD, "relu", "white", width)
    _wire(axes, [(center, start), (center, y + 0.4)], arrow=True)
    return y + 0.4


def _operations(block: _Block) -> Iterator[str]:
    """What a branch does, in order."""
    for layer in block.branch:
        if layer.kind == "conv":
            yield _label(layer, "conv")
        else:
            yield "batch norm"
            if block.preactivation or layer is not block.branch[-1]:
                yield "relu"


def _draw_legend(axes: Axes, x: float, y: float, block: _Block, *, shortcuts: bool) -> float:
    """Explains lines and boxes of a network of such blocks; returns the lowest y."""
    before, after = ("norm, relu, ", "") if block.preactivation else ("", ", norm")
    if shortcuts:
        projection = f"projection: {before}1×1 conv{after}"
        for text, style in (("identity shortcut", _IDENTITY), (projection, _PROJECTION)):
            _wire(axes, [(x, y), (x + 1.3, y)], **style)
            _text(axes, x + 1.5, y, text, ha="left")
            y += 0.4
    _box(axes, x + 0.65, y - _BOX_HEIGHT / 2, "k×k, C, /s", _GREY[1], width=1.3)
    _text(axes, x + 1.5, y, "k×k convolution, C channels, stride s,", ha="left")
    order = "preceded" if block.preactivation else "followed"
    _text(axes, x + 1.5, y + 0.32, f"{order} by norm and relu", ha="left")
    return y + 0.5


def _box(
    axes: Axes, center: float, top: float, text: str, color: str, width: float = _BOX_WIDTH
) -> float:
    """Draws a box and returns its bottom."""
    left = center - width / 2
    _rectangle(axes, left, top, width, _BOX_HEIGHT, color, radius=0.06, zorder=3, lw=0.6)
    _text(axes, center, top + _BOX_HEIGHT / 2, text)
    return top + _BOX_HEIGHT


def _stack(axes: Axes, x: float, top: float, bottom: float) -> None:
    """Draws sheets of paper under a block that stands for many."""
    for offset in (0.1, 0.05, 0):
        place = x + 0.05 + offset, top + offset, _PANEL - 0.18, bottom - top
        _rectangle(axes, *place, "white", radius=0.08, zorder=1, lw=0.4)


def _shortcut(axes: Axes, x: float, fork: float, y: float, reach: float, **style: Any) -> None:
    """Draws a line from the fork around a branch to the sum at (x, y)."""
    side = x + reach
    _wire(axes, [(x, fork), (side, fork), (side, y), (x + _SUM, y)], arrow=True, **style)
    axes.add_patch(Circle((x, y), _SUM, facecolor="white", edgecolor=_INK, lw=0.7, zorder=3))
    for dx, dy in ((0.6 * _SUM, 0), (0, 0.6 * _SUM)):
        axes.plot([x - dx, x + dx], [y - dy, y + dy], color=_INK, lw=0.7, zorder=4)


def _rectangle(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    color: str,
    *,
    radius: float,
    **style: Any,
) -> None:
    corners = f"round,pad=0,rounding_size={radius}"
    style |= {"boxstyle": corners, "facecolor": color, "edgecolor": _INK}
    axes.add_patch(FancyBboxPatch((x, y), width, height, **style))


def _wire(
    axes: Axes, points: Sequence[tuple[float, float]], *, arrow: bool = False, **style: Any
) -> None:
    """Draws a line from point to point with rounded corners."""
    vertices, codes = [points[0]], [Outline.MOVETO]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        vertices += [_toward(corner, before), corner, _toward(corner, after)]
        codes += [Outline.LINETO, Outline.CURVE3, Outline.CURVE3]
    outline = Outline([*vertices, points[-1]], [*codes, Outline.LINETO])
    head = "-|>,head_length=0.45,head_width=0.18" if arrow else "-"
    look: dict[str, Any] = {"color": _INK, "lw": 0.7, "zorder": 2, "joinstyle": "miter"} | style
    axes.add_patch(FancyArrowPatch(path=outline, arrowstyle=head, mutation_scale=7, **look))


def _toward(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    """Returns the point 1 mm from `start` on the way to `end`, or half-way if that is nearer."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    share = min(0.5, 0.1 / max(abs(dx), abs(dy)))  # lines run along one axis
    return start[0] + share * dx, start[1] + share * dy


def _text(axes: Axes, x: float, y: float, text: str, *, size: float = _SMALL, **style: Any) -> None:
    look: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": 5} | style
    axes.text(x, y, text, fontsize=size, **look)


def _label(layer: Layer, word: str = "") -> str:
    """What stands in the box of a layer."""
    step = f", /{layer.stride}" if layer.stride > 1 else ""
    if layer.kind == "conv":
        return f"{layer.kernel}×{layer.kernel} {word}".strip() + f", {layer.output[-1]}{step}"
    names = {
        "max pool": f"max pool{step}",
        "norm": "norm, relu",
        "mean": "global mean",
        "dense": f"dense, {layer.output[-1]}",
    }
    return names[layer.kind]


def _by(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _amount(number: int) -> str:
    """Three digits and a unit: 21.8 M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return str(number)
