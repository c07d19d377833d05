"""Files that microscopes write themselves: CZI (Zeiss), LIF (Leica) and ND2 (Nikon).

They are read as TIFF is: axes by name, one picture [H, W, C] out of them, nothing guessed. The
packages czifile, liffile and nd2 decode them; they come with the extra "formats" alone.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from jaxcells.data.picture import EXPORT, Picture, Refused, check_dtype, check_size, file_size
from jaxcells.data.planes import Plane, choose_series, select
from jaxcells.text import by


def open_czi(file: BinaryIO, plane: Plane) -> Picture:
    """Open a Zeiss CZI file; the tiles of a mosaic are put together, later ones on top.

    Args:
      file: open for reading, until the picture has been decoded.
      plane: what `planes.parse_plane` returned; a scene is a series.

    Raises:
      Refused: czifile is missing, the axes leave a choice, or pixels are not stored as they are
        shown.
    """
    scenes = list(_package("czifile").CziFile(file).scenes.values())
    image = scenes[choose_series([f"{s.axes} {by(s.shape)}" for s in scenes], plane)]
    tiles = image.directory_entries
    if len({tile.pixel_type for tile in tiles}) > 1:
        raise Refused(f"has channels of several pixel types: {EXPORT}")
    if image.sizes.get("S", 1) == 4 or any(tile.compression > 99 for tile in tiles):
        raise Refused(f"has transparency or a camera's raw pixels: {EXPORT}")
    if any(tile.shape != tile.stored_shape for tile in tiles):
        raise Refused(f"stores its pixels in another size than it shows them in: {EXPORT}")
    number = len({tile.mosaic_index for tile in tiles})
    notes = [f"a mosaic of {number} tiles; where none lies, pixels are 0"] * (number > 1)
    first = dict(zip(image.dims, image.start, strict=True))
    letters = {"H": "P", "R": "A"}  # phases and rotation; the others are as in planes.AXES

    def read(index: Mapping[str, int]) -> np.ndarray:
        page = image(**{axis: first[axis] + k for axis, k in index.items()})
        return page.asarray(fillvalue=0, maxworkers=1)

    inner = sum(axis in "YXS" for axis in image.dims)
    return _picture(file, image.sizes, image.dtype, inner, letters, read, plane, notes)


def open_lif(file: BinaryIO, plane: Plane) -> Picture:
    """Open a Leica LIF file; see `open_czi`, but that an image of the file is a series.

    Raises:
      Refused: liffile is missing, or the axes leave a choice; lifetimes are no intensities.
    """
    images = list(_package("liffile").LifFile(file).images)
    image = images[choose_series([f"{i.name}: {by(i.shape)}" for i in images], plane)]
    if image.is_flim or image.frames.frame_dims not in (("Y", "X"), ("Y", "X", "S")):
        raise Refused(f"has lifetimes, or pages that are not rows and columns: {EXPORT}")
    if image.nbytes > image.memory_block.size:
        raise Refused("is damaged: an image of it is larger than its place in the file")

    def read(index: Mapping[str, int]) -> np.ndarray:
        return image.frame(**index)

    inner = len(image.frames.frame_dims)
    return _picture(file, image.sizes, image.dtype, inner, {"M": "R"}, read, plane)


def open_nd2(file: BinaryIO, plane: Plane) -> Picture:
    """Open a Nikon ND2 file; see `open_czi`.

    Raises:
      Refused: nd2 is missing, the axes leave a choice, or a page is not there.
    """
    nd2 = _package("nd2").ND2File(file)
    if nd2.components_per_channel not in (1, 3):
        raise Refused(f"has {nd2.components_per_channel} samples in each pixel: {EXPORT}")
    inner = sum(axis in "CYXS" for axis in nd2.sizes)
    outer = list(nd2.sizes.values())[:-inner]

    def read(index: Mapping[str, int]) -> np.ndarray:
        number = int(np.ravel_multi_index(list(index.values()), outer)) if outer else 0
        page = nd2.read_frame(number)
        if not page.any():  # which is what nd2 makes of pages that are missing
            raise Refused(f"lacks page {number}, or it is all zeros: an acquisition cut short?")
        return page.copy()  # it may be a view of the file

    return _picture(file, nd2.sizes, nd2.dtype, inner, {"P": "R"}, read, plane)


def _package(name: str) -> Any:
    """Import one of the extra's packages."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        newer = " (with Python 3.12 or later)" if name != "nd2" else ""
        raise Refused(
            f"needs the package {name}: pip install 'jaxcells[formats]'{newer}, or {EXPORT}"
        ) from error


def _picture(
    file: BinaryIO,
    sizes: Mapping[str, int],
    dtype: np.dtype,
    inner: int,
    letters: Mapping[str, str],
    read: Callable[[Mapping[str, int]], np.ndarray],
    plane: Plane,
    notes: Sequence[str] = (),
) -> Picture:
    """Find the one picture among the pages of a series.

    Args:
      file: the open file.
      sizes: of the axes, rows and columns among the last; none is 1.
      dtype: of the pixels.
      inner: number of axes within a page.
      letters: of axes that `planes.AXES` names otherwise.
      read: returns a page, by the index on each of the other axes.
      plane: what `planes.parse_plane` returned.
      notes: what was found already.
    """
    axes, shape = list(sizes), tuple(sizes.values())
    outer, size = axes[:-inner], file_size(file)
    if not {"Y", "X"} <= {*axes[-inner:]} or math.prod(shape[:-inner]) > size:
        raise Refused(f"has axes {' '.join(axes)} ({by(shape)}) that do not fit it: {EXPORT}")
    check_dtype(dtype)
    named = "".join(letters.get(axis, axis if len(axis) == 1 else "I") for axis in axes)
    selection = select(named, shape, inner, plane)
    check_size(selection.shape, dtype, size)
    check_size((math.prod(shape[-inner:]), 1, 1), dtype, size)  # a page may have other channels

    def read_page(k: int) -> np.ndarray:
        page = read(dict(zip(outer, map(int, np.unravel_index(k, shape[:-inner])), strict=True)))
        if (page.shape, page.dtype) != (shape[-inner:], dtype):
            raise Refused(f"has a page of another size or type, {by(page.shape)} {page.dtype}")
        return page

    return Picture(
        selection.shape,
        dtype.newbyteorder("="),
        decode=lambda: selection.assemble(read_page),
        notes=(*notes, *selection.notes),
    )
