"""Choosing one picture [H, W, C] out of a file with more axes than rows, columns and channels."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxcells.data.picture import Refused
from jaxcells.files import Error

Plane = Mapping[str, int | str]

AXES = {
    "C": "channels",
    "T": "time points",
    "Z": "z-planes",
    "R": "positions",
    "P": "phases",
    "A": "angles",
    "E": "wavelengths",
    "H": "lifetimes",
    "L": "exposures",
    "M": "mosaic tiles",
    "V": "events",
    "I": "pages that do not say what they are",
}
"""Axes a user may choose on, by tifffile's letters. Any other, but X, Y and S, counts as "I"."""

OPTION = "--config.data.plane="


def parse_plane(text: str) -> dict[str, int | str]:
    """Parse `config.data.plane`, which says what to take of files with more than one plane.

    Args:
      text: comma-separated AXIS=INDEX, indices from 0, for example "T=0" or "Z=3,T=0". AXIS is
        a letter of `AXES`, or "series" for files that hold several separate images. "I=C"
        reads pages that do not say what they are as channels. Empty: nothing is chosen.

    Returns:
      Index by axis; "C" under "I" for "I=C".

    Raises:
      Error: the text is not of this form.
    """
    plane: dict[str, int | str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"([A-Z]|series)=([0-9]+|C)", item, re.IGNORECASE)
        axis, index = match.groups() if match else ("", "")
        axis = axis.lower() if len(axis) > 1 else axis.upper()
        known = axis in AXES or axis == "series"
        if not known or axis in plane or (index in "Cc" and axis != "I"):
            raise Error(
                f"{OPTION}{text}: {item!r} is not AXIS=INDEX with each axis named once; write for "
                f"example {OPTION}T=0 or {OPTION}Z=3,T=0 (axes: {', '.join(AXES)}, series; I=C "
                "reads pages as channels)"
            )
        plane[axis] = "C" if index in "Cc" else int(index)
    return plane


@dataclass(frozen=True)
class Selection:
    """Which parts of a series of pages make up the picture.

    Attributes:
      pages: indices of the pages to read, in the order of the channels.
      index: what to take of each axis of a page: one index, or all.
      order: the axes that then remain: rows, columns and, where there are any, samples.
      channels: of the whole picture.
    """

    pages: tuple[int, ...]
    index: tuple[int | slice, ...]
    order: tuple[int, ...]
    channels: int

    def take(self, page: np.ndarray) -> np.ndarray:
        """Return the part [H, W, samples] of one page's pixels."""
        part = page[self.index].transpose(self.order)
        return part if part.ndim == 3 else part[..., None]


def select(axes: str, shape: Sequence[int], page_ndim: int, plane: Plane) -> Selection:
    """Decide what to read from the names of the axes alone.

    The samples of each pixel are the channels where there are any, else the axis C, else, with
    "I=C", the pages.

    Args:
      axes: one letter for each entry of `shape`, the last `page_ndim` within a page.
      shape: sizes; none is 1 but those of Y and X.
      page_ndim: number of axes of one page.
      plane: what `parse_plane` returned; axes that the image has not are passed over, so that
        one choice serves a folder in which some images have a single plane.

    Raises:
      Refused: an axis besides rows, columns and channels is left, or an index is too large.
    """
    named = {letter: [k for k, axis in enumerate(axes) if axis == letter] for letter in AXES}
    samples = [k for k, axis in enumerate(axes) if axis == "S"]
    named["I"] = [k for k, axis in enumerate(axes) if axis not in {*"XYS", *AXES} - {"I"}]
    kept = samples
    if not kept and "C" not in plane:
        kept = named["C"]
    if not kept and plane.get("I") == "C":
        kept = named["I"]

    chosen: dict[int, int] = {}
    left: dict[str, int] = {}
    for axis, positions in named.items():
        positions = [k for k in positions if k not in kept]
        sizes = [shape[k] for k in positions]
        index = plane.get(axis)
        if not positions:
            continue
        if not isinstance(index, int):
            left[axis] = math.prod(sizes)
        elif index < math.prod(sizes):
            chosen |= zip(positions, map(int, np.unravel_index(index, sizes)), strict=True)
        else:
            count = math.prod(sizes)
            raise Refused(f"has {count} {AXES[axis]}: {axis}={index} is not in 0 to {count - 1}")
    if left:
        raise Refused(_choice(left, pages_may_be_channels=not kept))

    outer = shape[: len(shape) - page_ndim]
    ranges = [range(size) if k in kept else (chosen[k],) for k, size in enumerate(outer)]
    pages = [int(np.ravel_multi_index(at, outer)) if at else 0 for at in itertools.product(*ranges)]
    inner = range(len(outer), len(shape))
    remaining = [k for k in inner if k not in chosen]
    order = sorted(remaining, key=lambda k: {"Y": 0, "X": 1}.get(axes[k], 2))
    return Selection(
        pages=tuple(pages),
        index=tuple(chosen.get(k, slice(None)) for k in inner),
        order=tuple(remaining.index(k) for k in order),
        channels=math.prod(shape[k] for k in kept),
    )


def _choice(left: Mapping[str, int], *, pages_may_be_channels: bool) -> str:
    """Say which axes are left to choose on, and how to."""
    has = " and ".join(f"{size} {AXES[axis]} (axis {axis})" for axis, size in left.items())
    option = OPTION + ",".join(f"{axis}=0" for axis in left)
    what = "one" if len(left) == 1 else "one of each"
    also = f", or read them as channels with {OPTION}I=C" if pages_may_be_channels else ""
    return f"has {has}: choose {what} with {option} (indices begin at 0){also * ('I' in left)}"
