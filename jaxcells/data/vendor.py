"""Files that microscopes write themselves: CZI (Zeiss), LIF (Leica) and ND2 (Nikon).

They are read as TIFF is: axes by name, one picture [H, W, C] out of them, nothing guessed. The
packages czifile, liffile and nd2 decode them; they come with the extra "formats" alone.
"""

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np

from jaxcells.data.picture import EXPORT, Picture, Refused, check_dtype, check_size, file_size
from jaxcells.data.planes import Plane, choose_series, select
from jaxcells.text import by

# Axes that these packages name unlike `planes.AXES`: phases, rotation, mosaic tiles, positions.
_CZI, _LIF, _ND2 = {"H": "P", "R": "A"}, {"M": "R"}, {"P": "R"}


def open_czi(file: BinaryIO, plane: Plane) -> Picture:
    """Open a Zeiss CZI file; the tiles of a mosaic are put together, later ones on top.

    Args:
      file: open for reading, until the picture has been decoded.
      plane: what `planes.parse_plane` returned; a scene is a series.

    Raises:
      Refused: czifile is missing, the axes leave a choice, or pixels would be converted.
    """
    scenes = list(_package("czifile").CziFile(file).scenes.values())
    image = scenes[choose_series([f"{s.axes} {by(s.shape)}" for s in scenes], plane)]
    tiles = image.directory_entries
    if len({tile.pixel_type for tile in tiles}) > 1 or image.sizes.get("S") == 4:
        raise Refused(f"has channels of several pixel types, or transparency: {EXPORT}")
    if any(tile.shape != tile.stored_shape or tile.compression > 99 for tile in tiles):
        raise Refused(f"has a camera's raw pixels, or stores others than it shows: {EXPORT}")

    def read(number: int) -> np.ndarray:
        page = next(itertools.islice(image.chunks(), number, None))
        return page.asarray(fillvalue=0, maxworkers=1)

    number = len({tile.mosaic_index for tile in tiles})
    notes = [f"a mosaic of {number} tiles; where none lies, pixels are 0"] * (number > 1)
    return _picture(file, image, "YXS", _CZI, read, plane, notes)


def open_lif(file: BinaryIO, plane: Plane) -> Picture:
    """Open a Leica LIF file; see `open_czi`, but that an image of the file is a series.

    Raises:
      Refused: liffile is missing, or the axes leave a choice; lifetimes are no intensities.
    """
    images = list(_package("liffile").LifFile(file).images)
    image = images[choose_series([f"{i.name}: {by(i.shape)}" for i in images], plane)]
    if image.is_flim or image.nbytes > image.memory_block.size:
        raise Refused(f"has lifetimes, or is damaged: its pixels do not fit its axes; {EXPORT}")
    frames = image.frames
    return _picture(file, image, frames.frame_dims, _LIF, frames.__getitem__, plane)


def open_nd2(file: BinaryIO, plane: Plane) -> Picture:
    """Open a Nikon ND2 file; see `open_czi`.

    Raises:
      Refused: nd2 is missing, the axes leave a choice, or a page is not there.
    """
    image = _package("nd2").ND2File(file)
    if image.components_per_channel not in (1, 3):
        raise Refused(f"has {image.components_per_channel} samples in each pixel: {EXPORT}")

    def read(number: int) -> np.ndarray:
        page = image.read_frame(number)
        if not page.any():  # which is what nd2 makes of pages that are missing
            raise Refused(f"lacks page {number}, or it is all zeros: an acquisition cut short?")
        return page.copy()  # it may be a view of the file

    return _picture(file, image, "CYXS", _ND2, read, plane)


def _package(name: str) -> Any:
    """Import one of the extra's packages."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        newer = " (with Python 3.12 or later)" if name != "nd2" else ""
        install = f"pip install 'jaxcells[formats]'{newer}"
        raise Refused(f"needs the package {name}: {install}, or {EXPORT}") from error


def _picture(
    file: BinaryIO,
    image: Any,
    page_axes: Sequence[str],
    letters: dict[str, str],
    read: Callable[[int], np.ndarray],
    plane: Plane,
    notes: Sequence[str] = (),
) -> Picture:
    """Find the one picture among the pages of an image.

    Args:
      file: the open file.
      image: with `sizes` by axis, none of which is 1, and `dtype`.
      page_axes: axes within a page; the last of `sizes`.
      letters: of axes that `planes.AXES` names otherwise.
      read: returns a page, by its number.
      plane: what `planes.parse_plane` returned.
      notes: what was found already.
    """
    axes, shape, size = tuple(image.sizes), tuple(image.sizes.values()), file_size(file)
    inner = sum(axis in page_axes for axis in axes)
    if not {"Y", "X"} <= {*axes[-inner:]} or math.prod(shape[:-inner]) > size:
        raise Refused(f"has axes {' '.join(axes)} ({by(shape)}) that do not fit it: {EXPORT}")
    check_dtype(image.dtype)
    check_size((math.prod(shape[-inner:]), 1, 1), image.dtype, size)  # a page, to read it
    selection = select("".join(letters.get(a, a[0]) for a in axes), shape, inner, plane)
    check_size(selection.shape, image.dtype, size)
    dtype, notes = image.dtype.newbyteorder("="), (*notes, *selection.notes)
    return Picture(selection.shape, dtype, lambda: selection.assemble(read), notes=notes)
