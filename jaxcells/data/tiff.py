"""TIFF, BigTIFF, OME-TIFF, ImageJ and MetaMorph files: axes are read, never guessed."""

import contextlib
import contextvars
import io
import logging
import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import BinaryIO, Literal

import numpy as np
from tifffile import COMPRESSION, PHOTOMETRIC, TiffFile, TiffPage, TiffPageSeries

from jaxcells.data import picture
from jaxcells.data.picture import Picture, Refused, check_size, file_size
from jaxcells.data.planes import Plane, choose_series, select
from jaxcells.data.raster import JpegImageFile
from jaxcells.text import by

# What decoders log in threads that read for us is dropped; other threads keep their messages.
_reading = contextvars.ContextVar("reading", default=False)
for _decoder in ("tifffile", "czifile", "liffile"):
    logging.getLogger(_decoder).addFilter(lambda record: not _reading.get())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps decoders and NumPy from speaking about a file that this thread reads."""
    token = _reading.set(True)
    try:
        with np.errstate(all="ignore"):  # MetaMorph tags may hold the fraction 0/0
            yield
    finally:
        _reading.reset(token)


def _check_page_list(file: BinaryIO) -> None:
    """Follow the list of pages to its end.

    tifffile cuts a damaged list short with a line in its log, so that a truncated stack would pass
    for a single plane, and a list that loops can keep it busy for ever.

    Raises:
      Refused: the list leaves the file or loops.
    """
    size = file_size(file)
    order: Literal["little", "big"] = "little" if file.read(2) == b"II" else "big"
    seen: set[int] = set()

    def number(at: int, width: int) -> int:
        if at + width > size:
            raise Refused(f"is truncated: the file ends inside its list of pages, at {len(seen)}")
        file.seek(at)
        return int.from_bytes(file.read(width), order)

    count_size, offset_size, entry_size = (8, 8, 20) if number(2, 2) == 43 else (2, 4, 12)
    place = offset_size  # of the offset of the first page, in both kinds of TIFF
    while page := number(place, offset_size):
        if page in seen:
            raise Refused("is damaged: its list of pages runs in a circle")
        seen.add(page)
        place = page + count_size + number(page, count_size) * entry_size


def _choose_series(tif: TiffFile, plane: Plane) -> TiffPageSeries:
    """Return the one full-resolution image of a file, or the one that `plane` names.

    Raises:
      Refused: there are several and none is chosen, or none that can be trusted.
    """
    if tif.is_lsm:
        raise Refused("is a Zeiss LSM file: export it as OME-TIFF (Fiji does)")
    found = list(tif.series)
    if found[0].kind in ("uniform", "generic") and (tif.is_imagej or tif.is_stk):
        raise Refused("is damaged: it has not the pages that its own description lists")
    # Thumbnails, reduced copies and transparency masks say so in their NewSubfileType tag.
    series = [s for s in found if not (s.keyframe.is_reduced or s.keyframe.is_mask)] or found
    return series[choose_series([f"{s.axes} {by(s.shape)}" for s in series], plane)]


def _has_alpha(page: TiffPage) -> bool:
    """Tell whether the last sample of each pixel is alpha.

    A single extra sample is alpha where ExtraSamples (TIFF 6.0, section 18) says so and, after
    red, green and blue, also where it says nothing. Several extra samples are channels.
    """
    if page.photometric in (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR):
        return bool(page.samplesperpixel == 4)
    return page.samplesperpixel == 2 and any(kind in (1, 2) for kind in page.extrasamples)


def _check_page(page: TiffPage) -> list[str]:
    """Return notes on what the samples of a page mean.

    Raises:
      Refused: they are not intensities, or not of a type that is kept.
    """
    photometric, bits = page.photometric, page.bitspersample
    read = [PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.PALETTE]
    read += [PHOTOMETRIC.YCBCR] * (page.compression == COMPRESSION.JPEG)
    if page.compression == COMPRESSION.OJPEG:
        raise Refused("has old-style JPEG compression, which readers decode differently: resave it")
    picture.check_dtype(np.dtype("V") if page.dtype is None else page.dtype)
    numbers = (page.samplesperpixel, page.rowsperstrip, *page.shape, *(page.tile or ()))
    if not all(isinstance(number, int) for number in numbers):
        raise Refused("is damaged: a size in its tags is no whole number")
    if photometric not in read:
        name = str(getattr(photometric, "name", photometric)).replace("SEPARATED", "CMYK")
        raise Refused(f"has {name} colours: convert it to grey or RGB")
    notes = []
    if photometric == PHOTOMETRIC.PALETTE:
        if page.colormap is None or not picture.is_lookup_ramp(page.colormap.T):
            raise Refused(picture.INDEXED)
        notes.append(picture.LOOKUP_TABLE)
    if photometric == PHOTOMETRIC.MINISWHITE:
        notes.append("white is zero (MinIsWhite); values are as stored, not inverted")
    if bits not in (8, 16, 32):
        notes.append(f"{bits}-bit samples; values are as stored, not scaled")
    if _has_alpha(page):
        notes.append(picture.ALPHA)
    return notes


def _check_segments(page: TiffPage, size: int) -> None:
    """Refuse a page whose strips or tiles are not all there: tifffile would read them as zeros."""
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    expected = math.prod(page.chunked)
    if page.is_contiguous:
        segments, expected = [(page.dataoffsets[0], page.nbytes)], 1
    if len(segments) < expected:
        raise Refused(f"is damaged: it lists {len(segments)} of its {expected} strips or tiles")
    for offset, count in segments:
        if isinstance(offset, float) or isinstance(count, float) or min(offset, count) <= 0:
            raise Refused("is damaged: a strip or tile has no data")
        _check_end(offset + count, size)


def _check_end(needed: int, size: int) -> None:
    if needed > size:
        raise Refused(f"is truncated: it needs {needed} bytes and has {size}")


def _decode(page: TiffPage, file: BinaryIO) -> np.ndarray:
    """Decode a page; JPEG strips that end early, which libjpeg fills with grey, are refused."""
    if page.compression == COMPRESSION.JPEG:
        *_, most_rows, most_columns = page.tile or (page.rowsperstrip, page.imagewidth)
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
            file.seek(offset)
            data = file.read(count)
            if not data.rstrip(b"\0\xff").endswith(b"\xff\xd9"):
                raise Refused("is truncated: a JPEG strip or tile has no end")
            columns, rows = JpegImageFile(io.BytesIO(data)).size  # reads the header alone
            if rows > most_rows or columns > most_columns:
                raise Refused("is damaged: a JPEG strip or tile is larger than its place")
    # Callers read many files at once; threads within one would only compete with them.
    return page.asarray(maxworkers=1)


def _page_reader(
    tif: TiffFile, series: TiffPageSeries, file: BinaryIO, wanted: Collection[int]
) -> Callable[[int], np.ndarray]:
    """Return a function that decodes one of the wanted pages; all checks come before.

    Args:
      tif: the open file, as tifffile sees it.
      series: to read from.
      file: the open file.
      wanted: indices of pages in `series`.
    """
    keyframe, size = series.keyframe, file_size(file)
    num_pages = math.prod(series.shape) // math.prod(keyframe.shape)
    fewer = min(len(series), len(tif.pages)) < num_pages
    if fewer and series.dataoffset is not None and keyframe.parent is tif:
        # One page describes them all; their pixels follow one another (large ImageJ stacks, STK).
        dtype = keyframe.dtype.newbyteorder(tif.byteorder)
        _check_end(series.dataoffset + num_pages * keyframe.nbytes, size)

        def read(k: int) -> np.ndarray:
            file.seek(series.dataoffset + k * keyframe.nbytes)
            pixels = np.frombuffer(file.read(keyframe.nbytes), dtype)
            return pixels.reshape(keyframe.shape).astype(keyframe.dtype)

        return read

    pages = {}
    for k in wanted:
        frame = series[k] if k < len(series) else None
        if frame is None or frame.parent is not tif:
            raise Refused(
                f"lacks page {k} of the {num_pages} it describes: it is one file of a set, or an "
                "acquisition that was cut short"
            )
        # A frame takes its layout from the first page on trust; the page itself is asked here.
        page = pages[k] = frame if frame.is_virtual else frame.aspage()
        if (page.shape, page.dtype) != (keyframe.shape, keyframe.dtype):
            raise Refused(f"has pages of different sizes or types (page {k})")
        _check_page(page.keyframe)
        _check_segments(page, size)
    return lambda k: _decode(pages[k], file)


def open_tiff(file: BinaryIO, plane: Plane) -> Picture:
    """Open a TIFF file and find the one picture in it; other files of its set are not touched.

    Args:
      file: open for reading, until the picture has been decoded.
      plane: what `planes.parse_plane` returned.

    Raises:
      Refused: the axes leave a choice, the pixels are no intensities, or the file is damaged.
    """
    _check_page_list(file)
    # This file alone: tifffile would gather the others of a set.
    tif, size = TiffFile(file, offset=0, is_mmstack=False, is_ndtiff=False), file_size(file)
    # OME-XML gives each file of a set a UUID, and repeats that of its own beside the pages.
    uuids = re.findall(r"urn:uuid:[^<>\"'\s]+", tif.ome_metadata or "", re.IGNORECASE)
    if len({uuid.lower() for uuid in uuids}) > 1:
        tif.is_ome = False
    series = _choose_series(tif, plane)
    keyframe = series.keyframe
    notes = _check_page(keyframe)
    if series.transform is not None:
        raise Refused("stores scaled values (a gel scanner's format): export it as plain TIFF")
    if tif.pages[0].is_ome and series.kind != "ome":
        notes.append("OME metadata not used (a multi-file set?); only this file is read")
    named = zip(series.axes, series.shape, strict=True)
    sizes = [(axis, n) for axis, n in named if n != 1 or axis in "XY"]
    axes, shape = "".join(axis for axis, _ in sizes), tuple(n for _, n in sizes)
    inner = len(keyframe.shape)
    if shape[-inner:] != keyframe.shape or not {*"YX"} <= {*axes[-inner:]}:
        raise Refused(f"has pages {keyframe.shape} that do not fit its axes {axes} {shape}")
    if math.prod(shape[:-inner]) > size:
        raise Refused(f"is damaged: it describes more pages ({by(shape)}) than it has bytes")
    selection = select(axes, shape, inner, plane)
    dtype = keyframe.dtype.newbyteorder("=")
    check_size(selection.shape, dtype, size)
    # A small image may claim a tile that is not.
    *_, rows, columns = keyframe.tile or (1, 1)
    check_size((rows, columns, keyframe.samplesperpixel), dtype, size)
    read = _page_reader(tif, series, file, {k for pages in selection.pages for k in pages})
    height, width, channels = selection.shape
    channels -= channels > len(selection.pages) and _has_alpha(keyframe)
    tag = keyframe.tags.valueof(274)
    return Picture(
        (height, width, channels),
        dtype,
        decode=lambda: selection.assemble(read)[..., :channels],
        orientation=int(tag) if tag in range(1, 9) else 1,
        notes=(*notes, *selection.notes),
    )
