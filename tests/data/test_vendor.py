"""CZI, LIF and ND2: on the smallest files of each kind, written here byte by byte.

The formats: ZISRAW 1.2.2 (Zeiss), LIF version 2 as in Leica's file format description, ND2 version
2.1 as the package nd2 reads it. What a microscope writes besides, such as pyramids and compressed
pixels, is not covered but by one CZI file, where the collection of image formats is at hand.
"""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxcells.data import picture
from jaxcells.data.images import inspect_image, read_image
from tests.data.pixels import assert_reads, assert_refused, random_pixels

REAL = Path(__file__).parents[3] / "shared/data/formats/microscopy/test_image.czi"


def need(package):
    return pytest.importorskip(package, reason=f"{package} is not installed (extra formats)")


def write_czi(path, tiles):
    """Writes tiles: (pixels [H, W] or [H, W, 3], {dimension: start}, stored side or None)."""
    kinds = {
        ("uint8", 2): 0,
        ("uint16", 2): 1,
        ("float32", 2): 2,
        ("uint8", 3): 3,
        ("int32", 2): 12,
    }

    def segment(name, data):
        data = data.ljust(-(-len(data) // 32) * 32, b"\0")
        return struct.pack("<16sqq", name, len(data), len(data)) + data

    body, entries, place = b"", [], 32 + 512
    for pixels, starts, stored in tiles:
        sizes = {"X": pixels.shape[1], "Y": pixels.shape[0]}
        entry = struct.pack("<2siqiiBB4si", b"DV", kinds[pixels.dtype.name, pixels.ndim], place, 0,
                            0, 0, 0, b"", len({**sizes, **starts}))  # fmt: skip
        for name in {**sizes, **starts}:
            size = sizes.get(name, 1)
            start = starts.get(name, 0)
            fields = (name.encode(), start, size, float(start), stored if name in sizes else size)
            entry += struct.pack("<4siifi", *fields)
        data = (pixels[..., ::-1] if pixels.ndim == 3 else pixels).tobytes()
        head = struct.pack("<iiq", 0, 0, len(data)) + entry.ljust(240, b"\0")
        body += segment(b"ZISRAWSUBBLOCK", head + data)
        place = 32 + 512 + len(body)
        entries.append(entry)
    directory = segment(
        b"ZISRAWDIRECTORY", struct.pack("<i124s", len(entries), b"") + b"".join(entries)
    )
    header = struct.pack("<iiii16s16siqqiq", 1, 0, 0, 0, b"", b"", 0, place, 0, 0, 0)
    path.write_bytes(segment(b"ZISRAWFILE", header.ljust(512, b"\0")) + body + directory)
    return path


def tile(pixels, stored=0, **starts):
    return pixels, starts, stored


def write_lif(path, images):
    """Writes images: name -> (axes such as "ZCYX", array); the channels may be axis C or S."""
    ids = {"X": 1, "Y": 2, "Z": 3, "T": 4, "M": 10}
    elements, blocks = "", b""
    for number, (name, (axes, array)) in enumerate(images.items()):
        kind, strides = int(array.dtype.kind == "f"), dict(zip(axes, array.strides, strict=True))
        shape = dict(zip(axes, array.shape, strict=True))
        channel = next((axis for axis in "CS" if axis in axes), "")
        channels = "".join(
            f'<ChannelDescription DataType="{kind}" ChannelTag="{c + 1 if channel == "S" else 0}" '
            f'Resolution="{8 * array.itemsize}" NameOfMeasuredQuantity="" Min="0" Max="1" Unit="" '
            f'LUTName="" IsLUTInverted="0" BytesInc="{c * strides.get(channel, 0)}" BitInc="0"/>'
            for c in range(shape.get(channel, 1))
        )
        dimensions = "".join(
            f'<DimensionDescription DimID="{ids[axis]}" NumberOfElements="{shape[axis]}" '
            f'Origin="0" Length="1" Unit="m" BytesInc="{strides[axis]}" BitInc="0"/>'
            for axis in reversed(axes)
            if axis in ids
        )
        elements += (
            f'<Element Name="{name}"><Data><Image><ImageDescription><Channels>{channels}'
            f"</Channels><Dimensions>{dimensions}</Dimensions></ImageDescription></Image></Data>"
            f'<Memory Size="{array.nbytes}" MemoryBlockID="Mem{number}"/></Element>'
        )
        block = f"Mem{number}".encode("utf-16-le")
        size = 13 + len(block)
        blocks += struct.pack("<IIBQBI", 0x70, size, 0x2A, array.nbytes, 0x2A, len(block) // 2)
        blocks += block + array.tobytes()
    xml = (
        '<LMSDataContainerHeader Version="2"><Element Name="all"><Children>'
        f"{elements}</Children></Element></LMSDataContainerHeader>"
    ).encode("utf-16-le")
    head = struct.pack("<IIBI", 0x70, len(xml) + 5, 0x2A, len(xml) // 2)
    path.write_bytes(head + xml + blocks)
    return path


def write_nd2(path, array, *, times=1, samples=1, left_out=(), bits=None):
    """Writes `times` frames [T, H, W, channels]; samples: of a pixel that are one channel."""
    _, height, width, components = array.shape
    bits = bits or 8 * array.itemsize

    def variant(values, kind="lx_uint32"):
        return "".join(f'<{k} runtype="{kind}" value="{v}"/>' for k, v in values.items())

    def document(inner):
        return (
            f'<variant version="1.0"><no_name runtype="CLxListVariant">{inner}</no_name></variant>'
        ).encode()

    attributes = {
        "uiBpcInMemory": bits, "uiBpcSignificant": bits, "uiComp": components,
        "uiHeight": height, "uiWidth": width, "uiSequenceCount": times,
        "uiWidthBytes": width * components * bits // 8, "eCompression": 2,
    }  # fmt: skip
    planes = f'<sPicturePlanes runtype="CLx">{variant({"uiCount": components // samples})}'
    loop = variant({"uiCount": times}) + variant(
        {"dStart": 0, "dPeriod": 1, "dDuration": 1}, "double"
    )
    experiment = f'{variant({"eType": 1})}<uLoopPars runtype="CLx">{loop}</uLoopPars>'
    chunks = {
        "ImageAttributes!": document(variant(attributes)),
        "ImageMetadataSeq|0!": document(planes + "</sPicturePlanes>"),
        "ImageMetadata!": document(experiment),
    }
    for time in set(range(times)) - set(left_out):
        chunks[f"ImageDataSeq|{time}!"] = bytes(8) + array[time].tobytes()
    magic, places = 0x0ABECEDA, b""
    content = struct.pack("<IIQ32s64s", magic, 32, 64, b"ND2 FILE SIGNATURE CHUNK NAME01!",
                          b"Ver2.1").ljust(4096, b"\0")  # fmt: skip
    for name, data in chunks.items():
        places += name.encode() + struct.pack("<QQ", len(content), len(data))
        # Frames begin 4096 bytes after their chunk, 8 bytes into its data.
        head = struct.pack("<IIQ", magic, 4096 - 16 - 8, len(data)) + name.encode()
        content += (head.ljust(4096 - 8, b"\0") + data).ljust(8192, b"\0")
    end = b"ND2 CHUNK MAP SIGNATURE 0000001!" + struct.pack("<Q", len(content))
    head = struct.pack("<IIQ", magic, 32, len(places + end)) + b"ND2 FILEMAP SIGNATURE NAME 0001!"
    path.write_bytes(content + head + places + end)
    return path


# --- Missing packages ---


@pytest.mark.parametrize(
    ("name", "package"), [("a.czi", "czifile"), ("a.lif", "liffile"), ("a.nd2", "nd2")]
)
def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)  # importing it now fails
    pixels = random_pixels((4, 5, 1))
    if package == "czifile":
        write_czi(tmp_path / name, [tile(pixels[..., 0])])
    elif package == "liffile":
        write_lif(tmp_path / name, {"a": ("YX", pixels[..., 0])})
    else:
        write_nd2(tmp_path / name, pixels[None])
    words = ["pip install 'jaxcells[formats]'", "export it as OME-TIFF"]
    words += ["Python 3.12"] * (package != "nd2")
    assert_refused(tmp_path / name, f"needs the package {package}", *words)


# --- CZI ---


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_czi_keeps_its_type_and_channels(tmp_path, dtype):
    need("czifile")
    pixels = random_pixels((6, 5, 3), dtype)
    tiles = [tile(pixels[..., c], C=c, S=0) for c in range(3)]
    assert_reads(write_czi(tmp_path / "a.czi", tiles), pixels)


def test_czi_colours_are_red_green_blue(tmp_path):
    need("czifile")
    pixels = random_pixels((6, 5, 3))
    assert_reads(write_czi(tmp_path / "a.czi", [tile(pixels)]), pixels)


def test_czi_planes_are_chosen_or_projected(tmp_path):
    need("czifile")
    pixels = random_pixels((2, 3, 6, 5), "uint16")  # Z, C; the first Z is 4
    tiles = [tile(pixels[z, c], C=c, Z=z + 4) for z in range(2) for c in range(3)]
    path = write_czi(tmp_path / "a.czi", tiles)
    assert_refused(path, "2 z-planes (axis Z)", "data.plane=Z=0")
    assert_reads(path, pixels[1].transpose(1, 2, 0), plane="Z=1")
    expected = pixels.max(0).transpose(1, 2, 0)
    assert_reads(path, expected, plane="Z=max", notes=["maximum over 2 z-planes"])


def test_czi_scenes_are_chosen_and_mosaics_put_together(tmp_path):
    need("czifile")
    a, b, c = random_pixels((3, 4, 5), "uint16")
    tiles = [tile(a, S=0, M=0), tile(b, S=0, M=1, X=3, Y=1), tile(c, S=1, M=0)]
    path = write_czi(tmp_path / "a.czi", tiles)
    assert_refused(path, "2 separate images (YX 5x8, YX 4x5)", "data.plane=series=0 (0 to 1)")
    assert_reads(path, c[..., None], plane="series=1")
    mosaic = np.zeros((5, 8), "uint16")
    mosaic[:4, :5], mosaic[1:, 3:] = a, b
    assert_reads(path, mosaic[..., None], plane="series=0", notes=["a mosaic of 2 tiles"])


def test_czi_that_would_be_converted_or_is_not_whole_is_refused(tmp_path, monkeypatch):
    need("czifile")
    pixels = random_pixels((6, 5), "uint16")
    path = tmp_path / "a.czi"
    write_czi(path, [tile(pixels, C=0), tile(pixels.astype("uint8"), C=1)])
    assert_refused(path, "channels of several pixel types")
    assert_refused(write_czi(path, [tile(pixels.astype("int32"))]), "int32 pixels", "a mask")
    assert_refused(write_czi(path, [tile(pixels, stored=3)]), "stores others than it shows")
    # What the header says is enough to refuse; missing tiles are found when they are read.
    write_czi(path, [tile(pixels, Z=0, C=0), tile(pixels, Z=0, C=1), tile(pixels, Z=1, C=0)])
    assert_refused(path, "probably damaged or cut short", plane="Z=1", inspect=False)
    write_czi(path, [tile(pixels), tile(pixels, X=9_000_000, Y=9_000_000)])
    assert_refused(path, "GiB")
    write_czi(path, [tile(pixels)])
    path.write_bytes(path.read_bytes()[:700])
    assert_refused(path, "damaged or cut short")
    monkeypatch.setattr(picture, "MAX_BYTES", 59)
    assert_refused(write_czi(path, [tile(pixels)]), "cut it into fields")


@pytest.mark.skipif(not REAL.exists(), reason="the collection of image formats is not at hand")
def test_a_czi_file_of_a_microscope_is_read(tmp_path, capfd, caplog):
    czifile = need("czifile")
    pixels, info = read_image(REAL), inspect_image(REAL)
    assert (info.height, info.width, info.channels, info.dtype) == (*pixels.shape, pixels.dtype)
    expected = czifile.imread(REAL)
    assert sorted(expected.shape) == sorted(n for n in pixels.shape if n > 1)
    assert expected.sum(dtype=float) == pixels.sum(dtype=float)
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


# --- LIF ---


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_lif_keeps_its_type_and_channels(tmp_path, dtype):
    need("liffile")
    pixels = random_pixels((3, 6, 5), dtype)
    path = write_lif(tmp_path / "a.lif", {"a": ("CYX", pixels)})
    assert_reads(path, pixels.transpose(1, 2, 0))


def test_lif_images_and_planes_are_chosen_by_number(tmp_path):
    need("liffile")
    one, stack = random_pixels((6, 5)), random_pixels((4, 3, 6, 5))
    images = {"overview": ("YX", one), "cells": ("ZCYX", stack), "colour": ("YXS", stack[0].T)}
    images["colour"] = ("YXS", np.ascontiguousarray(random_pixels((6, 5, 3))))
    path = write_lif(tmp_path / "a.lif", images)
    assert_refused(path, "3 separate images (overview: 6x5, cells: 4x3x6x5", "data.plane=series=0")
    assert_reads(path, one[..., None], plane="series=0")
    assert_refused(path, "4 z-planes (axis Z)", plane="series=1")
    assert_reads(path, stack[2].transpose(1, 2, 0), plane="series=1,Z=2")
    assert_reads(path, images["colour"][1], plane="series=2")
    tiles = write_lif(tmp_path / "b.lif", {"mosaic": ("MYX", stack[0])})
    assert_refused(tiles, "3 positions (axis R)")
    assert_reads(tiles, stack[0, 1][..., None], plane="R=1")


def test_lif_that_is_not_whole_is_refused(tmp_path):
    need("liffile")
    path = write_lif(tmp_path / "a.lif", {"a": ("ZYX", random_pixels((2, 60, 50)))})
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert_refused(path, "damaged or cut short", plane="Z=1", inspect=False)
    more = 'NumberOfElements="2"'.encode("utf-16-le"), 'NumberOfElements="9"'.encode("utf-16-le")
    path.write_bytes(content.replace(*more))
    assert_refused(path, "is damaged", plane="Z=1")


# --- ND2 ---


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_nd2_keeps_its_type_and_channels(tmp_path, dtype):
    need("nd2")
    pixels = random_pixels((6, 5, 2), dtype)
    assert_reads(write_nd2(tmp_path / "a.nd2", pixels[None]), pixels)
    grey = random_pixels((6, 5, 1), dtype)
    assert_reads(write_nd2(tmp_path / "b.nd2", grey[None]), grey)


def test_nd2_planes_are_chosen_or_projected(tmp_path):
    need("nd2")
    pixels = random_pixels((3, 6, 5, 3), "uint16")
    path = write_nd2(tmp_path / "a.nd2", pixels, times=3)
    assert_refused(path, "3 time points (axis T)", "data.plane=T=0")
    assert_reads(path, pixels[2], plane="T=2")
    assert_reads(path, pixels.max(0), plane="T=max", notes=["maximum over 3 time points"])
    assert_reads(write_nd2(tmp_path / "rgb.nd2", pixels, samples=3), pixels[0])


def test_nd2_that_is_not_whole_or_not_intensities_is_refused(tmp_path):
    need("nd2")
    pixels = random_pixels((3, 6, 5, 4), "uint16")
    path = write_nd2(tmp_path / "a.nd2", pixels, times=3, left_out=[1])
    assert_reads(path, pixels[2], plane="T=2")
    assert_refused(path, "lacks page 1", plane="T=1", inspect=False)
    assert_refused(write_nd2(path, pixels, samples=4), "4 samples in each pixel")
    path.write_bytes(write_nd2(path, pixels).read_bytes()[:9000])
    assert_refused(path, "damaged or cut short")
