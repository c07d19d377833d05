"""PNG, JPEG and BMP: the header first, then the pixels, exactly as they are stored."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import imagecodecs
import numpy as np
from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin

from jaxcells.data.picture import (
    Picture,
    Refused,
    check_dtype,
    check_size,
    exif_orientation,
    file_size,
    is_lookup_ramp,
)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type, alpha included
_ALPHA = "alpha channel dropped"


def _read_palette(indices: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Intensities [H, W, 1] of an indexed image that `_palette_note` accepted."""
    if len(palette) < 256 or not is_lookup_ramp(palette):
        return palette[indices, :1]
    return indices[..., None]


def _palette_note(palette: np.ndarray) -> str:
    """Say how an indexed image is read.

    Args:
      palette: [N, 3] uint8.

    Raises:
      Refused: its colours are more than a lookup table.
    """
    if len(palette) == 256 and is_lookup_ramp(palette):
        return "palette is a lookup table; its indices are read as intensities"
    if (palette == palette[:, :1]).all():
        return "palette of grey levels applied"
    raise Refused(
        "has indexed colours (a label image, or a photograph reduced to a palette): "
        "save it as grey or RGB"
    )


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, offset and length of each chunk, reading none of them."""
    size = file_size(file)
    position = len(_PNG_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        file.seek(position)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if position + 12 + length > size:
            raise Refused(f"is truncated or damaged: its chunks do not end within {size} bytes")
        yield kind, position + 8, length
        position += 12 + length


def open_png(file: BinaryIO) -> Picture:
    """Open a PNG file.

    libpng decodes it, for Pillow cuts 16-bit colours to 8 bits.

    Raises:
      Refused: it is a mask, indexed colours, an animation, too large or truncated.
    """

    def read(offset: int, length: int) -> bytes:
        file.seek(offset)
        return file.read(length)

    critical: list[tuple[int, int]] = []
    header = palette = exif = b""
    for kind, offset, length in _png_chunks(file):
        if kind == b"IHDR":
            header = read(offset, length)
        elif kind == b"PLTE":
            palette = read(offset, length)
        elif kind == b"eXIf":
            exif = read(offset, length)
        elif kind == b"acTL" and read(offset, 4) != b"\0\0\0\1":
            raise Refused("is an animation: save the frame you need as its own file")
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            critical.append((offset - 8, length + 12))

    width, height, depth, colour = struct.unpack_from(">IIBB", header)
    dtype = np.dtype(np.uint16 if depth == 16 else np.uint8)
    stored = _PNG_CHANNELS[colour]
    channels = stored - 1 if colour in (4, 6) else stored
    check_size(height, width, stored, dtype, file_size(file))
    if depth == 1:
        check_dtype(np.dtype(bool))
    notes = [_ALPHA] if colour in (4, 6) else []
    if depth < 8 and colour == 0:
        notes.append(f"{depth}-bit samples scaled to 0..255, as PNG defines them")
    colours = np.frombuffer(palette, np.uint8).reshape(-1, 3)
    if colour == 3:
        notes.append(_palette_note(colours))

    def decode() -> np.ndarray:
        # Comments, profiles and animation controls never reach a decoder: there they could fail,
        # warn on the terminal or inflate without end.
        chunks = [read(*chunk) for chunk in critical]
        if any(zlib.crc32(c[4:-4]) != int.from_bytes(c[-4:], "big") for c in chunks):
            raise Refused("is damaged: a checksum in it is wrong")
        data = _PNG_SIGNATURE + b"".join(chunks)
        if colour == 3:
            indices = np.array(PngImagePlugin.PngImageFile(io.BytesIO(data)))
            return _read_palette(indices, colours)
        pixels = imagecodecs.png_decode(data)
        return pixels.reshape(height, width, stored)[..., :channels]

    return Picture(height, width, channels, dtype, decode, exif_orientation(exif), tuple(notes))


class _JpegImageFile(JpegImagePlugin.JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """The resolution is not needed, and looking for it warns on damaged EXIF."""


def open_jpeg(file: BinaryIO) -> Picture:
    """Open a JPEG file, grey or colour.

    Pillow's plugin is called by itself, without `Image.open`, whose limit on pixels is a global
    that would stop a 20000x20000 field; `check_size` stands in its place.

    Raises:
      Refused: it is CMYK or too large.
    """
    image = _JpegImageFile(file)
    if image.mode not in ("L", "RGB"):
        raise Refused(f"is a {image.mode} JPEG: save it as RGB")
    channels = 3 if image.mode == "RGB" else 1
    check_size(image.height, image.width, channels, np.dtype(np.uint8), file_size(file))
    notes = ("first picture of a multi-picture file",) if "mp" in image.info else ()

    def decode() -> np.ndarray:
        return np.array(image).reshape(image.height, image.width, channels)

    return Picture(
        image.height,
        image.width,
        channels,
        np.dtype(np.uint8),
        decode,
        exif_orientation(image.info.get("exif", b"")),
        notes,
    )


def open_bmp(file: BinaryIO) -> Picture:
    """Open a BMP file.

    Raises:
      Refused: it is a mask, indexed colours or too large.
    """
    head = file.read(30)
    (header_size,) = struct.unpack_from("<I", head, 14)
    (bits,) = struct.unpack_from("<H", head, 24 if header_size == 12 else 28)
    if bits == 1:
        check_dtype(np.dtype(bool))
    file.seek(0)
    image = BmpImagePlugin.BmpImageFile(file)
    channels = 1 if image.mode in ("L", "P") else 3
    check_size(image.height, image.width, channels, np.dtype(np.uint8), file_size(file))
    notes = (_ALPHA,) if image.mode == "RGBA" else ()
    colours = np.zeros((0, 3), np.uint8)
    if image.mode == "P":
        colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        notes = (_palette_note(colours),)

    def decode() -> np.ndarray:
        pixels = np.array(image)
        if image.mode == "P":
            return _read_palette(pixels, colours)
        return pixels.reshape(image.height, image.width, -1)[..., :channels]

    return Picture(image.height, image.width, channels, np.dtype(np.uint8), decode, notes=notes)
