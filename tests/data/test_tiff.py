"""TIFF, BigTIFF, OME-TIFF, ImageJ and MetaMorph files: values, not only shapes."""

import struct

import numpy as np
import pytest
import tifffile

from jaxcells.data.images import read_image
from tests.data.pixels import assert_reads, assert_refused, random_pixels


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


def test_separate_images_are_chosen_by_series_and_thumbnails_passed_over(tmp_path):
    path = tmp_path / "a.tif"
    one, two = random_pixels((6, 5, 1)), random_pixels((9, 4, 1))
    with tifffile.TiffWriter(path) as tif:
        tif.write(one[..., 0], metadata=None)
        tif.write(two[..., 0], metadata=None)
    assert_refused(path, "2 separate images", "YX 9x4", "data.plane=series=0 (0 to 1)")
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
        for target, words in ((second, "circle"), (10**6, "inside its list of pages, at 3")):
            struct.pack_into(form, contents, place, target)
            path.write_bytes(contents)
            assert_refused(path, words, plane="I=0")
