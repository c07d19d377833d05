"""`read_image` on real files of many programs, where they are at hand: right, or refused."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from jaxcells.data.images import ImageError, inspect_image, read_image

FORMATS = Path(__file__).parents[3] / "shared" / "data" / "formats"
MANIFEST = FORMATS / "MANIFEST.csv"

pytestmark = pytest.mark.skipif(
    not MANIFEST.is_file(), reason="the collection of image formats is not beside the repository"
)


def manifest():
    if not MANIFEST.is_file():
        return []
    with MANIFEST.open(newline="") as file:
        return [row["folder"] + "/" + row["file"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", manifest())
def test_every_file_reads_as_tifffile_says_or_is_refused(name, capfd):
    path = FORMATS / name
    try:
        pixels = read_image(path)
    except ImageError as error:
        message = str(error)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert capfd.readouterr() == ("", "")
        return
    info = inspect_image(path)
    assert capfd.readouterr() == ("", "")
    assert (info.height, info.width, info.channels, info.dtype) == (*pixels.shape, pixels.dtype)
    if path.suffix == ".png":
        return
    expected = tifffile.imread(path)
    with tifffile.TiffFile(path) as tif:
        axes = tif.series[0].axes
    channel = next((axis for axis in "SC" if axis in axes), "")
    expected = expected.transpose([axes.index(axis) for axis in "YX" + channel])
    expected = expected.reshape(*expected.shape[:2], -1)
    if any("alpha" in note for note in info.notes):
        expected = expected[..., :-1]
    np.testing.assert_array_equal(pixels, expected, strict=True)


READ = {
    "xyc_16bit__hela-cells.tif": ("uint16", (512, 672, 3), 0, 4095),
    "xyc_16bit__cell_dna_mts_actin.tif": ("uint16", (350, 350, 3), 105, 5055),
    "xyc_8bit__tub_h2b_cecog_battery.tif": ("uint8", (1040, 1392, 2), 0, 255),
    "xy_8bit__nup_bgsubtracted.tif": ("float32", (512, 512, 1), -5, 202),
    "r1_DAPI_downsampled.tiff": ("float32", (917, 624, 1), 8.75, 45691.5),
    "IXMtest_A02_s9.tif": ("uint16", (395, 695, 3), 135, 4095),
    "test_image.ome.tif": ("uint8", (513, 639, 3), 0, 255),
    "Channel 1-01-A-01-00.tif": ("uint8", (1024, 1360, 1), 0, 255),
    "--W00001--P00001--Z00000--T00000--cherry.tif": ("uint16", (1024, 1344, 1), 32993, 36863),
    "101210OranePlt1_C16_w1_[9AA4D9EA-18E4-4354-8C7D-0202029A8048].tif": (
        "uint16",
        (520, 696, 1),
        90,
        1709,
    ),
    "cell.png": ("uint8", (660, 550, 1), 0, 255),
    "tiff_tiled_planar_16bit_RGBa.tiff": ("uint16", (40, 100, 3), 0, 39661),
    "hopper_gray_4bpp.tif": ("uint8", (128, 128, 1), 1, 13),
    "hopper_bigtiff.tif": ("uint8", (128, 128, 3), 0, 255),
}
REFUSED = {
    "xyt_8bit_polyp.tif": "3 time points (axis T): choose one with --config.data.plane=T=0",
    "xyzc_16bit__spots.tif": "17 z-planes (axis Z): choose one with --config.data.plane=Z=0",
    "xy_8bit_labels__nuclei.tif": "indexed colours (a label image",
    "cells_annotation.tif": "int32 pixels (labels",
    "test_image.czi": "CZI file, which is not read: export it as OME-TIFF",
    "libtiff_segfault.tif": "declares 900x65535x65535 uint8 pixels",
    "tiff_strip_cmyk_jpeg.tif": "has CMYK colours: convert it to grey or RGB",
    "hopper.Lab.tif": "has CIELAB colours: convert it to grey or RGB",
    "pil_sample_cmyk.jpg": "is a CMYK JPEG: save it as RGB",
    "old-style-jpeg-compression.tif": "old-style JPEG",
    "hopper_g4_500.tif": "is a 1-bit image, a mask",
    "16bit.s.tif": "int16 pixels",
    "multipage-mmap.tiff": "2 separate images (IYX 2x10x10, YX 20x20)",
    "truncated_jpeg.jpg": "truncated",
    "truncated_image.png": "truncated",
}


@pytest.mark.parametrize("name", READ)
def test_telling_files_that_are_read(name):
    dtype, shape, low, high = READ[name]
    pixels = read_image(next(path for path in FORMATS.glob("*/*") if path.name == name))
    assert (pixels.dtype, pixels.shape) == (dtype, shape)
    assert (pixels.min(), pixels.max()) == (low, high)


@pytest.mark.parametrize("name", REFUSED)
def test_telling_files_that_are_refused(name):
    with pytest.raises(ImageError) as caught:
        read_image(next(path for path in FORMATS.glob("*/*") if path.name == name))
    assert REFUSED[name] in str(caught.value)


def test_a_plane_of_a_real_stack():
    stack = tifffile.imread(FORMATS / "microscopy/xyzc_16bit__spots.tif")
    pixels = read_image(FORMATS / "microscopy/xyzc_16bit__spots.tif", plane="Z=16,T=4")
    np.testing.assert_array_equal(pixels, stack[16].transpose(1, 2, 0), strict=True)
    movie = tifffile.imread(FORMATS / "microscopy/xyt_8bit_polyp.tif")
    pixels = read_image(FORMATS / "microscopy/xyt_8bit_polyp.tif", plane="T=2")
    np.testing.assert_array_equal(pixels[..., 0], movie[2], strict=True)


def test_no_file_prints_warns_or_takes_much_memory():
    """All files in one fresh interpreter, 600 MB of address space above its imports."""
    pytest.importorskip("resource")
    code = """
import resource, sys, warnings
from pathlib import Path
from jaxcells.data.images import ImageError, read_image
warnings.simplefilter("error")
pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc").exists() else 2**18
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 600 * 2**20,) * 2)
for path in sorted(Path(sys.argv[1]).glob("*/*")):
    try:
        read_image(path)
    except ImageError as error:
        assert "memory" not in str(error), error
"""
    run = [sys.executable, "-c", code, str(FORMATS)]
    result = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
