"""PNG, JPEG and BMP."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from jaxcells.data import picture
from jaxcells.data.images import read_image
from tests.data.pixels import assert_reads, assert_refused, random_pixels


def png_bytes(width, height, depth, colour, rows, *, before=(), after=()):
    """A PNG file from its parts; `rows` [H, bytes], without filter bytes."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    half = len(data) // 2
    chunks = [(b"IHDR", header), *before, (b"IDAT", data[:half]), (b"IDAT", data[half:]), *after]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in [*chunks, (b"IEND", b"")])


def write_png(path, pixels, colour, **parts):
    """Pixels [H, W, C] as PNG of a colour type, 8 or 16 bits."""
    rows = [row.tobytes() for row in pixels.astype(pixels.dtype.newbyteorder(">"))]
    depth = 8 * pixels.dtype.itemsize
    path.write_bytes(png_bytes(*pixels.shape[1::-1], depth, colour, rows, **parts))
    return path


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(("colour", "stored", "kept"), [(0, 1, 1), (2, 3, 3), (4, 2, 1), (6, 4, 3)])
def test_png_keeps_depth_and_drops_alpha(tmp_path, dtype, colour, stored, kept):
    pixels = random_pixels((7, 5, stored), dtype)
    path = write_png(tmp_path / "a.png", pixels, colour)
    assert_reads(path, pixels[..., :kept], notes=["alpha"] if kept < stored else [])


def test_png_of_few_bits(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(2, 1, 4, 0, [b"\x1f"]))
    assert_reads(path, np.array([[[17], [255]]], np.uint8), notes=["4-bit"])
    path.write_bytes(png_bytes(8, 1, 1, 0, [b"\x1f"]))
    assert_refused(path, "bool pixels (a mask")


def save_palette(path, indices, colours):
    image = Image.fromarray(indices[..., 0], "L")
    image.putpalette(np.asarray(colours, np.uint8).tobytes())
    image.save(path, optimize=False)
    return path


def test_palette_of_png_is_a_ramp_or_greys_or_refused(tmp_path):
    ramp = np.arange(256, dtype=np.uint8)
    indices = random_pixels((9, 8, 1))
    green = np.stack([0 * ramp, ramp, 0 * ramp], -1)
    path = save_palette(tmp_path / "a.png", indices, green)
    assert_reads(path, indices, notes=["lookup table"])
    levels = np.array([200, 3, 90, 250], np.uint8)  # what is left of few grey levels
    save_palette(path, indices % 4, np.stack([levels] * 3, -1))
    assert_reads(path, levels[indices % 4], notes=["grey levels"])
    save_palette(path, indices, random_pixels((256, 3), seed=1))
    assert_refused(path, "indexed colours", "save it as grey or RGB")
    path.write_bytes(png_bytes(2, 1, 8, 3, [b"\0\2"], before=[(b"PLTE", b"\5\5\5\7\7\7")]))
    assert_refused(path, "index 2 is out of bounds", inspect=False)


def test_animated_png_is_refused_and_a_single_frame_is_not(tmp_path):
    pixels = random_pixels((5, 4, 3))
    two, one = ([(b"acTL", struct.pack(">II", frames, 0))] for frames in (2, 1))
    assert_refused(write_png(tmp_path / "two.png", pixels, 2, before=two), "animation")
    assert_reads(write_png(tmp_path / "one.png", pixels, 2, before=one), pixels)


def test_png_with_a_wrong_checksum_or_header_is_refused(tmp_path):
    path = write_png(tmp_path / "a.png", random_pixels((20, 20, 1)), 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert_refused(path, "checksum", inspect=False)
    data[27] = 1  # the filter method, which libpng would speak about
    path.write_bytes(data)
    assert_refused(path, "values that PNG does not define")
    for depth, colour in ((5, 0), (8, 1), (4, 2)):
        path.write_bytes(png_bytes(2, 2, depth, colour, [b"\0\0"] * 2))
        assert_refused(path, "values that PNG does not define")


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
    notes = ["orientation"] if orientation > 1 else []
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif(orientation))
    tags = [(274, "H", 1, orientation, False)]
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extratags=tags)
    write_png(tmp_path / "a.png", pixels, 2, after=[(b"eXIf", exif(orientation))])
    for name in ("a.jpg", "a.png", "a.tif"):
        if name != "a.tif":
            with Image.open(tmp_path / name) as image:
                turned = np.array(ImageOps.exif_transpose(image))
        assert_reads(tmp_path / name, turned, notes=notes)


def test_damaged_exif_is_passed_over_in_silence(tmp_path, capfd):
    pixels = random_pixels((6, 9, 3))
    for cut in range(1, len(exif(6))):
        Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif(6)[:cut])
        assert read_image(tmp_path / "a.jpg").size == pixels.size
    assert capfd.readouterr() == ("", "")


def test_jpeg_grey_and_colour_are_read_and_cmyk_is_refused(tmp_path):
    path = tmp_path / "a [1].JPG"
    for channels in (1, 3):
        Image.fromarray(random_pixels((12, 16, channels)).squeeze()).save(path, "JPEG")
        with Image.open(path) as image:
            assert_reads(path, np.array(image).reshape(12, 16, channels))
    Image.new("CMYK", (8, 8)).save(path, "JPEG")
    assert_refused(path, "CMYK", "save it as grey or RGB")


def test_bmp_is_read_and_indexed_colours_are_refused(tmp_path):
    path = tmp_path / "a.bmp"
    pixels = random_pixels((5, 7, 4))
    Image.fromarray(pixels[..., 0]).save(path)
    assert_reads(path, pixels[..., :1])
    for channels in (3, 4):  # the fourth byte of BMP is padding
        Image.fromarray(pixels[..., :channels]).save(path)
        assert_reads(path, pixels[..., :3])
    Image.fromarray(pixels[..., 0] > 99).save(path)
    assert_refused(path, "a mask")
    save_palette(path, pixels[..., :1], random_pixels((256, 3), seed=1))
    assert_refused(path, "indexed colours")


def test_declared_size_is_capped_before_anything_is_allocated(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(60000, 60000, 8, 2, [b"\0"]))
    assert_refused(path, "60000x60000x3", "10.1 GiB; at most 4 GiB", "cut it into fields")
    path.write_bytes(png_bytes(20000, 20000, 8, 2, [b"\0"]))
    assert_refused(path, "20000x20000x3", f"in a file of {path.stat().st_size} bytes")
    path.write_bytes(png_bytes(0, 5, 8, 0, [b"\0"]))
    assert_refused(path, "has no pixels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own limit does not apply
    pixels = random_pixels((20, 10, 1))
    for suffix in ("bmp", "png", "tif", "jpg"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(pixels[..., 0]).save(path)
        monkeypatch.setattr(picture, "MAX_BYTES", 200)
        assert read_image(path).shape == pixels.shape
        monkeypatch.setattr(picture, "MAX_BYTES", 199)
        assert_refused(path, "20x10x1 uint8")
