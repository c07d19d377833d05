"""Choosing one picture [H, W, C] out of a file with more axes than rows, columns and channels."""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxcells.data.picture import Refused
from jaxcells.files import Error
from jaxcells.text import some

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
    "I": "pages that do not say what they are",
}
"""Axes a user may choose on, by tifffile's letters. Any other, but X, Y and S, counts as "I"."""

_PROJECTIONS = {"max": "maximum", "mean": "mean"}
_ITEM = re.compile(
    f"(series)=([0-9]+)|(I)=(C)|([{''.join(AXES)}])=([0-9]+|max|mean)", re.IGNORECASE
)


def parse_plane(text: str) -> dict[str, int | str]:
    """Parse `data.plane`, which says what to take of files with more than one plane.

    Args:
      text: comma-separated AXIS=INDEX, indices from 0, for example "T=0" or "Z=3,T=0". AXIS is
        a letter of `AXES`, or "series" for files that hold several separate images. "Z=max" and
        "Z=mean" take the maximum or the mean over all planes of an axis; of several axes both
        may not be taken, for the order would matter. "I=C" reads pages that do not say what they
        are as channels. Empty: nothing is chosen.

    Returns:
      Index, "max" or "mean" by axis; "c" under "I" for "I=C".

    Raises:
      Error: the text is not of this form.
    """
    plane: dict[str, int | str] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        match = _ITEM.fullmatch(item)
        axis, value = filter(None, match.groups()) if match else ("", "")
        axis = axis.lower() if len(axis) > 1 else axis.upper()
        if not match or axis in plane:
            raise Error(
                f"data.plane={text}: {item!r} is not AXIS=INDEX, AXIS=max or AXIS=mean with each "
                "axis named once; write for example data.plane=T=0, data.plane=Z=max or "
                f"data.plane=Z=3,T=0 (axes: {', '.join(AXES)}, series; I=C reads pages as channels)"
            )
        plane[axis] = int(value) if value.isdecimal() else value.lower()
    if _PROJECTIONS.keys() <= set(plane.values()):
        raise Error(f"data.plane={text}: use either max or mean, for the order would matter")
    return plane


def choose_series(images: Sequence[str], plane: Plane) -> int:
    """Return which of the separate images of a file to read.

    Args:
      images: how each is described.
      plane: what `parse_plane` returned.

    Raises:
      Refused: there is none, or there are several and "series" names none of them.
    """
    if len(images) == 1:
        return 0
    if not images:
        raise Refused("has no image in it")
    index = int(plane.get("series", len(images)))
    if index >= len(images):
        raise Refused(
            f"has {len(images)} separate images ({some(images, 6)}): choose one with "
            f"data.plane=series=0 (0 to {len(images) - 1}), or export each to use them all"
        )
    return index


@dataclass(frozen=True)
class Selection:
    """Which parts of a series of pages make up the picture.

    Attributes:
      pages: indices of the pages to read: a group for each channel that has pages of its own, else
        one group. What a group has beyond one page is projected.
      shape: [H, W, C] of the picture.
      index: what to take of each axis of a page: one index, or all.
      order: the axes that then remain: those to project, rows, columns and, where there are any,
        samples.
      projection: "max", "mean" or "".
      notes: what was projected.
    """

    pages: tuple[tuple[int, ...], ...]
    shape: tuple[int, int, int]
    index: tuple[int | slice, ...]
    order: tuple[int, ...]
    projection: str
    notes: tuple[str, ...]

    def assemble(self, read: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return the picture [H, W, C]; planes that are projected are read one by one.

        Args:
          read: returns the pixels of a page.
        """
        height, width, channels = self.shape
        size = (-1, height, width, channels // len(self.pages))

        def planes(pages: Sequence[int]) -> Iterator[np.ndarray]:
            for page in pages:
                yield from read(page)[self.index].transpose(self.order).reshape(size)

        parts = [_project(planes(pages), self.projection) for pages in self.pages]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _project(planes: Iterator[np.ndarray], projection: str) -> np.ndarray:
    """Combine planes of one shape; means of integers are rounded to the nearest, halves to even."""
    first = next(planes)
    if projection == "max":
        return functools.reduce(np.maximum, planes, first)
    if projection != "mean":
        return first
    total, count = first.astype(np.float64), 1
    for plane in planes:
        total += plane
        count += 1
    total /= count
    return (np.rint(total) if first.dtype.kind == "u" else total).astype(first.dtype)


def select(axes: str, shape: Sequence[int], page_ndim: int, plane: Plane) -> Selection:
    """Decide what to read from the names of the axes alone.

    The samples of each pixel are the channels where there are any, else the axis C, else, with
    "I=C", the pages.

    Args:
      axes: one letter for each entry of `shape`, the last `page_ndim` within a page.
      shape: sizes; none is 1 but those of Y and X.
      page_ndim: number of axes of one page, Y and X among them.
      plane: what `parse_plane` returned; axes that the image has not are passed over, so that
        one choice serves a folder in which some images have a single plane.

    Raises:
      Refused: an axis besides rows, columns and channels is left, or an index is too large.
    """
    axes = "".join(axis if axis in {"X", "Y", "S", *AXES} else "I" for axis in axes)
    options = "S" + "C" * ("C" not in plane) + "I" * (plane.get("I") == "c")
    channels = next((axis for axis in options if axis in axes), "")

    chosen: dict[int, int] = {}
    left: dict[str, int] = {}
    notes = []
    for axis in AXES:
        positions = [k for k, letter in enumerate(axes) if letter == axis]
        if not positions or axis == channels:
            continue
        sizes = [shape[k] for k in positions]
        count, wanted = math.prod(sizes), plane.get(axis)
        if wanted in _PROJECTIONS:
            notes.append(f"{_PROJECTIONS[str(wanted)]} over {count} {AXES[axis]}")
        elif not isinstance(wanted, int):
            left[axis] = count
        elif wanted < count:
            chosen |= zip(positions, map(int, np.unravel_index(wanted, sizes)), strict=True)
        else:
            raise Refused(f"has {count} {AXES[axis]}: {axis}={wanted} is not in 0 to {count - 1}")
    if left:
        raise Refused(_choice(left, pages_may_be_channels=not channels))

    ranks = {"Y": 1, "X": 2, channels: 3}  # after those that are projected

    def order(part: range) -> tuple[int, ...]:
        stay = [ranks.get(axes[k], 0) for k in part if k not in chosen]
        return tuple(sorted(range(len(stay)), key=stay.__getitem__))

    outer = len(axes) - page_ndim
    kept = [k for k, axis in enumerate(axes) if axis == channels]
    groups = math.prod(shape[k] for k in kept if k < outer)
    index = tuple(chosen.get(k, slice(None)) for k in range(len(axes)))
    numbers = np.arange(math.prod(shape[:outer])).reshape(shape[:outer])[index[:outer]]
    pages = numbers.transpose(order(range(outer))).reshape(-1, groups).T.tolist()
    return Selection(
        pages=tuple(map(tuple, pages)),
        shape=(shape[axes.index("Y")], shape[axes.index("X")], math.prod(shape[k] for k in kept)),
        index=index[outer:],
        order=order(range(outer, len(axes))),
        projection=next((p for p in _PROJECTIONS if p in plane.values()), ""),
        notes=tuple(notes),
    )


def _choice(left: Mapping[str, int], *, pages_may_be_channels: bool) -> str:
    """Say which axes are left to choose on, and how to."""
    has = " and ".join(f"{size} {AXES[axis]} (axis {axis})" for axis, size in left.items())
    first, largest = (",".join(f"{axis}={what}" for axis in left) for what in ("0", "max"))
    one = "one" if len(left) == 1 else "one of each"
    also = ", or read them as channels with data.plane=I=C" * pages_may_be_channels * ("I" in left)
    how = f"with data.plane={first} (indices begin at 0)"
    return f"has {has}: choose {one} {how}, or take the maximum with data.plane={largest}{also}"
