"""Reading one image, whatever the microscope wrote, and writing one crop."""

import os
import stat
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile
from PIL import Image

from jaxcells.data.picture import EXPORT, Picture, Refused, orient
from jaxcells.data.planes import Plane, parse_plane
from jaxcells.data.raster import open_bmp, open_jpeg, open_png
from jaxcells.data.tiff import open_tiff, quiet
from jaxcells.data.vendor import open_czi, open_lif, open_nd2
from jaxcells.files import Error
from jaxcells.text import by, one_line

# By the first bytes of a file.
_RASTERS = {b"\x89PNG\r\n\x1a\n": open_png, b"\xff\xd8\xff": open_jpeg, b"BM": open_bmp}
_STACKS = dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), open_tiff) | {
    b"ZISRAWFILE": open_czi,
    b"p\0\0\0": open_lif,
    b"\xda\xce\xbe\x0a": open_nd2,
    b"\0\0\0\x0cjP  ": open_nd2,  # before 2009
}

_SUFFIXES = "bmp czi jpeg jpg lif nd2 png stk tif tiff"
SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""Lower-case suffixes of the files that are read."""

_FOREIGN = (
    "arw avif cr2 cr3 dcm dng dv exr gif heic heif ics ids ims jp2 jpx jxl lof lsm mrxs nd ndpi "
    "nef oib oif oir orf psd rw2 scn sld svs vsi webp xdce zarr zvi"
)
FOREIGN = frozenset(f".{suffix}" for suffix in _FOREIGN.split())
"""Lower-case suffixes of images in other formats, which are refused and never passed over."""

_DECODERS = {"tifffile", "imagecodecs", "PIL", "czifile", "liffile", "nd2"}


class ImageError(Error):
    """An image cannot be read: one line with its path, the reason and, if any, the remedy."""


@dataclass(frozen=True)
class ImageInfo:
    """What `read_image` will return for a file.

    Attributes:
      height: rows, after orientation.
      width: columns, after orientation.
      channels: channels, without alpha.
      dtype: "uint8", "uint16" or "float32".
      notes: what is left out, or read in a sense that another program might not share.
    """

    height: int
    width: int
    channels: int
    dtype: str
    notes: tuple[str, ...]


def inspect_image(path: str | os.PathLike[str], *, plane: str = "") -> ImageInfo:
    """Read the header of an image, not its pixels.

    Args:
      path: image file.
      plane: as for `read_image`.

    Returns:
      Exactly the shape and dtype that `read_image` returns.

    Raises:
      ImageError: the header shows that the image cannot be read.
      Error: `plane` cannot be parsed.
    """
    with _opened(path, plane) as picture:
        height, width, channels = picture.shape
        if picture.orientation >= 5:
            height, width = width, height
        return ImageInfo(height, width, channels, picture.dtype.name, picture.notes)


def read_image(path: str | os.PathLike[str], *, plane: str = "") -> np.ndarray:
    """Read one image in its own data type; nothing is scaled or converted.

    The content, not the name, decides the format. EXIF and TIFF orientation are applied and alpha
    is dropped; `inspect_image` notes what happened. May be called from many threads.

    Args:
      path: PNG, JPEG, BMP, TIFF, BigTIFF, OME-TIFF, ImageJ TIFF or MetaMorph STK; CZI, LIF or ND2
        where the packages that read them are installed.
      plane: which plane of files with several, for example "T=0", or "Z=max" and "Z=mean" for
        the maximum or the mean of all (rounded to the nearest for integers, halves to even); see
        `planes.parse_plane`. The data type stays.

    Returns:
      Pixels [H, W, C], uint8, uint16 or float32, native byte order, C-contiguous, writable.

    Raises:
      ImageError: no image, damaged, too large, more planes than one, labels, NaN and so on.
      Error: `plane` cannot be parsed.
    """
    with _opened(path, plane) as picture:
        pixels = picture.decode()
        if (pixels.shape, pixels.dtype) != (picture.shape, picture.dtype):
            raise Refused(f"is damaged: it has {by(pixels.shape)} pixels, unlike its header")
        if picture.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise Refused("has NaN or infinite pixels: replace them, then save it again")
        return np.ascontiguousarray(orient(pixels, picture.orientation))


def write_crop(path: str | os.PathLike[str], pixels: np.ndarray) -> Path:
    """Write a crop so that `read_image` returns it unchanged.

    Args:
      path: file to write, without suffix.
      pixels: [H, W, C], uint8, uint16 or float32.

    Returns:
      The path with its suffix: `.png` for 8-bit grey and RGB and 16-bit grey, else `.tif`.

    """
    channels = pixels.shape[2]
    plain = np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels)
    is_png = (pixels.dtype.name, channels) in (("uint8", 1), ("uint8", 3), ("uint16", 1))
    target = Path(f"{os.fspath(path)}.{'png' if is_png else 'tif'}")
    if is_png:
        # Level 1 takes a sixth of the time of the default and 15 % more space.
        Image.fromarray(plain).save(target, compress_level=1)
    else:
        kind = {"photometric": "rgb" if channels == 3 else "minisblack", "metadata": None}
        kind |= {"planarconfig": "contig" if channels > 1 else None}
        tifffile.imwrite(target, plain, compression="zlib", predictor=True, **kind)
    return target


@contextmanager
def _opened(path: str | os.PathLike[str], plane: str) -> Iterator[Picture]:
    """Open an image; what is wrong with the file, here or while it is open, is an ImageError."""
    chosen = parse_plane(plane)
    with opened(path) as file:
        yield _open_format(file, Path(path).suffix.lower(), chosen)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file to decode; what is wrong with it, here or while it is open, is an ImageError."""
    try:
        # Opening a named pipe would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Refused("is a folder or a device, not an image file")
        with open(path, "rb") as file, quiet():
            yield file
    except Exception as error:
        if isinstance(error, Refused):
            reason = str(error)
        elif isinstance(error, MemoryError):
            reason = "does not fit into memory: cut it into fields"
        elif isinstance(error, OSError) and error.errno is not None:
            reason = f"cannot be opened: {os.strerror(error.errno).lower()}"
        elif _is_damage(error):
            detail = one_line(f"{type(error).__name__}: {error}")[:160]
            reason = f"cannot be decoded, it is probably damaged or cut short ({detail})"
        else:
            raise
        raise ImageError(f"{os.fspath(path)}: {reason}") from error


def _is_damage(error: Exception) -> bool:
    """Tell what damaged data make decoders raise, which is nearly anything, from a bug of ours.

    A wrong name, attribute or type is our bug where no line of a decoder was part of it: what a
    decoder no longer has fails in our line that asks for it.
    """
    if not isinstance(error, (AttributeError, NameError, TypeError)):
        return True
    lines = traceback.extract_tb(error.__traceback__)
    return any(_DECODERS.intersection(Path(line.filename).parts) for line in lines)


def _open_format(file: BinaryIO, suffix: str, plane: Plane) -> Picture:
    """Open a file in the format that its first bytes name."""
    head = file.read(16)
    file.seek(0)
    open_raster = next((o for first, o in _RASTERS.items() if head.startswith(first)), None)
    if not head:
        raise Refused("is empty (0 bytes)")
    if suffix in FOREIGN and not open_raster:
        raise Refused(f"is a {suffix[1:].upper()} file, which is not read: {EXPORT}")
    open_stack = next((o for first, o in _STACKS.items() if head.startswith(first)), open_tiff)
    if not (open_raster or head.startswith(tuple(_STACKS))):
        raise Refused(f"is no PNG, JPEG, TIFF, BMP, CZI, LIF or ND2 image: it begins with {head!r}")
    picture = open_raster(file) if open_raster else open_stack(file, plane)
    if picture.orientation == 1:
        return picture
    turned = f"turned as its orientation tag says ({picture.orientation})"
    return replace(picture, notes=(*picture.notes, turned))
