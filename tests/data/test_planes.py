"""Which plane of a stack is read, and what is said where none is chosen."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from jaxcells import Error
from jaxcells.data.images import read_image
from jaxcells.data.picture import Refused
from jaxcells.data.planes import parse_plane, select
from tests.data.pixels import assert_reads, assert_refused, random_pixels


def write_stack(path, stack, axes, **options):
    metadata = {"axes": axes}
    tifffile.imwrite(path, stack, metadata=metadata, photometric="minisblack", **options)
    return path


def mean(stack, axis):
    return np.rint(stack.mean(axis, dtype=np.float64)).astype(stack.dtype)


def test_parse_plane():
    assert parse_plane("") == {}
    assert parse_plane(" z=3, T=12,") == {"Z": 3, "T": 12}
    assert parse_plane("I=C") == parse_plane("i=c")
    assert parse_plane("series=2,c=1") == {"series": 2, "C": 1}
    assert parse_plane("z=MAX,T=0") == {"Z": "max", "T": 0}
    with pytest.raises(Error, match="either max or mean"):
        parse_plane("Z=max,T=mean")


@pytest.mark.parametrize(
    "text",
    ["T", "T=", "T=-1", "T=1.5", "S=0", "TT=1", "T=C", "T=0,T=1", "T=0;Z=1", "Z=min", "series=max"],
)
def test_a_plane_that_cannot_be_parsed_is_an_error(tmp_path, text):
    with pytest.raises(Error, match=r"is not AXIS=INDEX.*data\.plane=T=0, data\.plane=Z=max"):
        read_image(tmp_path / "a.png", plane=text)


@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_axes_are_read_and_chosen(tmp_path, kind):
    stack = random_pixels((2, 3, 4, 6, 5), "uint16")
    path = write_stack(tmp_path / "a.tif", stack, "TZCYX", **{kind: True})
    two = "2 time points (axis T) and 3 z-planes (axis Z): choose one of each"
    assert_refused(path, two, "data.plane=T=0,Z=0", "maximum with data.plane=T=max,Z=max")
    assert_refused(path, "3 z-planes (axis Z): choose one with data.plane=Z=0 ", plane="T=1")
    assert_refused(path, "3 z-planes", "Z=3 is not in 0 to 2", plane="T=1,Z=3")
    assert_reads(path, stack[1, 2].transpose(1, 2, 0), plane="T=1,Z=2")
    assert_reads(path, stack[0, 1, 3][..., None], plane="z=1,t=0,c=3")

    note = "maximum over 3 z-planes"
    largest = stack.max(1).transpose(0, 2, 3, 1)
    assert_reads(path, largest[1], plane="Z=max,T=1", notes=[note])
    assert_reads(path, largest[1, ..., 2:3], plane="Z=max,T=1,C=2", notes=[note])
    both = ["maximum over 2 time points", note]
    assert_reads(path, largest.max(0), plane="Z=max,T=max", notes=both)
    means = mean(stack, 0).transpose(0, 2, 3, 1)
    assert_reads(path, means[2], plane="T=mean,Z=2", notes=["mean over 2 time points"])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_projections_keep_the_type(tmp_path, dtype):
    stack = random_pixels((4, 60, 7), dtype)  # of four, so that halves occur
    path = write_stack(tmp_path / "a.tif", stack, "ZYX", compression="zlib")
    assert_reads(path, stack.max(0)[..., None], plane="Z=max", notes=["maximum over 4 z-planes"])
    expected = (
        stack.mean(0, dtype=np.float64).astype(dtype) if dtype == "float32" else mean(stack, 0)
    )
    assert_reads(path, expected[..., None], plane="Z=mean", notes=["mean over 4 z-planes"])


def test_planes_within_a_page_and_colours_are_projected_too(tmp_path):
    volume = random_pixels((16, 16, 32))
    options = {"volumetric": True, "tile": (16, 16, 16)}
    path = write_stack(tmp_path / "a.tif", volume, "ZYX", **options)
    assert_reads(path, volume.max(0)[..., None], plane="Z=max", notes=["16 z-planes"])
    assert_reads(path, volume[3][..., None], plane="Z=3")
    movie = random_pixels((2, 6, 5, 3))
    tifffile.imwrite(tmp_path / "b.tif", movie, imagej=True, metadata={"axes": "TYXS"})
    assert_refused(tmp_path / "b.tif", "2 time points (axis T)", "plane=T=0")
    assert_reads(tmp_path / "b.tif", movie[1], plane="T=1")
    assert_reads(tmp_path / "b.tif", movie.max(0), plane="T=max", notes=["2 time points"])


def test_channel_pages_are_channels_whatever_their_place(tmp_path):
    stack = random_pixels((3, 2, 6, 5))
    path = write_stack(tmp_path / "a.ome.tif", stack, "CZYX", ome=True)
    assert_reads(path, stack[:, 1].transpose(1, 2, 0), plane="Z=1")
    assert_reads(path, mean(stack, 1).transpose(1, 2, 0), plane="Z=mean", notes=["2 z-planes"])


def test_one_choice_serves_a_folder_with_single_planes(tmp_path):
    pixels = random_pixels((6, 5, 1))
    for name in ("a.tif", "a.png"):
        Image.fromarray(pixels[..., 0]).save(tmp_path / name)
        assert_reads(tmp_path / name, pixels, plane="T=max,Z=1,I=7,series=2")


def test_pages_that_do_not_say_what_they_are(tmp_path):
    path = tmp_path / "a.tif"
    stack = random_pixels((3, 6, 5), "uint16")
    for metadata in (None, {}):
        tifffile.imwrite(path, stack, metadata=metadata, photometric="minisblack")
        assert_refused(path, "3 pages that do not say", "plane=I=0", "channels with data.plane=I=C")
        assert_reads(path, stack[2][..., None], plane="I=2")
        assert_reads(path, stack.transpose(1, 2, 0), plane="I=C")
        assert_reads(path, stack.max(0)[..., None], plane="I=max", notes=["maximum over 3 pages"])
        assert_refused(path, "I=3 is not in 0 to 2", plane="I=3")


def test_select_on_unusual_axes():
    array = random_pixels((2, 3, 4, 5, 6))
    assert select("QIYX", (2, 3, 4, 5), 2, {"I": 4}).pages == ((4,),)
    channels = select("QIYX", (2, 3, 4, 5), 2, parse_plane("I=C"))
    assert channels.pages == tuple((k,) for k in range(6))
    sample_of_page = select("CYX", (3, 4, 5), 3, {"C": 1})
    page = array[0, :, :, :, 0]
    taken = sample_of_page.assemble(lambda k: page)
    np.testing.assert_array_equal(taken[..., 0], page[1])
    columns_first = select("XYC", (3, 4, 5), 3, {})
    taken = columns_first.assemble(lambda k: page)
    np.testing.assert_array_equal(taken, page.swapaxes(0, 1))
    with pytest.raises(Refused, match=r"2 channels \(axis C\): choose one with"):
        select("CYXS", (2, 4, 5, 3), 3, {})
    with pytest.raises(Refused, match=r"I=max$"):
        select("IYXS", (2, 4, 5, 3), 3, parse_plane("I=C"))
