"""`read_image` on real files of many programs, where they are at hand: right, or refused."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from jaxcells.data.images import ImageError, inspect_image, read_image
from tests.data.pixels import assert_refused

FORMATS = Path(__file__).parents[3] / "shared" / "data" / "formats"
PATHS = sorted(FORMATS.glob("*/*"))

pytestmark = pytest.mark.skipif(
    not PATHS, reason="the collection of image formats is not beside the repository"
)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_every_file_reads_as_tifffile_says_or_is_refused(path, capfd):
    try:
        pixels = read_image(path)
    except ImageError:
        assert_refused(path, inspect=False)
        assert capfd.readouterr() == ("", "")
        return
    info = inspect_image(path)
    assert capfd.readouterr() == ("", "")
    assert (info.height, info.width, info.channels, info.dtype) == (*pixels.shape, pixels.dtype)
    if path.suffix in (".png", ".czi"):
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


def test_36_files_are_read_and_none_prints_warns_or_takes_much_memory():
    """All files in one fresh interpreter, 600 MB of address space above its imports."""
    pytest.importorskip("resource")
    code = """
import resource, sys, warnings
from pathlib import Path
from jaxcells.data.images import ImageError, read_image
warnings.simplefilter("error")
pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc").exists() else 2**18
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 600 * 2**20,) * 2)
num_read = 0
for path in sorted(Path(sys.argv[1]).glob("*/*")):
    try:
        read_image(path)
        num_read += 1
    except ImageError as error:
        assert "memory" not in str(error), error
print(num_read)
"""
    run = [sys.executable, "-c", code, str(FORMATS)]
    result = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    number = 36 + (importlib.util.find_spec("czifile") is not None)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{number}\n", "")
