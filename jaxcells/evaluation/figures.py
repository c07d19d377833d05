"""Curves, confusion.png and sheets of example crops (matplotlib, no display needed)."""

import itertools
import operator
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from jaxcells.text import natural, shortened_apart

# Okabe and Ito 2008, told apart with every common colour vision: blue, vermillion, green, purple,
# orange, sky blue, black; without the yellow, which is lost on white.
COLORS = tuple(to_hex(matplotlib.color_sequences["okabe_ito"][n]) for n in (5, 6, 3, 7, 1, 2, 0))

Records = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl

PAGE: Any = {  # how curves look, whose letters are in points at the width of a page
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.labelsize": "medium",
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
_STYLE: dict[str, dict[str, Any]] = {  # the lines differ in grey too
    "train": {"color": COLORS[0], "linestyle": "--", "label": "train"},
    "val": {"color": COLORS[1], "linestyle": "-", "label": "validation"},
}
_WORTH_A_LOGARITHM = 4  # ratio of the largest to the smallest value
_REFERENCES = {"chance": ("chance", ":"), "brightness": ("brightness alone, test", "-.")}
_DARK = 128  # 8-bit images are, if 99.5 % of their pixels are below this
# Class names come from folders: "$" and "_" in them are letters, not formulas.
_LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}
# Colours of the channels, by their number; magenta and green, as red and green look alike to many.
_CHANNEL_COLORS = {1: [[1, 1, 1]], 2: [[1, 0, 1], [0, 1, 0]], 3: [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}


@matplotlib.rc_context(PAGE)
def draw_curves(
    records: Records, references: Mapping[str, float], *, best_step: int, stacked: bool = False
) -> Figure:
    """Draws loss and accuracy against the epoch, for training and validation.

    The loss has a logarithmic axis where it asks for one.

    Args:
      records: the lines of metrics.jsonl, each with step, epoch, split ("train" or "val"), loss
        and accuracy. Several of one split in one epoch are drawn as their mean; of several with
        the same step the last counts, as after a resumed run.
      references: `chance` and `brightness`, see `draw_references`.
      best_step: the step of the chosen checkpoint, marked on the validation curve.
      stacked: one panel above the other, for a narrow page.
    """
    curves = {split: epoch_curve(records, split) for split in _STYLE}
    figure = Figure(figsize=(4.6, 5.6) if stacked else (9, 3.6), layout="constrained")
    panels = figure.subplots(*((2, 1) if stacked else (1, 2)))
    for axes, key in zip(panels, ("loss", "accuracy"), strict=True):
        for split, curve in curves.items():
            if curve["epoch"].size:
                marker = "o" if curve["epoch"].size < 40 else None
                axes.plot(curve["epoch"], curve[key], marker=marker, ms=3, lw=1.6, **_STYLE[split])
        for index in np.flatnonzero(curves["val"]["step"] == best_step):
            epoch, value = curves["val"]["epoch"][index], curves["val"][key][index]
            label = f"best: epoch {epoch:g} ({value:.3f})"
            axes.plot(epoch, value, "*", ms=13, mec="white", color="black", label=label, zorder=3)
        axes.set(title=key.capitalize(), xlabel="epoch", ylabel="nats" if key == "loss" else None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    draw_references(panels[1], references)
    for axes in panels:
        axes.legend(frameon=True, framealpha=0.9, edgecolor="none")  # lines may run below it
    log_axis_if_wide(panels[0].yaxis, [*curves["train"]["loss"], *curves["val"]["loss"]])
    return figure


def draw_references(axes: Axes, references: Mapping[str, float]) -> None:
    """Draws what an accuracy must beat as horizontal lines that explain themselves.

    Args:
      axes: whose y axis is an accuracy.
      references: "chance", the accuracy of guessing, such as 1 / K; and "brightness", that of
        brightness and contrast alone on the test split.
    """
    for key, value in references.items():
        name, linestyle = _REFERENCES[key]
        label = f"{name} ({value:.3f})"
        axes.axhline(value, color="#777777", lw=1, ls=linestyle, label=label)


def log_axis_if_wide(axis: XAxis | YAxis, values: Sequence[float]) -> None:
    """Makes an axis logarithmic, with plain numbers, if its values spread over a factor of 4."""
    finite = [value for value in values if np.isfinite(value)]
    low, high = min(finite, default=0), max(finite, default=0)
    if low <= 0 or high < _WORTH_A_LOGARITHM * low:
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    # The fewer numbers in a decade the more decades there are.
    subs = (1, 2, 3, 5) if high < 20 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def plot_confusion(
    counts: npt.ArrayLike, class_names: Sequence[str], path: Path, *, title: str, footer: str = ""
) -> None:
    """Draws a confusion matrix as counts and shares of the row, numbers in names in their order.

    Args:
      counts: [K, K], rows true, columns predicted.
      class_names: the position is the label.
      path: where the PNG goes.
      title: written above the matrix, such as the split with its crops and fields.
      footer: written below it: intervals, and what a reader of the counts must know.
    """
    order = sorted(range(len(class_names)), key=lambda label: natural(class_names[label]))
    confusion = np.asarray(counts)[np.ix_(order, order)]
    num_classes = len(class_names)
    support = confusion.sum(axis=1, keepdims=True)
    share = np.divide(confusion, support, out=np.zeros(confusion.shape), where=support > 0)

    cell = float(np.clip(9 / num_classes, 0.5, 1.1))  # inches
    side = cell * num_classes
    figure = Figure(figsize=(side + 2.8, side + 2.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = float(np.clip(11 * cell, 6.5, 10))
    style: dict[str, Any] = {"fontsize": size, "ha": "center", "va": "center", "in_layout": False}
    for (row, column), count in np.ndenumerate(confusion):
        text, color = f"{count}\n{_percent(share[row, column])}", "black"
        if not count:
            text, color = "0" if support[row, 0] else "–", "#888888"
        elif share[row, column] > 0.5:
            color = "white"
        axes.text(column, row, text, color=color, **style)

    names = shortened_apart([class_names[label] for label in order], 28)
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(num_classes), names, **_LITERAL, **slanted)
    axes.set_yticks(range(num_classes), names, **_LITERAL)
    axes.tick_params(length=0)
    axes.set(xlabel="predicted", ylabel="true")
    columns = int(13 * figure.get_figwidth())  # letters that fit
    axes.set_title(textwrap.fill(title, columns), **_LITERAL)
    figure.supxlabel(textwrap.fill(footer, columns), fontsize=8, color="#555555", **_LITERAL)
    save_figure(figure, path)


def plot_crops_sheet(
    crops: Mapping[str, Sequence[npt.NDArray[Any]]], path: Path, *, title: str = ""
) -> None:
    """Draws example crops, one row per class.

    8-bit crops are shown as they are, or brightened where they are dark. Others are scaled per
    channel from their 0.5 to their 99.5 percentile. Both count over all crops together: a class
    that is darker looks darker. The title says what was done. Two channels are drawn in magenta and
    green; of more than three the first three as red, green and blue.

    Args:
      crops: {class name: crops [H, W, C]}, of one dtype and shape.
      path: where the PNG goes.
      title: written above the sheet.
    """
    images, how = displayed(np.stack([crop for row in crops.values() for crop in row]))
    shown = iter(images)
    height, width = next(iter(crops.values()))[0].shape[:2]
    gap = max(2, width // 30)
    shape = (len(crops), height + gap, max(map(len, crops.values())), width + gap, 3)
    cells = np.full(shape, 255, np.uint8)
    for row, of_class in enumerate(crops.values()):
        for column in range(len(of_class)):
            cells[row, :height, column, :width] = next(shown)
    sheet = cells.reshape(shape[0] * shape[1], -1, 3)[:-gap, :-gap]

    scale = 1.2 / width  # inches per pixel
    inches = sheet.shape[1] * scale + 2.2, sheet.shape[0] * scale + 0.5
    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet)
    rows = np.arange(len(crops)) * (height + gap) + height / 2
    names = shortened_apart(list(crops), 60)
    axes.set_yticks(rows, [textwrap.fill(name, 22) for name in names], **_LITERAL)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(", ".join(filter(None, (title, how))), **_LITERAL)
    save_figure(figure, path)


def plot_examples(
    images: npt.NDArray[Any], labels: npt.NDArray[Any], class_names: Sequence[str], path: Path
) -> None:
    """Draws eight crops of every class, taken evenly over a split: what the network gets to see.

    Args:
      images: [N, H, W, C].
      labels: int [N].
      class_names: the position is the label.
      path: where the PNG goes.
    """
    rows = {}
    for label, name in sorted(enumerate(class_names), key=lambda pair: natural(pair[1])):
        numbers = np.flatnonzero(labels == label)
        chosen = np.linspace(0, len(numbers) - 1, min(8, len(numbers))).astype(int)
        rows[name] = [images[number] for number in numbers[chosen]]
    plot_crops_sheet(rows, path, title="training crops")


def save_figure(figure: Figure, path: Path, *, dpi: int = 150) -> None:
    """Writes a PNG that is either whole or not there; print wants a `dpi` of 300."""
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.1)
    os.replace(partial, path)


def epoch_curve(
    records: Records, split: str, keys: Sequence[str] = ("loss", "accuracy")
) -> dict[str, npt.NDArray[np.float64]]:
    """Columns epoch, step and `keys` of one split of metrics.jsonl, one row per epoch."""
    by_step = {record["step"]: record for record in records if record["split"] == split}
    in_order = [by_step[step] for step in sorted(by_step)]
    epochs = [list(same) for _, same in itertools.groupby(in_order, operator.itemgetter("epoch"))]
    return {
        "epoch": np.array([rows[-1]["epoch"] for rows in epochs], float),
        "step": np.array([rows[-1]["step"] for rows in epochs], float),
        **{k: np.array([np.mean([r[k] for r in rows]) for rows in epochs], float) for k in keys},
    }


def displayed(crops: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], str]:
    """Crops [N, H, W, C] of any dtype as [N, H, W, 3] uint8, all on one scale; and how."""
    if crops.dtype != np.uint8:
        low, high = np.percentile(crops, [0.5, 99.5], axis=(0, 1, 2))
        how = "each channel scaled for display"
    else:  # channels together, or the noise of an empty one would be raised
        low, high, how = np.array(0), np.array(255), ""
        if 0 < (bright := np.percentile(crops, 99.5)) < _DARK:
            high, how = bright, f"brightened {255 / bright:.1f} times for display"
    share = np.clip((crops - low) / np.where(high > low, high - low, 1), 0, 1)
    colors = np.array(_CHANNEL_COLORS[min(crops.shape[-1], 3)])
    return np.rint(255 * share[..., :3] @ colors).astype(np.uint8), how


def _percent(share: float) -> str:
    if 0.99 < share < 1:
        return ">99 %"
    return "<1 %" if share < 0.01 else f"{100 * share:.0f} %"
