"""TIFF, BigTIFF, OME-TIFF, ImageJ and MetaMorph files: axes are read, never guessed."""

import logging
import math
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO

import numpy as np
import tifffile

from jaxcells.data.picture import (
    Picture,
    Refused,
    check_dtype,
    check_size,
    file_size,
    is_lookup_ramp,
)
from jaxcells.data.planes import OPTION, Plane, select

_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_OLD_JPEG, _JPEG = 6, 7


class _Quiet(logging.Filter):
    """Drops what tifffile logs in threads that read for us; other threads keep their messages."""

    local = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(self.local, "reading", False)


logging.getLogger("tifffile").addFilter(_Quiet())


@contextmanager
def _quiet() -> Iterator[None]:
    _Quiet.local.reading = True
    try:
        with np.errstate(all="ignore"):  # MetaMorph tags may hold the fraction 0/0
            yield
    finally:
        _Quiet.local.reading = False


def _check_page_list(file: BinaryIO) -> None:
    """Follow the list of pages to its end.

    tifffile cuts a damaged list short with a line in its log, so that a truncated stack would pass
    for a single plane, and a list that loops can keep it busy for ever.

    Raises:
      Refused: the list leaves the file or loops.
    """
    size = file_size(file)
    file.seek(0)
    head = file.read(16).ljust(16, b"\0")
    order = "<" if head[:2] == b"II" else ">"
    is_big = struct.unpack_from(f"{order}H", head, 2)[0] == 43
    count_type, offset_type, entry_size = ("Q", "Q", 20) if is_big else ("H", "I", 12)
    count_size, offset_size = struct.calcsize(count_type), struct.calcsize(offset_type)
    (offset,) = struct.unpack_from(f"{order}{offset_type}", head, 8 if is_big else 4)
    seen: set[int] = set()
    while offset:
        if offset in seen:
            raise Refused("is damaged: its list of pages runs in a circle")
        seen.add(offset)
        if offset + count_size > size:
            raise Refused(f"is truncated: page {len(seen)} lies beyond the end of the file")
        file.seek(offset)
        (count,) = struct.unpack(f"{order}{count_type}", file.read(count_size))
        end = offset + count_size + count * entry_size
        if end + offset_size > size:
            raise Refused(f"is truncated: the file ends inside the tags of page {len(seen)}")
        file.seek(end)
        (offset,) = struct.unpack(f"{order}{offset_type}", file.read(offset_size))
    if not seen:
        raise Refused("has no pages")


def _choose_series(tif: tifffile.TiffFile, plane: Plane) -> tifffile.TiffPageSeries:
    """Return the one full-resolution image of a file, or the one that `plane` names.

    Raises:
      Refused: there are several and none is chosen, or none that can be trusted.
    """
    if tif.is_lsm:
        raise Refused("is a Zeiss LSM file: export it as OME-TIFF (Fiji does)")
    if tif.series[0].kind in ("uniform", "generic") and (tif.is_imagej or tif.is_stk):
        raise Refused("is damaged: it has not the pages that its own description lists")
    # Thumbnails, reduced copies and transparency masks say so in their NewSubfileType tag.
    whole = [s for s in tif.series if not (s.keyframe.is_reduced or s.keyframe.is_mask)]
    series = whole or tif.series
    index = plane.get("series", 0)
    if len(series) > 1 and ("series" not in plane or not int(index) < len(series)):
        sizes = ", ".join(f"{s.axes} {'x'.join(map(str, s.shape))}" for s in series[:6])
        raise Refused(
            f"has {len(series)} separate images ({sizes}): choose one with {OPTION}series=0 "
            f"(0 to {len(series) - 1})"
        )
    return series[int(index) if len(series) > 1 else 0]


def _has_alpha(page: tifffile.TiffPage) -> bool:
    """Tell whether the last sample of each pixel is alpha.

    A single extra sample is alpha where ExtraSamples (TIFF 6.0, section 18) says so and, after
    red, green and blue, also where it says nothing. Several extra samples are channels.
    """
    is_colour = page.photometric in (_RGB, _YCBCR)
    if page.samplesperpixel != (4 if is_colour else 2):
        return False
    return is_colour or any(kind in (1, 2) for kind in page.extrasamples)


def _check_page(page: tifffile.TiffPage) -> list[str]:
    """Return notes on what the samples of a page mean.

    Raises:
      Refused: they are not intensities, or not of a type that is kept.
    """
    notes = []
    if page.compression == _OLD_JPEG:
        raise Refused("has old-style JPEG compression, which readers decode differently: resave it")
    if page.dtype is None:
        raise Refused(
            f"has {page.bitspersample}-bit samples of format {page.sampleformat!r}: convert it to "
            "8-bit or 16-bit unsigned, or float32"
        )
    check_dtype(page.dtype)
    photometric = page.photometric
    readable = photometric in (_MINISWHITE, _MINISBLACK, _RGB, _PALETTE)
    if not readable and not (photometric == _YCBCR and page.compression == _JPEG):
        name = "CMYK" if photometric == _CMYK else getattr(photometric, "name", photometric)
        raise Refused(f"has {name} colours: convert it to grey or RGB")
    if photometric == _PALETTE:
        if page.colormap is None or not is_lookup_ramp(page.colormap.T):
            raise Refused(
                "has indexed colours (a label image, or a photograph reduced to a palette): save "
                "it as grey or RGB (in ImageJ, Image > Lookup Tables > Grays)"
            )
        notes.append("palette is a lookup table; its indices are read as intensities")
    if photometric == _MINISWHITE:
        notes.append("white is zero (MinIsWhite); values are as stored, not inverted")
    if page.bitspersample not in (8, 16, 32):
        notes.append(f"{page.bitspersample}-bit samples; values are as stored, not scaled")
    if _has_alpha(page):
        is_premultiplied = 1 in page.extrasamples
        how = " (colours are premultiplied with it, as stored)" * is_premultiplied
        notes.append(f"alpha channel dropped{how}")
    return notes


def _check_segments(page: tifffile.TiffPage, size: int) -> None:
    """Refuse a page whose strips or tiles are not all there: tifffile would read them as zeros."""
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    expected = math.prod(page.chunked)
    if page.is_contiguous:
        segments, expected = [(page.dataoffsets[0], page.nbytes)], 1
    if len(segments) < expected:
        raise Refused(f"is damaged: it lists {len(segments)} of its {expected} strips or tiles")
    for offset, count in segments:
        if offset <= 0 or count <= 0:
            raise Refused("is damaged: a strip or tile has no data")
        if offset + count > size:
            raise Refused(f"is truncated: it needs {offset + count} bytes and has {size}")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Rows and columns that a JPEG stream declares; zeros where it declares none."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return struct.unpack_from(">HH", data, at + 5)
        at += 1 if marker == 0xFF else 2 + length
    return 0, 0


def _check_jpeg_segments(page: tifffile.TiffPage, file: BinaryIO) -> None:
    """Refuse JPEG strips that end early, which libjpeg fills with grey, or that are too large."""
    *_, most_rows, most_columns = page.tile or (page.rowsperstrip, page.imagewidth)
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        file.seek(offset)
        data = file.read(count)
        if not data.rstrip(b"\0\xff").endswith(b"\xff\xd9"):
            raise Refused("is truncated: a JPEG strip or tile has no end")
        rows, columns = _jpeg_size(data)
        if rows > most_rows or columns > most_columns:
            raise Refused("is damaged: a JPEG strip or tile is larger than its place")


def _page_readers(
    series: tifffile.TiffPageSeries, file: BinaryIO, indices: tuple[int, ...], page_count: int
) -> list[Callable[[], np.ndarray]]:
    """Return, for each page asked for, a function that decodes it; all checks come before.

    Args:
      series: to read from.
      file: the open file.
      indices: of pages in `series`.
      page_count: how many pages the axes of `series` amount to.
    """
    keyframe, tif = series.keyframe, series.parent
    size = file_size(file)
    fewer = min(len(series), len(tif.pages)) < page_count
    if fewer and series.dataoffset is not None:
        # One page describes them all; their pixels follow one another (large ImageJ stacks, STK).
        nbytes, dtype = keyframe.nbytes, keyframe.dtype.newbyteorder(tif.byteorder)
        needed = series.dataoffset + page_count * nbytes
        if needed > size:
            raise Refused(f"is truncated: it needs {needed} bytes and has {size}")

        def read_at(offset: int) -> np.ndarray:
            file.seek(offset)
            pixels = np.frombuffer(file.read(nbytes), dtype).reshape(keyframe.shape)
            return pixels.astype(keyframe.dtype)

        return [partial(read_at, series.dataoffset + k * nbytes) for k in indices]

    readers: list[Callable[[], np.ndarray]] = []
    for k in indices:
        frame = series[k] if k < len(series) else None
        if frame is None:
            raise Refused(
                f"lacks page {k} of the {page_count} it describes: it is one file of a set, or an "
                "acquisition that was cut short"
            )
        # A frame takes its layout from the first page on trust; the page itself is asked here.
        page = frame if frame.is_virtual else frame.aspage()
        if (page.shape, page.dtype) != (keyframe.shape, keyframe.dtype):
            raise Refused(f"has pages of different sizes or types (page {k})")
        _check_page(page.keyframe)
        _check_segments(page, size)
        readers.append(partial(_decode, page, file))
    return readers


def _decode(page: tifffile.TiffPage, file: BinaryIO) -> np.ndarray:
    if page.compression == _JPEG:
        _check_jpeg_segments(page, file)
    # Callers read many files at once; threads within one would only compete with them.
    return page.asarray(maxworkers=1)


def open_tiff(file: BinaryIO, plane: Plane) -> Picture:
    """Open a TIFF file and find the one picture in it; other files of its set are not touched.

    Args:
      file: open for reading, until the picture has been decoded.
      plane: what `planes.parse_plane` returned.

    Raises:
      Refused: the axes leave a choice, the pixels are no intensities, or the file is damaged.
    """
    size = file_size(file)
    _check_page_list(file)
    file.seek(0)
    with _quiet():
        # The arguments keep tifffile from gathering the other files of a set.
        tif = tifffile.TiffFile(file, _multifile=False, is_mmstack=False, is_ndtiff=False)
        series = _choose_series(tif, plane)
        keyframe = series.keyframe
        notes = _check_page(keyframe)
        if series.transform is not None:
            raise Refused("stores scaled values (a gel scanner's format): export it as plain TIFF")
        if tif.is_ome and series.kind != "ome":
            notes.append("OME metadata not used (a multi-file set?); only this file is read")
        axes, shape = series.get_axes(squeeze=True), series.get_shape(squeeze=True)
        inner = len(keyframe.shape)
        within = dict(zip(axes[-inner:], shape[-inner:], strict=False))
        if shape[-inner:] != keyframe.shape or not within.keys() >= {"Y", "X"}:
            raise Refused(f"has pages {keyframe.shape} that do not fit its axes {axes} {shape}")
        selection = select(axes, shape, inner, plane)
        height, width = within["Y"], within["X"]
        dtype = keyframe.dtype.newbyteorder("=")
        check_size(height, width, selection.channels, dtype, size)
        # A small image may claim a tile that is not.
        *_, tile_height, tile_width = keyframe.tile or (1, 1)
        check_size(tile_height, tile_width, keyframe.samplesperpixel, dtype, size)
        readers = _page_readers(series, file, selection.pages, math.prod(shape[:-inner]))
        samples = selection.channels // len(readers)
        channels = selection.channels - int(samples > 1 and _has_alpha(keyframe))

    def decode() -> np.ndarray:
        with _quiet():
            parts = (selection.take(read()) for read in readers)
            if len(readers) == 1:
                return next(parts)[..., :channels]
            pixels = np.empty((height, width, selection.channels), dtype)
            for k, part in enumerate(parts):
                pixels[..., k * samples : (k + 1) * samples] = part
            return pixels

    orientation = keyframe.tags.valueof(274, default=1)
    return Picture(height, width, channels, dtype, decode, orientation, tuple(notes))
