"""Every rule of `jaxcells.data.images`, on files made here: values, not only shapes."""

import io
import logging
import os
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from jaxcells import Error
from jaxcells.data import picture
from jaxcells.data.images import (
    SUFFIXES,
    ImageError,
    ImageInfo,
    inspect_image,
    parse_plane,
    read_image,
    write_crop,
)
from jaxcells.data.planes import select


def random_pixels(shape, dtype="uint8", seed=0):
    """Noise that uses the whole range of the type; float32 of both signs."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(0, 1e3, shape).astype(dtype)
    return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def assert_reads(path, expected, *, plane="", notes=()):
    """The pixels, the promises about the array, and that the header alone says the same."""
    pixels = read_image(path, plane=plane)
    np.testing.assert_array_equal(pixels, expected, strict=True)
    assert pixels.dtype.isnative
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    info = inspect_image(path, plane=plane)
    assert (info.height, info.width, info.channels) == expected.shape
    assert info.dtype == expected.dtype.name
    assert len(info.notes) == len(notes), info.notes
    for note, words in zip(info.notes, notes, strict=True):
        assert words in note


def assert_refused(path, *words, plane="", inspect=True):
    """One line, beginning with the path, with these words; from the header too unless told."""
    for function in (read_image, inspect_image) if inspect else (read_image,):
        with pytest.raises(ImageError) as caught:
            function(path, plane=plane)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        reason = message.removeprefix(f"{path}: ")
        for word in words:
            assert word in reason, message


# --- PNG, JPEG, BMP -------------------------------------------------------------------------------


def png_bytes(width, height, depth, colour, rows, *, before=(), after=(), interlace=0):
    """A PNG file from its parts; `rows` [H, bytes], without filter bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    half = len(data) // 2
    chunks = [(b"IHDR", header), *before, (b"IDAT", data[:half]), (b"IDAT", data[half:]), *after]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in [*chunks, (b"IEND", b"")])


def write_png(path, pixels, colour, **parts):
    """Pixels [H, W, C] as PNG of a colour type, 8 or 16 bits."""
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    rows = [row.tobytes() for row in big_endian]
    depth = 8 * pixels.dtype.itemsize
    path.write_bytes(png_bytes(*pixels.shape[1::-1], depth, colour, rows, **parts))
    return path


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(("colour", "stored", "kept"), [(0, 1, 1), (2, 3, 3), (4, 2, 1), (6, 4, 3)])
def test_png_keeps_depth_and_drops_alpha(tmp_path, dtype, colour, stored, kept):
    pixels = random_pixels((7, 5, stored), dtype)
    path = write_png(tmp_path / "a.png", pixels, colour)
    notes = ["alpha"] if kept < stored else []
    assert_reads(path, pixels[..., :kept], notes=notes)


def test_png_of_16_bit_rgb_is_not_cut_to_8_bits(tmp_path):
    pixels = np.full((3, 4, 3), 4095, np.uint16)
    assert read_image(write_png(tmp_path / "a.png", pixels, 2)).max() == 4095


def test_png_of_4_bits_is_scaled_as_png_says(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(2, 1, 4, 0, [b"\x1f"]))
    assert_reads(path, np.array([[[17], [255]]], np.uint8), notes=["4-bit"])


def test_png_of_1_bit_is_refused_as_a_mask(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(random_pixels((8, 8)) > 99).save(path)
    assert_refused(path, "1-bit", "mask")


def save_palette(path, indices, colours):
    image = Image.fromarray(indices[..., 0], "L")
    image.putpalette(np.asarray(colours, np.uint8).tobytes())
    image.save(path, optimize=False)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_palette_is_a_ramp_or_greys_or_refused(tmp_path, suffix):
    ramp = np.arange(256, dtype=np.uint8)
    indices = random_pixels((9, 8, 1))
    green = np.stack([0 * ramp, ramp, 0 * ramp], -1)
    path = save_palette(tmp_path / f"green{suffix}", indices, green)
    assert_reads(path, indices, notes=["lookup table"])

    for greys in ([3, 90, 200, 250], [200, 3, 90, 250]):  # what is left of few grey levels
        levels = np.array(greys, np.uint8)
        path = save_palette(tmp_path / f"greys{suffix}", indices % 4, np.stack([levels] * 3, -1))
        assert_reads(path, levels[indices % 4], notes=["grey levels"])

    labels = random_pixels((256, 3), seed=1)
    path = save_palette(tmp_path / f"labels{suffix}", indices, labels)
    assert_refused(path, "indexed colours", "save it as grey or RGB")


def test_animated_png_is_refused_and_a_single_frame_is_not(tmp_path):
    pixels = random_pixels((5, 4, 3))
    two = [(b"acTL", struct.pack(">II", 2, 0))]
    assert_refused(write_png(tmp_path / "two.png", pixels, 2, before=two), "animation")
    one = [(b"acTL", struct.pack(">II", 1, 0))]
    assert_reads(write_png(tmp_path / "one.png", pixels, 2, before=one), pixels)


def test_png_with_a_wrong_checksum_is_refused(tmp_path):
    pixels = random_pixels((20, 20, 1))
    path = write_png(tmp_path / "a.png", pixels, 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert_refused(path, "checksum", inspect=False)


def test_png_comments_and_profiles_neither_fail_nor_speak(tmp_path):
    pixels = random_pixels((5, 4, 3), "uint16")
    bomb = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20 << 20)))
    profile = (b"iCCP", b"x\0\0" + zlib.compress(b"no profile"))
    path = write_png(tmp_path / "a.png", pixels, 2, before=[profile, bomb], after=[bomb])
    assert_reads(path, pixels)
    # What C code prints may stay in its buffer until the interpreter ends.
    code = f"from jaxcells.data.images import read_image; read_image({str(path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def exif(orientation):
    return b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + bytes(4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, orientation):
    pixels = random_pixels((6, 9, 3))
    tag = Image.Exif()
    tag[0x0112] = orientation
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.jpg", exif=tag, quality=95)
    expected = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))
    notes = ["orientation"] if orientation > 1 else []
    assert_reads(tmp_path / "a.jpg", expected, notes=notes)

    with io.BytesIO() as buffer:
        image.save(buffer, "PNG", exif=tag)
        turned = np.array(ImageOps.exif_transpose(Image.open(buffer)))
    late = write_png(tmp_path / "a.png", pixels, 2, after=[(b"eXIf", exif(orientation))])
    assert_reads(late, turned, notes=notes)

    tags = [(274, "H", 1, orientation, False)]
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extratags=tags)
    assert_reads(tmp_path / "a.tif", turned, notes=notes)


def test_damaged_exif_is_passed_over_in_silence(tmp_path, capfd):
    pixels = random_pixels((6, 9, 3))
    for cut in range(1, len(exif(6))):
        Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif(6)[:cut])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_image(tmp_path / "a.jpg").size == pixels.size
    assert capfd.readouterr() == ("", "")


def test_jpeg_grey_and_colour_are_read_and_cmyk_is_refused(tmp_path):
    for mode, channels in (("L", 1), ("RGB", 3)):
        path = tmp_path / f"{mode} [1].JPG"
        Image.effect_noise((16, 12), 40).convert(mode).save(path, "JPEG")
        expected = np.array(Image.open(path)).reshape(12, 16, channels)
        assert_reads(path, expected)
    Image.new("CMYK", (8, 8)).save(tmp_path / "cmyk.jpg")
    assert_refused(tmp_path / "cmyk.jpg", "CMYK", "save it as RGB")


def test_first_picture_of_a_multi_picture_jpeg_is_read_with_a_note(tmp_path):
    first, second = (Image.fromarray(random_pixels((8, 8), seed=k)) for k in (1, 2))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    expected = np.array(Image.open(tmp_path / "a.jpg"))[..., None]
    assert_reads(tmp_path / "a.jpg", expected, notes=["first picture"])


def test_bmp_is_read(tmp_path):
    for shape in ((5, 7, 3), (5, 7, 1)):
        pixels = random_pixels(shape)
        Image.fromarray(pixels.squeeze()).save(tmp_path / "a.bmp")
        assert_reads(tmp_path / "a.bmp", pixels)
    pixels = random_pixels((5, 7, 4))
    Image.fromarray(pixels).save(tmp_path / "a.bmp")
    assert_reads(tmp_path / "a.bmp", pixels[..., :3])  # the fourth byte of BMP is padding
    Image.fromarray(pixels[..., 0] > 99).save(tmp_path / "a.bmp")
    assert_refused(tmp_path / "a.bmp", "1-bit", "mask")


def test_limit_of_pillow_does_not_apply(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for name in ("a.png", "a.jpg", "a.bmp"):
        Image.new("L", (64, 64), 7).save(tmp_path / name)
        assert read_image(tmp_path / name).mean() == 7


# --- TIFF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bigtiff": True},
        {"tile": (16, 16)},
        {"compression": "zlib", "predictor": True},
        {"compression": "lzw", "rowsperstrip": 5},
        {"compression": "zstd", "tile": (16, 32)},
    ],
    ids=str,
)
def test_tiff_of_every_layout(tmp_path, dtype, byteorder, options):
    grey = random_pixels((37, 29, 1), dtype)
    tifffile.imwrite(tmp_path / "grey.tif", grey[..., 0], byteorder=byteorder, **options)
    assert_reads(tmp_path / "grey.tif", grey)

    rgb = random_pixels((37, 29, 3), dtype)
    options = {"byteorder": byteorder, "photometric": "rgb", **options}
    tifffile.imwrite(tmp_path / "rgb.tif", rgb, **options)
    assert_reads(tmp_path / "rgb.tif", rgb)
    separate = rgb.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "separate.tif", separate, planarconfig="separate", **options)
    assert_reads(tmp_path / "separate.tif", rgb)


def test_tiff_channels_without_colour_are_data_and_alpha_is_not(tmp_path):
    path = tmp_path / "a.tif"
    for channels in (2, 4, 5):
        pixels = random_pixels((6, 5, channels), "uint16")
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
        assert_reads(path, pixels)

    grey_alpha = random_pixels((6, 5, 2))
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(path, grey_alpha, extrasamples=["unassalpha"], **options)
    assert_reads(path, grey_alpha[..., :1], notes=["alpha"])

    rgba = random_pixels((6, 5, 4))
    for kind in ("unassalpha", "assocalpha", "unspecified"):
        tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=[kind])
        assert_reads(path, rgba[..., :3], notes=["premultiplied" if kind[0] == "a" else "alpha"])

    five = random_pixels((6, 5, 5))
    tifffile.imwrite(path, five, photometric="rgb", extrasamples=["unspecified"] * 2)
    assert_reads(path, five)


@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_axes_are_read_and_chosen(tmp_path, kind):
    path = tmp_path / ("a.ome.tif" if kind == "ome" else "a.tif")
    stack = random_pixels((2, 3, 4, 6, 5), "uint16")  # T, Z, C, Y, X
    metadata = {"axes": "TZCYX"}
    tifffile.imwrite(path, stack, metadata=metadata, **{kind: True}, photometric="minisblack")
    assert_refused(path, "2 time points (axis T) and 3 z-planes (axis Z)", "plane=T=0,Z=0")
    assert_refused(path, "3 z-planes (axis Z)", "--config.data.plane=Z=0", plane="T=1")
    assert_refused(path, "3 z-planes", "Z=3 is not in 0 to 2", plane="T=1,Z=3")
    assert_reads(path, stack[1, 2].transpose(1, 2, 0), plane="T=1,Z=2")
    assert_reads(path, stack[0, 1, 3][..., None], plane="z=1,t=0,c=3")


def test_channel_pages_are_channels_whatever_their_place(tmp_path):
    path = tmp_path / "a.ome.tif"
    stack = random_pixels((3, 2, 6, 5))
    tifffile.imwrite(path, stack, ome=True, metadata={"axes": "CZYX"}, photometric="minisblack")
    assert_reads(path, stack[:, 1].transpose(1, 2, 0), plane="Z=1")


def test_rgb_stack_has_samples_as_channels(tmp_path):
    path = tmp_path / "a.tif"
    stack = random_pixels((2, 6, 5, 3))
    tifffile.imwrite(path, stack, imagej=True, metadata={"axes": "TYXS"})
    assert_refused(path, "2 time points (axis T)", "plane=T=0")
    assert_reads(path, stack[1], plane="T=1")


def test_one_choice_serves_a_folder_with_single_planes(tmp_path):
    pixels = random_pixels((6, 5, 1))
    tifffile.imwrite(tmp_path / "a.tif", pixels[..., 0])
    assert_reads(tmp_path / "a.tif", pixels, plane="T=3,Z=1,I=7,series=2")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a.png")
    assert_reads(tmp_path / "a.png", pixels, plane="T=3")


def test_pages_that_do_not_say_what_they_are(tmp_path):
    path = tmp_path / "a.tif"
    stack = random_pixels((3, 6, 5), "uint16")
    for metadata in (None, {}):
        tifffile.imwrite(path, stack, metadata=metadata, photometric="minisblack")
        assert_refused(path, "3 pages that do not say", "plane=I=0", "channels with", "plane=I=C")
        assert_reads(path, stack[2][..., None], plane="I=2")
        assert_reads(path, stack.transpose(1, 2, 0), plane="I=C")
        assert_refused(path, "I=3 is not in 0 to 2", plane="I=3")


def test_separate_images_are_chosen_by_series_and_thumbnails_passed_over(tmp_path):
    path = tmp_path / "a.tif"
    one, two = random_pixels((6, 5, 1)), random_pixels((9, 4, 1))
    with tifffile.TiffWriter(path) as tif:
        tif.write(one[..., 0], metadata=None)
        tif.write(two[..., 0], metadata=None)
    assert_refused(path, "2 separate images", "YX 9x4", "--config.data.plane=series=0 (0 to 1)")
    assert_reads(path, two, plane="series=1")
    assert_refused(path, "2 separate images", plane="series=2")
    with tifffile.TiffWriter(path) as tif:
        tif.write(one[::2, ::2, 0], subfiletype=1, metadata=None)
        tif.write(two[..., 0], metadata=None)
    assert_reads(path, two)


def test_pyramid_is_read_at_full_resolution(tmp_path):
    path = tmp_path / "a.ome.tif"
    pixels = random_pixels((64, 48, 3))
    with tifffile.TiffWriter(path, ome=True) as tif:
        tif.write(pixels, subifds=1, photometric="rgb", metadata={"axes": "YXS"})
        tif.write(pixels[::2, ::2], subfiletype=1, photometric="rgb")
    assert_reads(path, pixels)


def test_page_that_an_acquisition_did_not_reach_is_no_page_of_zeros(tmp_path):
    path = tmp_path / "a.ome.tif"
    stack = random_pixels((3, 6, 5))
    tifffile.imwrite(path, stack, ome=True, metadata={"axes": "ZYX"}, photometric="minisblack")
    path.write_bytes(path.read_bytes().replace(b'SizeZ="3"', b'SizeZ="4"'))
    assert_reads(path, stack[2][..., None], plane="Z=2")
    assert_refused(path, "lacks page 3 of the 4", plane="Z=3")


def ome_set(folder):
    """Two files that describe each other as one OME-TIFF; the first with two z-planes."""
    stack = random_pixels((3, 6, 5))
    files = {"a.ome.tif": ("urn:uuid:a", 2), "b.ome.tif": ("urn:uuid:b", 1)}
    data, z = "", 0
    for name, (uuid, count) in files.items():
        for ifd in range(count):
            data += f'<TiffData FirstZ="{z}" IFD="{ifd}" PlaneCount="1">'
            data += f'<UUID FileName="{name}">{uuid}</UUID></TiffData>'
            z += 1
    for name, (uuid, _) in files.items():
        xml = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" '
            'SizeX="5" SizeY="6" SizeZ="3" SizeC="1" SizeT="1"><Channel ID="Channel:0:0" '
            f'SamplesPerPixel="1"/>{data}</Pixels></Image></OME>'
        )
        part = stack[:2] if name[0] == "a" else stack[2:]
        tifffile.imwrite(
            folder / name, part, description=xml, metadata=None, photometric="minisblack"
        )
    return stack


def test_only_the_pages_of_this_file_of_a_set_are_read(tmp_path):
    stack = ome_set(tmp_path)
    with tifffile.TiffFile(tmp_path / "b.ome.tif") as tif:
        assert tif.series[0].shape == (3, 6, 5)  # what we must not do: gather the whole set
    assert_reads(tmp_path / "b.ome.tif", stack[2][..., None], notes=["only this file is read"])
    assert_refused(tmp_path / "a.ome.tif", "2 pages that do not say")
    assert_reads(
        tmp_path / "a.ome.tif", stack[1][..., None], plane="I=1", notes=["only this file is read"]
    )


def test_stack_described_by_one_page_is_read_and_its_truncation_seen(tmp_path):
    path = tmp_path / "a.tif"
    stack = random_pixels((2, 3, 6, 5), "uint16")
    axes = {"axes": "TCYX"}
    options = {"metadata": axes, "truncate": True, "photometric": "minisblack"}
    for kind in ({"imagej": True}, {"byteorder": "<"}, {"byteorder": ">"}):
        tifffile.imwrite(path, stack, **kind, **options)
        with tifffile.TiffFile(path) as tif:
            assert len(tif.pages) == 1
        assert_reads(path, stack[1].transpose(1, 2, 0), plane="T=1")
        path.write_bytes(path.read_bytes()[:-1])
        assert_refused(path, plane="T=1")
        assert_refused(path, plane="T=0")


def write_stk(path, stack, seconds):
    """A MetaMorph stack: one page, tag UIC2 with six integers for each plane."""
    planes = len(stack)
    uic2 = np.array([[0, 1, 2459000, second, 2459000, 0] for second in seconds], "<u4")
    tags = [
        (33628, 4, 8, (0,) * 8, False),
        (33629, 5, planes * 3, tuple(uic2.ravel().tolist()), False),
    ]
    data = stack.reshape(-1, stack.shape[-1])
    tifffile.imwrite(path, data, extratags=tags, metadata=None, rowsperstrip=stack.shape[1])
    with tifffile.TiffFile(path) as tif:
        tags = tif.pages[0].tags
        places = {code: tags[code].offset for code in (257, 273, 279, 33628, 33629)}
        values = {code: tags[code].value for code in (273, 279)}
    contents = bytearray(path.read_bytes())
    struct.pack_into("<I", contents, places[33628] + 4, 4)
    struct.pack_into("<I", contents, places[33629] + 4, planes)
    struct.pack_into("<I", contents, places[257] + 8, stack.shape[1])
    for code in (273, 279):
        struct.pack_into("<HI", contents, places[code] + 2, 4, 1)
        struct.pack_into("<I", contents, places[code] + 8, values[code][0])
    path.write_bytes(contents)


def test_metamorph_stack(tmp_path):
    path = tmp_path / "a.stk"
    stack = random_pixels((3, 6, 5), "uint16")
    write_stk(path, stack, seconds=[1, 2, 3])
    assert_refused(path, "3 time points (axis T)", "plane=T=0")
    for k in range(3):
        assert_reads(path, stack[k][..., None], plane=f"T={k}")
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(path, "truncated", plane="T=0")


def test_minimum_may_be_white(tmp_path):
    pixels = random_pixels((6, 5, 1))
    tifffile.imwrite(tmp_path / "a.tif", pixels[..., 0], photometric="miniswhite")
    assert_reads(tmp_path / "a.tif", pixels, notes=["MinIsWhite"])


def test_tiff_palette_is_a_lookup_table_or_refused(tmp_path):
    path = tmp_path / "a.tif"
    pixels = random_pixels((6, 5, 1))
    ramp = np.arange(256) * 257
    stretched = np.clip((np.arange(256) - 50) * 655, 0, 65535)
    for table in ([0 * ramp, ramp, 0 * ramp], [ramp[::-1]] * 3, [stretched] * 3):
        colormap = np.array(table, np.uint16)
        tifffile.imwrite(path, pixels[..., 0], photometric="palette", colormap=colormap)
        assert_reads(path, pixels, notes=["lookup table"])
    for colormap in (random_pixels((3, 256), "uint16"), np.zeros((3, 256), np.uint16)):
        tifffile.imwrite(path, pixels[..., 0], photometric="palette", colormap=colormap)
        assert_refused(path, "indexed colours", "Lookup Tables")


def test_each_page_is_asked_for_its_own_palette(tmp_path):
    path = tmp_path / "a.tif"
    pages = random_pixels((2, 6, 5))
    ramp = np.array([np.arange(256) * 257] * 3, np.uint16)
    with tifffile.TiffWriter(path) as tif:
        tif.write(pages[0], photometric="palette", colormap=ramp, metadata=None)
        labels = random_pixels((3, 256), "uint16")
        tif.write(pages[1], photometric="palette", colormap=labels, metadata=None)
    assert_reads(path, pages[0][..., None], plane="I=0", notes=["lookup table"])
    assert_refused(path, "indexed colours", plane="I=1")


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("bool", "mask"),
        ("int8", "convert it to 8-bit or 16-bit unsigned, or float32"),
        ("int16", "int16"),
        ("uint32", "labels"),
        ("int64", "int64"),
        ("float16", "convert it to float32"),
        ("float64", "convert it to float32"),
        ("complex64", "convert it to float32"),
    ],
)
def test_other_types_are_refused_not_converted(tmp_path, dtype, words):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((6, 5), dtype))
    assert_refused(tmp_path / "a.tif", words)


def patch_tag(path, code, offset, data):
    """Overwrite the value of a tag of the first page, `offset` bytes into it."""
    with tifffile.TiffFile(path) as tif:
        place = tif.pages[0].tags[code].valueoffset + offset
    contents = bytearray(path.read_bytes())
    contents[place : place + len(data)] = data
    path.write_bytes(contents)


def test_packed_bits_keep_their_values(tmp_path):
    path = tmp_path / "a.tif"
    pixels = random_pixels((6, 8, 1), "uint16") % 4096
    pairs = pixels.reshape(-1, 2).tolist()
    packed = b"".join((high << 12 | low).to_bytes(3, "big") for high, low in pairs)
    tifffile.imwrite(path, np.frombuffer(packed, np.uint8).reshape(6, 12), metadata=None)
    patch_tag(path, 256, 0, struct.pack("<H", 8))  # width
    patch_tag(path, 258, 0, struct.pack("<H", 12))  # bits of each sample
    assert_reads(path, pixels, notes=["12-bit"])


def test_colours_that_are_no_intensities_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    kinds = {"separated": ("CMYK", 4), "cielab": ("CIELAB", 3), "ycbcr": ("YCBCR", 3)}
    for photometric, (name, channels) in kinds.items():
        tifffile.imwrite(path, random_pixels((6, 5, channels)), photometric=photometric)
        assert_refused(path, f"has {name} colours: convert it to grey or RGB")


def test_jpeg_in_tiff_is_rgb(tmp_path):
    path = tmp_path / "a.tif"
    pixels = np.full((32, 32, 3), (200, 90, 20), np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", compression="jpeg", tile=(16, 16))
    with tifffile.TiffFile(path) as tif:
        assert tif.pages[0].photometric.name == "YCBCR"
    assert np.abs(read_image(path).astype(int) - pixels).max() <= 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_refused(tmp_path, value):
    pixels = random_pixels((6, 5), "float32")
    pixels[3, 2] = value
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    assert_refused(tmp_path / "a.tif", "NaN or infinite", inspect=False)


def test_missing_and_short_strips_are_seen(tmp_path):
    path = tmp_path / "a.tif"
    pixels = random_pixels((64, 48))
    for compression in (None, "zlib", "lzw", "packbits", "jpeg"):
        options = {"compression": compression, "rowsperstrip": 16, "photometric": "minisblack"}
        tifffile.imwrite(path, pixels, **options)
        with tifffile.TiffFile(path) as tif:
            tag = tif.pages[0].tags[279]
            size, short = tag.value[1], struct.pack(f"<{'HI'[tag.dtype == 4]}", tag.value[1] // 2)
        assert size > 20
        patch_tag(path, 279, len(short), short)
        if compression is not None:  # one run of bytes, whose counts do not matter
            assert_refused(path, inspect=False)
        patch_tag(path, 279, len(short), bytes(len(short)))
        if compression is not None:
            assert_refused(path, "has no data")


def test_jpeg_strip_larger_than_its_place_is_not_decoded(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, random_pixels((16, 16)), compression="jpeg", photometric="minisblack")
    data = bytearray(path.read_bytes())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
    path.write_bytes(data)
    assert_refused(path, "larger than its place", inspect=False)


def test_page_list_that_loops_or_leaves_the_file_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    for bigtiff in (False, True):
        options = {"bigtiff": bigtiff, "metadata": None, "photometric": "minisblack"}
        tifffile.imwrite(path, random_pixels((3, 6, 5)), **options)
        with tifffile.TiffFile(path) as tif:
            place = tif.pages.next_page_offset
            second = tif.pages[1].offset
        contents = bytearray(path.read_bytes())
        form = "<Q" if bigtiff else "<I"
        for target, words in ((second, "circle"), (10**6, "page 4 lies beyond")):
            struct.pack_into(form, contents, place, target)
            path.write_bytes(contents)
            assert_refused(path, words, plane="I=0")


# --- any file -------------------------------------------------------------------------------------


def cut_examples(folder):
    pixels = random_pixels((40, 30, 3))
    smooth = np.add.outer(np.arange(40), np.arange(30)).astype(np.uint16)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels).save(folder / "a.jpg")
    Image.fromarray(pixels).save(folder / "progressive.jpg", progressive=True)
    Image.fromarray(pixels).save(folder / "a.bmp")
    for compression in ("none", "zlib", "lzw", "zstd", "jpeg"):
        data = pixels if compression == "jpeg" else smooth
        options = {"compression": None if compression == "none" else compression}
        photometric = "rgb" if compression == "jpeg" else "minisblack"
        path = folder / f"{compression}.tif"
        tifffile.imwrite(path, data, photometric=photometric, rowsperstrip=8, **options)
    channels = np.stack([smooth, smooth + 1])
    for kind in ("imagej", "ome"):
        tifffile.imwrite(folder / f"{kind}.tif", channels, metadata={"axes": "CYX"}, **{kind: True})
    return sorted(folder.iterdir())


def test_truncated_files_are_refused_or_whole(tmp_path):
    for path in cut_examples(tmp_path):
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


def test_files_that_are_no_images(tmp_path):
    assert_refused(tmp_path / "none.png", "no such file")
    assert_refused(tmp_path, "is a folder")
    contents = {
        "empty.png": (b"", "is empty"),
        "text.png": (b"<!DOCTYPE html><html>", "but text"),
        "noise.tif": (bytes(range(200, 250)), "is no PNG, JPEG, TIFF or BMP"),
        "stub.png": (b"\x89PNG\r\n\x1a\n", "truncated"),
        "stub.jpg": (b"\xff\xd8\xff\xe0", "damaged or cut short"),
        "stub.tif": (b"II*\0", "has no pages"),
        "stub.bmp": (b"BM", "damaged or cut short"),
        "cells.czi": (b"ZISRAWFILE\0\0\0\0\0\0", "CZI file, which is not read: export"),
        "cells.LIF": (b"p\0\0\0", "LIF file, which is not read: export"),
        "photo.heic": (b"\0\0\0\x18ftypheic", "HEIC file, which is not read: save it as PNG"),
        "raw.dng": (b"II*\0\x08\0\0\0", "DNG file, which is not read"),
    }
    for name, (data, words) in contents.items():
        (tmp_path / name).write_bytes(data)
        assert_refused(tmp_path / name, words)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert_refused(tmp_path / "a.png", "not an image file")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may read all")
def test_permission_denied(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    path.chmod(0)
    assert_refused(path, "permission denied")


def test_content_decides_and_a_wrong_name_is_noted(tmp_path):
    pixels = random_pixels((6, 5, 3))
    Image.fromarray(pixels).save(tmp_path / "a.tif", "PNG")
    assert_reads(tmp_path / "a.tif", pixels, notes=["named .tif but holds a PNG"])
    tifffile.imwrite(tmp_path / "a.PNG", pixels, photometric="rgb")
    assert_reads(tmp_path / "a.PNG", pixels, notes=["named .png but holds a TIFF"])


def test_declared_size_is_capped_before_anything_is_allocated(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(60000, 60000, 8, 2, [b"\0"]))
    assert_refused(path, "60000x60000x3", "10.1 GiB", "at most 4 GiB", "cut it into fields")
    path.write_bytes(png_bytes(20000, 20000, 8, 2, [b"\0"]))
    assert_refused(path, "20000x20000x3", f"in a file of {path.stat().st_size} bytes")
    path.write_bytes(png_bytes(0, 5, 8, 0, [b"\0"]))
    assert_refused(path, "has no pixels")

    pixels = random_pixels((20, 10, 1))
    monkeypatch.setattr(picture, "MAX_BYTES", 200)
    tifffile.imwrite(tmp_path / "a.tif", pixels[..., 0])
    assert_reads(tmp_path / "a.tif", pixels)
    monkeypatch.setattr(picture, "MAX_BYTES", 199)
    assert_refused(tmp_path / "a.tif", "20x10x1 uint8")


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
    paths = cut_examples(tmp_path)
    expected = [read_image(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        for images in zip(*[pool.map(read_image, paths) for _ in range(8)], strict=True):
            reference = expected.pop(0)
            for image in images:
                np.testing.assert_array_equal(image, reference, strict=True)


def test_suffixes():
    assert {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".stk"} == SUFFIXES


# --- planes ---------------------------------------------------------------------------------------


def test_parse_plane():
    assert parse_plane("") == {}
    assert parse_plane("T=0") == {"T": 0}
    assert parse_plane(" z=3, T=12,") == {"Z": 3, "T": 12}
    assert parse_plane("I=C") == parse_plane("i=c") == {"I": "C"}
    assert parse_plane("series=2,c=1") == {"series": 2, "C": 1}


@pytest.mark.parametrize(
    "text", ["T", "T=", "T=-1", "T=x", "T=1.5", "S=0", "X=1", "TT=1", "T=C", "T=0,T=1", "T=0;Z=1"]
)
def test_a_plane_that_cannot_be_parsed_is_an_error(tmp_path, text):
    with pytest.raises(Error, match=r"--config\.data\.plane=T=0"):
        parse_plane(text)
    with pytest.raises(Error, match="is not AXIS=INDEX"):
        read_image(tmp_path / "a.png", plane=text)


def test_select_on_unusual_axes():
    array = random_pixels((2, 3, 4, 5, 6))
    two_unknown = select("QIYX", (2, 3, 4, 5), 2, {"I": 4})
    assert two_unknown.pages == (4,)
    assert select("QIYX", (2, 3, 4, 5), 2, {"I": "C"}).pages == tuple(range(6))
    sample_of_page = select("CYX", (3, 4, 5), 3, {"C": 1})
    np.testing.assert_array_equal(sample_of_page.take(array[0, :, :, :, 0]), array[0, 1, :, :, :1])
    columns_first = select("XYC", (3, 4, 5), 3, {})
    np.testing.assert_array_equal(
        columns_first.take(array[0, ..., 0]), array[0, ..., 0].swapaxes(0, 1)
    )
    with pytest.raises(picture.Refused, match=r"2 channels \(axis C\): choose one with"):
        select("CYXS", (2, 4, 5, 3), 3, {})
    with pytest.raises(picture.Refused, match=r"I=0 \(indices begin at 0\)$"):
        select("IYXS", (2, 4, 5, 3), 3, {"I": "C"})


# --- write_crop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", range(1, 17))
def test_crops_come_back_unchanged(tmp_path, dtype, channels):
    for shape in ((20, 30), (1, 1), (1, 7), (3, 1)):
        crop = random_pixels((*shape, channels), dtype)
        path = write_crop(tmp_path / "plate 1.5_[0001]", crop)
        png = (dtype, channels) in (("uint8", 1), ("uint8", 3), ("uint16", 1))
        assert path == tmp_path / f"plate 1.5_[0001]{'.png' if png else '.tif'}"
        assert_reads(path, crop)
        assert inspect_image(path) == ImageInfo(*crop.shape, dtype, ())


def test_crops_from_views_and_extremes(tmp_path):
    field = random_pixels((50, 60, 4), "float32")
    field[:, :, 0] = np.finfo(np.float32).max
    view = field[5:25, 7:27, ::2]
    assert_reads(write_crop(tmp_path / "a", view), view)
    with pytest.raises(ValueError, match="float64"):
        write_crop(tmp_path / "a", view.astype(np.float64))
    with pytest.raises(ValueError, match="cannot write"):
        write_crop(tmp_path / "a", view[..., 0])
    assert [Path(p).name for p in os.listdir(tmp_path)] == ["a.tif"]
