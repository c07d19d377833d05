"""PNG, JPEG and BMP: the header first, then the pixels, exactly as they are stored."""

import io
import struct
import zlib
from typing import BinaryIO

import imagecodecs
import numpy as np
from PIL import BmpImagePlugin, ImageFile, JpegImagePlugin, PngImagePlugin

from jaxcells.data import picture
from jaxcells.data.picture import Picture, Refused, check_size, file_size

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type, alpha included
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def _grey_levels(palette: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the intensity [N] that each index of an indexed image stands for, and a note.

    Args:
      palette: [N, 3] uint8.

    Raises:
      Refused: its colours are more than a lookup table.
    """
    if len(palette) == 256 and picture.is_lookup_ramp(palette):
        return np.arange(256, dtype=np.uint8), picture.LOOKUP_TABLE
    if (palette == palette[:, :1]).all():
        return palette[:, 0], "palette of grey levels applied"
    raise Refused(picture.INDEXED)


def open_png(file: BinaryIO) -> Picture:
    """Open a PNG file.

    libpng decodes it, for Pillow cuts 16-bit colours to 8 bits.

    Raises:
      Refused: it is a mask, indexed colours, an animation, too large or truncated.
    """
    size = file_size(file)

    def read(offset: int, length: int) -> bytes:
        file.seek(offset)
        return file.read(length)

    chunks: list[tuple[bytes, int, int]] = []
    position, kind = len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        head = read(position, 8)
        length, kind = 12 + int.from_bytes(head[:4], "big"), head[4:]
        if position + length > size:
            raise Refused(f"is truncated or damaged: its chunks do not end within {size} bytes")
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"eXIf", b"acTL"):
            chunks.append((kind, position, length))
        position += length
    found = {kind: read(at + 8, length - 12) for kind, at, length in chunks if kind != b"IDAT"}
    header = struct.unpack_from(">IIBB3s", found.get(b"IHDR", bytes(13)))
    width, height, depth, colour, methods = header
    if depth not in _PNG_DEPTHS.get(colour, ()) or methods not in (b"\0\0\0", b"\0\0\1"):
        raise Refused(f"is damaged: its header has values that PNG does not define ({header})")
    if found.get(b"acTL", b"\0\0\0\1")[:4] != b"\0\0\0\1":
        raise Refused("is an animation: save the frame you need as its own file")

    dtype = np.dtype({1: np.bool, 16: np.uint16}.get(depth, np.uint8))
    picture.check_dtype(dtype)
    stored = _PNG_CHANNELS[colour]
    check_size((height, width, stored), dtype, size)
    channels = stored - (colour in (4, 6))
    notes = [picture.ALPHA] if channels < stored else []
    if depth < 8 and colour == 0:
        notes.append(f"{depth}-bit samples scaled to 0..255, as PNG defines them")
    if colour == 3:
        palette = np.frombuffer(found.get(b"PLTE", b""), np.uint8)
        levels, note = _grey_levels(palette.reshape(-1, 3))
        notes.append(note)

    def decode() -> np.ndarray:
        # Comments, profiles and animation controls never reach a decoder: there they could fail,
        # warn on the terminal or inflate without end.
        parts = [read(at, n) for kind, at, n in chunks if kind not in (b"eXIf", b"acTL")]
        if any(zlib.crc32(part[4:-4]) != int.from_bytes(part[-4:], "big") for part in parts):
            raise Refused("is damaged: a checksum in it is wrong")
        data = _PNG_SIGNATURE + b"".join(parts)
        if colour == 3:
            return levels[np.array(PngImagePlugin.PngImageFile(io.BytesIO(data)))][..., None]
        return imagecodecs.png_decode(data).reshape(height, width, stored)[..., :channels]

    orientation = picture.exif_orientation(found.get(b"eXIf", b""))
    return Picture((height, width, channels), dtype, decode, orientation, tuple(notes))


class JpegImageFile(JpegImagePlugin.JpegImageFile):
    """Pillow's reader, which reads no more than the header until the pixels are asked for."""

    def _read_dpi_from_exif(self) -> None:
        """The resolution is not needed, and looking for it warns on damaged EXIF."""


def open_jpeg(file: BinaryIO) -> Picture:
    """Open a JPEG file, grey or colour; the first picture of several in it.

    Raises:
      Refused: it is CMYK or too large.
    """
    return _open_with_pillow(JpegImageFile(file), file)


def open_bmp(file: BinaryIO) -> Picture:
    """Open a BMP file, grey or colour.

    Raises:
      Refused: it is a mask, has a palette or transparency, or is too large.
    """
    return _open_with_pillow(BmpImagePlugin.BmpImageFile(file), file)


def _open_with_pillow(image: ImageFile.ImageFile, file: BinaryIO) -> Picture:
    """Check what a plugin of Pillow has read from the header.

    Plugins are called by themselves, without `Image.open`, whose limit on pixels is a global that
    would stop a 20000x20000 field; `check_size` stands in its place.
    """
    if image.mode in ("1", "P"):
        raise Refused(picture.INDEXED)
    if image.mode not in ("L", "RGB"):
        raise Refused(f"has {image.mode} colours: save it as grey or RGB")
    shape, dtype = (image.height, image.width, len(image.mode)), np.dtype(np.uint8)
    check_size(shape, dtype, file_size(file))
    orientation = picture.exif_orientation(image.info.get("exif", b""))
    return Picture(shape, dtype, lambda: np.array(image).reshape(shape), orientation)
