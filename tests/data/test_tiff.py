"""TIFF, BigTIFF, OME-TIFF, ImageJ and MetaMorph files: values, not only shapes."""

import struct

import numpy as np
import pytest
import tifffile

from jaxcells.data.images import read_image
from tests.data.pixels import assert_reads, assert_refused, random_pixels

ZIP = {"compression": "zlib", "predictor": True}
LZW = {"compression": "lzw", "rowsperstrip": 5}
ZSTD = {"compression": "zstd", "tile": (16, 32)}
RAMP = np.arange(256) * 257


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.tif"


def write(path, pixels, **options):
    tifffile.imwrite(path, pixels, **{"photometric": "minisblack", **options})


def overwrite(path, place, data):
    contents = bytearray(path.read_bytes())
    contents[place : place + len(data)] = data
    path.write_bytes(contents)


def patch_tag(path, code, data):
    """Overwrite the value of a tag of the first page."""
    with tifffile.TiffFile(path) as tif:
        place = tif.pages[0].tags[code].valueoffset
    overwrite(path, place, data)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("layout", [{}, {"bigtiff": True}, {"tile": (16, 16)}, ZIP, LZW, ZSTD])
def test_tiff_of_every_layout(path, dtype, byteorder, layout):
    rgb = random_pixels((37, 29, 3), dtype)
    write(path, rgb[..., 0], byteorder=byteorder, **layout)
    assert_reads(path, rgb[..., :1])
    options = {"byteorder": byteorder, "photometric": "rgb", **layout}
    write(path, rgb, **options)
    assert_reads(path, rgb)
    write(path, rgb.transpose(2, 0, 1), planarconfig="separate", **options)
    assert_reads(path, rgb)


def test_channels_without_colour_are_data_and_alpha_is_not(path):
    five = random_pixels((6, 5, 5))
    for channels in (2, 4, 5):
        write(path, five[..., :channels], planarconfig="contig")
        assert_reads(path, five[..., :channels])
    write(path, five[..., :3], planarconfig="contig", extrasamples=["unassalpha", "unspecified"])
    assert_reads(path, five[..., :3])
    write(path, five[..., :2], planarconfig="contig", extrasamples=["unassalpha"])
    assert_reads(path, five[..., :1], notes=["alpha"])
    for kind in ("unassalpha", "assocalpha", "unspecified"):
        write(path, five[..., :4], photometric="rgb", extrasamples=[kind])
        assert_reads(path, five[..., :3], notes=["alpha"])
    write(path, five, photometric="rgb", extrasamples=["unspecified"] * 2)
    assert_reads(path, five)


def test_separate_images_are_chosen_by_series_and_thumbnails_passed_over(path):
    one, two = random_pixels((6, 5, 1)), random_pixels((9, 4, 1))
    for subfiletype in (0, 1):
        with tifffile.TiffWriter(path) as tif:
            tif.write(one[..., 0], subfiletype=subfiletype, metadata=None)
            tif.write(two[..., 0], metadata=None)
        if subfiletype:
            assert_reads(path, two)
            continue
        assert_refused(path, "2 separate images", "YX 9x4", "data.plane=series=0 (0 to 1)")
        assert_reads(path, two, plane="series=1")
        assert_refused(path, "2 separate images", plane="series=2")


def test_pyramid_is_read_at_full_resolution(path):
    pixels = random_pixels((64, 48, 3))
    with tifffile.TiffWriter(path, ome=True) as tif:
        tif.write(pixels, subifds=1, photometric="rgb", metadata={"axes": "YXS"})
        tif.write(pixels[::2, ::2], subfiletype=1, photometric="rgb")
    assert_reads(path, pixels)


def test_page_that_an_acquisition_did_not_reach_is_no_page_of_zeros(path):
    stack = random_pixels((3, 6, 5))
    write(path, stack, ome=True, metadata={"axes": "ZYX"})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'SizeZ="3"', b'SizeZ="4"'))
    assert_reads(path, stack[2][..., None], plane="Z=2")
    for plane in ("Z=3", "Z=max"):
        assert_refused(path, "lacks page 3 of the 4", plane=plane)
    whole = whole.replace(b' Name="Image0"', b"")
    path.write_bytes(whole.replace(b'SizeZ="3"', b'SizeZ="9999"'.ljust(23)))
    assert_refused(path, "more pages (9999x6x5) than it has bytes", plane="Z=3")


def write_ome_set(folder):
    """Two files that describe each other as one OME-TIFF; the first with two z-planes."""
    stack = random_pixels((3, 6, 5))
    places = [("a", 0), ("a", 1), ("b", 0)]
    data = "".join(
        f'<TiffData FirstZ="{z}" IFD="{ifd}" PlaneCount="1"><UUID FileName="{name}.ome.tif">'
        f"urn:uuid:{name}</UUID></TiffData>"
        for z, (name, ifd) in enumerate(places)
    )
    for name, part in (("a", stack[:2]), ("b", stack[2:])):
        xml = (
            f'<OME UUID="urn:uuid:{name}"><Image ID="Image:0"><Pixels ID="Pixels:0" Type="uint8" '
            'DimensionOrder="XYZCT" SizeX="5" SizeY="6" SizeZ="3" SizeC="1" SizeT="1"><Channel '
            f'ID="Channel:0:0" SamplesPerPixel="1"/>{data}</Pixels></Image></OME>'
        )
        write(folder / f"{name}.ome.tif", part, description=xml, metadata=None)
    return stack


def test_only_the_pages_of_this_file_of_a_set_are_read(tmp_path):
    stack = write_ome_set(tmp_path)
    one, two = tmp_path / "b.ome.tif", tmp_path / "a.ome.tif"
    with tifffile.TiffFile(one) as tif:
        assert tif.series[0].shape == (3, 6, 5)  # what we must not do: gather the whole set
    assert_reads(one, stack[2][..., None], notes=["only this file is read"])
    assert_refused(two, "2 pages that do not say")
    assert_reads(two, stack[1][..., None], plane="I=1", notes=["only this file is read"])
    # Where no UUID tells that there is another file, its pages are not taken all the same.
    one.write_bytes(one.read_bytes().replace(b"urn:uuid:", b"urn:uuuu:"))
    assert_reads(one, stack[2][..., None], plane="Z=2")
    assert_refused(one, "lacks page 0 of the 3 it describes: it is one file of a set", plane="Z=0")


def test_stack_described_by_one_page_is_read_and_its_truncation_seen(path):
    stack = random_pixels((2, 3, 6, 5), "uint16")
    for kind in ({"imagej": True}, {"byteorder": "<"}, {"byteorder": ">"}):
        write(path, stack, metadata={"axes": "TCYX"}, truncate=True, **kind)
        with tifffile.TiffFile(path) as tif:
            assert len(tif.pages) == 1
        assert_reads(path, stack[1].transpose(1, 2, 0), plane="T=1")
        largest = stack.max(0).transpose(1, 2, 0)
        assert_reads(path, largest, plane="T=max", notes=["2 time points"])
        path.write_bytes(path.read_bytes()[:-1])
        assert_refused(path, plane="T=0")


def write_stk(path, stack):
    """A MetaMorph stack: one page, tag UIC2 with six integers for each plane."""
    planes, height, width = stack.shape
    uic1 = 8 + stack.nbytes
    uic2 = np.array([(0, 1, 2459000, second, 2459000, 0) for second in range(planes)], "<u4")
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: (4, 1, 16), 262: (4, 1, 1)}
    tags |= {273: (4, 1, 8), 278: (4, 1, height), 279: (4, 1, stack[0].nbytes)}
    tags |= {33628: (4, 4, uic1), 33629: (5, planes, uic1 + 32)}
    entries = b"".join(struct.pack("<HHII", code, *tag) for code, tag in tags.items())
    page = struct.pack("<H", len(tags)) + entries + bytes(4)
    head = b"II*\0" + struct.pack("<I", uic1 + 32 + uic2.nbytes)
    path.write_bytes(head + stack.tobytes() + bytes(32) + uic2.tobytes() + page)


def test_metamorph_stack(tmp_path):
    path = tmp_path / "a.stk"
    stack = random_pixels((3, 6, 5), "uint16")
    write_stk(path, stack)
    assert_refused(path, "3 time points (axis T)", "plane=T=0")
    for k in range(3):
        assert_reads(path, stack[k][..., None], plane=f"T={k}")
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(path, "truncated", plane="T=0")


def test_minimum_may_be_white(path):
    pixels = random_pixels((6, 5, 1))
    write(path, pixels[..., 0], photometric="miniswhite")
    assert_reads(path, pixels, notes=["MinIsWhite"])


def test_palette_of_each_page_is_a_lookup_table_or_refused(path):
    pages = random_pixels((2, 6, 5))
    stretched = np.clip((np.arange(256) - 50) * 655, 0, 65535)
    labels = random_pixels((3, 256), "uint16")
    for table in ([0 * RAMP, RAMP, 0 * RAMP], [RAMP[::-1]] * 3, [stretched] * 3):
        with tifffile.TiffWriter(path) as tif:
            for page, colormap in zip(pages, (np.array(table, np.uint16), labels), strict=True):
                tif.write(page, photometric="palette", colormap=colormap, metadata=None)
        assert_reads(path, pages[0][..., None], plane="I=0", notes=["lookup table"])
        assert_refused(path, "indexed colours", "Lookup Tables", plane="I=1")
    write(path, pages[0], photometric="palette", colormap=np.zeros((3, 256), np.uint16))
    assert_refused(path, "indexed colours")


def test_other_types_are_refused_not_converted(path):
    words = dict.fromkeys(["float16", "float64", "complex64"], "convert it to float32")
    words |= {"bool": "mask", "uint32": "labels", "int64": "int64", "int16": "int16"}
    words["int8"] = "convert it to 8-bit or 16-bit unsigned, or float32"
    for dtype, word in words.items():
        write(path, np.ones((6, 5), dtype))
        assert_refused(path, word)


def test_packed_bits_keep_their_values(path):
    pixels = random_pixels((6, 8, 1), "uint16") % 4096
    pairs = pixels.reshape(-1, 2).tolist()
    packed = b"".join((high << 12 | low).to_bytes(3, "big") for high, low in pairs)
    write(path, np.frombuffer(packed, np.uint8).reshape(6, 12), metadata=None)
    patch_tag(path, 256, struct.pack("<H", 8))  # width
    patch_tag(path, 258, struct.pack("<H", 12))  # bits of each sample
    assert_reads(path, pixels, notes=["12-bit"])


def test_colours_that_are_no_intensities_are_refused(path):
    kinds = {"separated": ("CMYK", 4), "cielab": ("CIELAB", 3), "ycbcr": ("YCBCR", 3)}
    for photometric, (name, channels) in kinds.items():
        write(path, random_pixels((6, 5, channels)), photometric=photometric)
        assert_refused(path, f"has {name} colours: convert it to grey or RGB")


def test_jpeg_in_tiff_is_rgb(path):
    pixels = np.full((32, 32, 3), (200, 90, 20), np.uint8)
    write(path, pixels, photometric="rgb", compression="jpeg", tile=(16, 16))
    with tifffile.TiffFile(path) as tif:
        assert tif.pages[0].photometric.name == "YCBCR"
    assert np.abs(read_image(path).astype(int) - pixels).max() <= 3


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_pixels_that_are_no_numbers_are_refused(path, value):
    pixels = random_pixels((2, 6, 5), "float32")
    pixels[0, 3, 2] = value
    write(path, pixels)
    for plane in ("I=0", "I=mean"):
        assert_refused(path, "NaN or infinite", inspect=False, plane=plane)


@pytest.mark.parametrize("compression", ["zlib", "lzw", "packbits", "jpeg"])
def test_missing_and_short_strips_are_seen(path, compression):
    write(path, random_pixels((64, 48)), compression=compression, rowsperstrip=16)
    with tifffile.TiffFile(path) as tif:
        tag = tif.pages[0].tags[279]
        short = struct.pack(f"<{'HI'[tag.dtype == 4]}", tag.value[1] // 2)
    patch_tag(path, 279, short)
    assert_refused(path, inspect=False)
    patch_tag(path, 279, bytes(len(short)))
    assert_refused(path, "has no data")


def test_jpeg_strip_larger_than_its_place_is_not_decoded(path):
    write(path, random_pixels((16, 16)), compression="jpeg")
    overwrite(path, path.read_bytes().index(b"\xff\xc0") + 5, struct.pack(">HH", 60000, 60000))
    assert_refused(path, "larger than its place", inspect=False)


@pytest.mark.parametrize("bigtiff", [False, True])
def test_page_list_that_loops_or_leaves_the_file_is_refused(path, bigtiff):
    write(path, random_pixels((3, 6, 5)), bigtiff=bigtiff, metadata=None)
    with tifffile.TiffFile(path) as tif:
        place, second = tif.pages.next_page_offset, tif.pages[1].offset
    for target, words in ((second, "runs in a circle"), (10**6, "ends inside its list of pages")):
        overwrite(path, place, struct.pack("<Q" if bigtiff else "<I", target))
        assert_refused(path, words, plane="I=0")
