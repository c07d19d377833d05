"""What holds for files of every format, damaged ones among them."""

import contextlib
import logging
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from PIL import Image

from jaxcells.data.images import SUFFIXES, ImageError, inspect_image, read_image, write_crop
from tests.data.pixels import assert_reads, assert_refused, random_pixels


def write_examples(folder):
    pixels = random_pixels((40, 30, 3))
    smooth = np.add.outer(np.arange(40), np.arange(30)).astype(np.uint16)
    for suffix in ("png", "jpg", "bmp"):
        Image.fromarray(pixels).save(folder / f"a.{suffix}")
    Image.fromarray(pixels).save(folder / "progressive.jpg", progressive=True)
    jpeg = {"compression": "jpeg", "photometric": "rgb", "rowsperstrip": 8}
    tifffile.imwrite(folder / "jpeg.tif", pixels, **jpeg)
    for kind in (None, "zlib", "lzw", "zstd"):
        tifffile.imwrite(folder / f"{kind}.tif", smooth, compression=kind, rowsperstrip=8)
    channels = np.stack([smooth, smooth + 1])
    for kind in ("imagej", "ome"):
        tifffile.imwrite(folder / f"{kind}.tif", channels, metadata={"axes": "CYX"}, **{kind: True})
    return sorted(folder.iterdir())


def test_truncated_files_are_refused_or_whole(tmp_path):
    for path in write_examples(tmp_path):
        whole, expected = path.read_bytes(), read_image(path)
        cuts = {0, 1, 4, 20, len(whole) // 2, *range(64, len(whole), 97)}
        refused = 0
        for cut in cuts | set(range(len(whole) - 40, len(whole))):
            path.write_bytes(whole[:cut])
            try:
                np.testing.assert_array_equal(read_image(path), expected, strict=True)
            except ImageError as error:
                assert str(error).startswith(f"{path}: ")  # noqa: PT017
                refused += 1
        assert refused >= len(cuts) - 1


def test_mutated_files_are_refused_cleanly_or_read_as_inspected(tmp_path):
    rng = np.random.default_rng(0)
    # imagecodecs' LZW decoder may crash on mutations.
    examples = [path for path in write_examples(tmp_path) if path.name != "lzw.tif"]
    originals = [path.read_bytes() for path in examples]
    for number in range(600):
        path = examples[number % len(examples)]
        data = bytearray(originals[number % len(examples)])
        for _ in range(rng.integers(1, 6)):
            limit = len(data) if number % 3 else min(len(data), 400)
            data[rng.integers(limit)] = rng.choice([0, 1, 255, rng.integers(256)])
        path.write_bytes(data)
        with contextlib.suppress(ImageError):
            pixels, info = read_image(path), inspect_image(path)
            assert pixels.shape == (info.height, info.width, info.channels)


def test_a_bug_of_ours_is_no_damaged_file(tmp_path, monkeypatch):
    path = write_examples(tmp_path)[-1]
    with monkeypatch.context() as patch:
        patch.delattr(tifffile.TiffPageSeries, "axes")
        with pytest.raises(AttributeError, match="axes"):
            read_image(path)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda page: 0)  # takes no maxworkers
    with pytest.raises(TypeError, match="maxworkers"):
        read_image(path)


def test_files_that_are_no_images(tmp_path):
    assert_refused(tmp_path / "none.png", "no such file")
    assert_refused(tmp_path, "is a folder")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    assert_refused(tmp_path / "pipe.png", "not an image file")
    contents = {
        "empty.png": (b"", "is empty"),
        "text.png": (
            b"<!DOCTYPE html>",
            "is no PNG, JPEG, TIFF, BMP, CZI, LIF or ND2 image: it begins with b'<!DOC",
        ),
        "stub.png": (b"\x89PNG\r\n\x1a\n", "truncated"),
        "stub.jpg": (b"\xff\xd8\xff\xe0", "damaged or cut short"),
        "stub.tif": (b"II*\0", "is truncated"),
        "empty.tif": (b"II*\0" + bytes(8), "damaged or cut short"),
        "stub.bmp": (b"BM", "damaged or cut short"),
        "cells.lsm": (b"II*\0\x08\0\0\0", "LSM file, which is not read: export"),
        "cells.nd2": (b"PK\3\4", "is no PNG, JPEG, TIFF, BMP, CZI, LIF or ND2 image"),
        "photo.heic": (b"\0\0\0\x18ftypheic", "HEIC file, which is not read: export"),
        "raw.dng": (b"II*\0\x08\0\0\0", "DNG file, which is not read"),
    }
    for name, (data, words) in contents.items():
        (tmp_path / name).write_bytes(data)
        assert_refused(tmp_path / name, words)


def test_content_decides_not_the_name(tmp_path):
    stacks = {".tif", ".tiff", ".stk", ".czi", ".lif", ".nd2"}
    assert {".png", ".jpg", ".jpeg", ".bmp", *stacks} == SUFFIXES
    pixels = random_pixels((6, 5, 3))
    Image.fromarray(pixels).save(tmp_path / "a.tif", "PNG")
    assert_reads(tmp_path / "a.tif", pixels)
    tifffile.imwrite(tmp_path / "a.PNG", pixels, photometric="rgb")
    assert_reads(tmp_path / "a.PNG", pixels)


def test_nothing_is_printed_or_logged_while_reading(tmp_path, capfd, caplog):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, random_pixels((6, 5)), software="x" * 40, metadata=None)
    with tifffile.TiffFile(path) as tif:
        place = tif.pages[0].tags["Software"].offset
    contents = bytearray(path.read_bytes())
    struct.pack_into("<I", contents, place + 8, 10**6)  # a value beyond the end
    path.write_bytes(contents)
    assert read_image(path).shape == (6, 5, 1)
    assert caplog.text == ""
    with tifffile.TiffFile(path):
        assert "invalid value offset" in caplog.text  # the same file, read by somebody else
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("tifffile").isEnabledFor(logging.WARNING)


def test_many_threads_read_the_same(tmp_path):
    paths = write_examples(tmp_path)
    expected = [read_image(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        for image, reference in zip(pool.map(read_image, paths * 8), expected * 8, strict=True):
            np.testing.assert_array_equal(image, reference, strict=True)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_crops_come_back_unchanged(tmp_path, dtype, channels):
    for shape in ((20, 30), (1, 1), (1, 7), (3, 1)):
        crop = random_pixels((*shape, channels), dtype)
        path = write_crop(tmp_path / "plate 1.5_[0001]", crop)
        png = (dtype, channels) in (("uint8", 1), ("uint8", 3), ("uint16", 1))
        assert path == tmp_path / f"plate 1.5_[0001]{'.png' if png else '.tif'}"
        assert_reads(path, crop)


def test_crops_from_views_and_extremes(tmp_path):
    field = random_pixels((50, 60, 4), "float32")
    field[:, :, 0] = np.finfo(np.float32).max
    view = field[5:25, 7:27, ::2]
    assert_reads(write_crop(tmp_path / "a", view), view)
