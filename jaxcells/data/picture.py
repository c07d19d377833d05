"""What every file format owes `images.read_image`: a checked header and a way to the pixels."""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

MAX_BYTES = 4 * 2**30
"""Most bytes that one decoded image may take; a 20000x20000 8-bit RGB field takes 1.2e9."""

# Deflate cannot expand more than 1032 times, and JPEG of an empty field stays well below that.
_MAX_EXPANSION = 2000
_ALWAYS_ALLOWED = 64 * 2**20

_PIXEL_TYPES = ("uint8", "uint16", "float32")

# How the stored rows and columns (TIFF 6.0, section 8, tag 274; EXIF 2.3 the same) are turned.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


class Refused(Exception):
    """Why an image is not read, in words that follow its path and a colon."""


@dataclass(frozen=True)
class Picture:
    """An open image: its header, checked, and a function that decodes its pixels.

    Attributes:
      height: rows as stored, before `orientation`.
      width: columns as stored, before `orientation`.
      channels: samples of each pixel that `decode` returns.
      dtype: uint8, uint16 or float32, native byte order.
      decode: returns the pixels [height, width, channels] as stored; valid while the file is
        open.
      orientation: 1 to 8, what TIFF tag 274 and EXIF say.
      notes: what was left out or taken in a sense that another reader might not.
    """

    height: int
    width: int
    channels: int
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
    if dtype.name in _PIXEL_TYPES:
        return
    if dtype.kind == "b":
        raise Refused("is a 1-bit image, a mask: only 8-bit, 16-bit and float32 images are read")
    to = "float32" if dtype.kind in "fc" else "8-bit or 16-bit unsigned, or float32"
    raise Refused(
        f"has {dtype.name} pixels (labels, or the output of a calculation?): if it is an image, "
        f"convert it to {to}"
    )


def check_size(height: int, width: int, channels: int, dtype: np.dtype, stored: int) -> None:
    """Refuse, before anything is allocated, an image too large or larger than its file can hold.

    Raises:
      Refused: it names the declared size.
    """
    nbytes = height * width * channels * dtype.itemsize
    declared = (
        f"declares {height}x{width}x{channels} {dtype.name} pixels ({nbytes / 2**30:,.1f} GiB"
    )
    if nbytes == 0:
        raise Refused(f"has no pixels ({height}x{width}x{channels})")
    if nbytes > MAX_BYTES:
        raise Refused(
            f"{declared}; at most {MAX_BYTES / 2**30:g} GiB are read at once): cut it into fields"
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
        for k in range(count):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * k)
            if tag == 0x0112 and 1 <= value <= 8:
                return int(value)
    except struct.error:
        pass
    return 1


def orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels [H, W, C] the way up that `orientation` (1 to 8) says, as a view."""
    return _TURNS[orientation](pixels) if orientation in _TURNS else pixels
