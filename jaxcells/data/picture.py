"""What every file format owes `images.read_image`: a checked header and a way to the pixels."""

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from jaxcells.text import by

MAX_BYTES = 4 * 2**30
"""Most bytes that one decoded image may take; a 20000x20000 8-bit RGB field takes 1.2e9."""

# Deflate cannot expand more than 1032 times, and JPEG of an empty field stays well below that.
_MAX_EXPANSION = 2000
_ALWAYS_ALLOWED = 64 * 2**20
EXPORT = "export it as OME-TIFF (Fiji with Bio-Formats does), or a photograph as PNG"
"""What to do with a format that is not read."""
ALPHA = "alpha channel dropped"
LOOKUP_TABLE = "palette is a lookup table; its indices are read as intensities"
INDEXED = (
    "has indexed colours (a mask, labels, or a photograph reduced to a palette): save it as grey "
    "or RGB (in ImageJ, Image > Lookup Tables > Grays)"
)


class Refused(Exception):
    """Why an image is not read, in words that follow its path and a colon."""


@dataclass(frozen=True)
class Picture:
    """An open image: its header, checked, and a function that decodes its pixels.

    Attributes:
      shape: [H, W, C] of what `decode` returns, before `orientation`.
      dtype: uint8, uint16 or float32, native byte order.
      decode: returns the pixels as stored; valid while the file is open.
      orientation: 1 to 8, what TIFF tag 274 and EXIF say.
      notes: what was left out or taken in a sense that another reader might not.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    decode: Callable[[], np.ndarray]
    orientation: int = 1
    notes: tuple[str, ...] = ()


def file_size(file: BinaryIO) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def check_dtype(dtype: np.dtype) -> None:
    """Refuse pixels that are not uint8, uint16 or float32: converting is the owner's decision.

    Raises:
      Refused: it says what to convert to.
    """
    if dtype.name not in ("uint8", "uint16", "float32"):
        to = "float32" if dtype.kind in "fc" else "8-bit or 16-bit unsigned, or float32"
        raise Refused(
            f"has {dtype.name} pixels (a mask, labels, or the output of a calculation?): if it is "
            f"an image, convert it to {to}; if not, leave it out (data.exclude)"
        )


def check_size(shape: tuple[int, int, int], dtype: np.dtype, stored: int) -> None:
    """Refuse, before anything is allocated, an image too large or larger than its file can hold.

    Args:
      shape: [H, W, C] that the header declares.
      dtype: of its pixels.
      stored: bytes of the file.

    Raises:
      Refused: it names the declared size.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    declared = f"declares {by(shape)} {dtype.name} pixels ({nbytes / 2**30:,.1f} GiB"
    if nbytes == 0:
        raise Refused(f"has no pixels ({by(shape)})")
    if nbytes > MAX_BYTES:
        raise Refused(
            f"{declared}; at most {MAX_BYTES / 2**30:g} GiB are read): cut it into fields"
        )
    if nbytes > max(_ALWAYS_ALLOWED, _MAX_EXPANSION * stored):
        raise Refused(f"{declared}) in a file of {stored} bytes: damaged, or made to do harm")


def is_lookup_ramp(palette: np.ndarray) -> bool:
    """Tell a palette that only colours intensities from one that names labels or colours.

    Args:
      palette: [N, 3], red, green and blue of each index.

    Returns:
      Whether luminance (ITU-R BT.601) never falls, or never rises, over the indices and takes
      at least 16 values: the lookup tables of ImageJ (grays, green, magenta, a stretched
      display range), but not label colours.
    """
    luminance = palette.astype(np.int64) @ np.array([299, 587, 114])
    steps = np.diff(luminance)
    monotone = bool((steps >= 0).all() or (steps <= 0).all())
    return monotone and np.unique(luminance).size >= min(len(palette), 16)


def exif_orientation(exif: bytes) -> int:
    """Orientation, 1 to 8, in a raw EXIF block; 1 where there is none or the block is damaged.

    Pillow's own reader warns on damaged blocks, through a filter that threads share.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = "<" if exif[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        places = range(start + 2, start + 2 + 12 * count, 12)
        tags = [struct.unpack_from(f"{order}HHIH", exif, place) for place in places]
    except struct.error:
        return 1
    return next((value for tag, *_, value in tags if tag == 0x0112 and value in range(1, 9)), 1)


def orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels [H, W, C] the way up that `orientation` (1 to 8) says, as a view.

    TIFF 6.0, section 8, tag 274; EXIF 2.3 has the same numbers.
    """
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    return pixels.swapaxes(0, 1) if orientation >= 5 else pixels
