import dataclasses

import numpy as np
import pytest
import tifffile
from PIL import Image

from jaxcells import Error
from jaxcells.data.crop_set import prepare_crop_set
from jaxcells.data.crops import CropSettings
from jaxcells.data.fields import find_fields
from jaxcells.data.objects import find_cells, read_labels
from tests.data.folders import textured, write_image

NO_BORDER = (0, 0, 0, 0)
SETTINGS = CropSettings(seed=0, crop_size=32, crops_per_class="all", split=(2, 1, 1), mask="_mask")


def squares(centres, shape=(100, 120), side=9, dtype=np.uint16):
    """A label image with a square around each centre (y, x), labelled 2, 4, 6, …"""
    labels = np.zeros(shape, dtype)
    for number, (y, x) in enumerate(centres):
        rows, columns = (slice(max(c - side // 2, 0), c + side // 2 + 1) for c in (y, x))
        labels[rows, columns] = 2 * number + 2
    return labels


@pytest.fixture
def write_field(tmp_path):
    def write(name, mask, suffix=".png"):
        path = write_image(
            tmp_path / "images" / f"{name}.png", textured(*mask.shape, seed=len(name))
        )
        target = path.with_name(f"{path.stem}_mask{suffix}")
        if suffix == ".tif":
            tifffile.imwrite(target, mask)
        else:
            Image.fromarray(mask).save(target)
        return path

    return write


def cells(tmp_path, border=NO_BORDER):
    fields = find_fields(tmp_path / "images", mask="_mask")
    return find_cells(fields, "_mask", 32, border)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_crops_have_their_cells_in_the_middle(tmp_path, write_field, dtype):
    centres = [(50, 60), (30, 20), (3, 117)]
    write_field("A/f", squares(centres, dtype=dtype), ".tif")
    write_field("B/f", squares(centres[:1]))
    places, note = cells(tmp_path)
    # The last lies in the corner: its crop is shifted into the field.
    assert places["A/f.png"] == sorted([(50 - 16, 60 - 16), (30 - 16, 20 - 16), (0, 120 - 32)])
    assert places["B/f.png"] == [(34, 44)]
    assert note.startswith("data.mask=_mask: 4 cells in 2 images, 4 with a crop of their own")
    assert "touching" in note  # B has a single cell, which might be many


def test_with_one_value_connected_regions_are_the_cells(tmp_path, write_field):
    mask = squares([(20, 20), (60, 60), (69, 69)]) > 0  # the last two touch at a corner
    write_field("A/f", mask)
    write_field("B/f", np.where(mask, 255, 0).astype(np.uint8))
    places, note = cells(tmp_path)
    assert places["A/f.png"] == places["B/f.png"] == [(4, 4), (49, 49)]
    # Two cells that leave no background are labels.
    full = np.repeat([[1], [2]], 50, axis=0).repeat(120, axis=1).astype(np.uint8)
    write_field("B/g", full)
    write_field("B/h", full > 2)
    places, note = cells(tmp_path)
    assert (places["B/g.png"], places["B/h.png"]) == ([(9, 44), (59, 44)], [])
    assert "touching cells count as one in 2 masks of a single value" in note


def test_the_border_is_kept_and_equal_crops_are_one(tmp_path, write_field):
    centres = [(5, 60), (15, 60), (12, 12), (14, 13)]
    write_field("A/f", squares(centres, side=1))
    write_field("B/f", squares([(50, 50)]))
    places, note = cells(tmp_path, border=(10, 20, 0, 10))
    # (5, 60) lies in the border; the last two are shifted to the same place.
    assert places["A/f.png"] == [(10, 10), (10, 44)]
    assert note.startswith("data.mask=_mask: 5 cells in 2 images, 3 with a crop of their own")


def test_masks_that_cannot_be_are_named(tmp_path, write_field):
    first, second = (
        write_field("A/f0", squares([(50, 50)])),
        write_field("B/g", squares([(50, 50)])),
    )
    mask = first.with_name("f0_mask.png")
    labels = read_labels(mask, (100, 120))
    assert labels.max() == 2
    with pytest.raises(Error, match=r"f0_mask\.png: has 100x120 uint16 pixels: .*120x100 of them"):
        read_labels(mask, (120, 100))
    Image.fromarray(textured(100, 120, 0, channels=3)).save(mask)
    with pytest.raises(Error, match=r"f0_mask\.png: has 100x120x3 uint8 pixels"):
        cells(tmp_path)
    tifffile.imwrite(first.with_name("f0_mask.tif"), np.zeros((100, 120), np.float32))
    with pytest.raises(Error, match=r"f0_mask\.tif: has 100x120 float32 pixels"):
        read_labels(first.with_name("f0_mask.tif"), (100, 120))
    second.with_name("g_mask.png").unlink()
    with pytest.raises(
        Error, match=r"2 of 2 images have no mask .*: A/f0\.png, B/g\.png; add f0_mask"
    ):
        cells(tmp_path)
    mask.write_bytes(mask.read_bytes()[:50])
    first.with_name("f0_mask.tif").unlink()
    write_field("B/g", squares([(50, 50)]))
    with pytest.raises(Error, match=r"f0_mask\.png: cannot be decoded, it is probably damaged"):
        cells(tmp_path)
    write_field("A/f0", squares([]))
    with pytest.raises(Error, match="the masks of class 'A' show no cell"):
        cells(tmp_path)


def test_a_crop_is_a_cell(tmp_path, write_field):
    rng = np.random.default_rng(0)
    for label, numbers in (("A", (3, 7, 5, 0, 4)), ("B", (2, 2, 2, 2))):
        for f, number in enumerate(numbers):
            grid = [(y, x) for y in (20, 50, 80) for x in (20, 60, 100)]
            write_field(f"{label}/f{f}", squares(rng.permutation(grid)[:number]), ".tif")
    crop_set = prepare_crop_set(tmp_path / "all", tmp_path / "images", SETTINGS)
    assert [sum(r.label == label for r in crop_set.records) for label in "AB"] == [19, 8]
    for record in crop_set.records:
        image = tmp_path / "images" / record.source
        mask = read_labels(image.with_name(f"{image.stem}_mask.tif"), (100, 120))
        assert mask[record.y + 16, record.x + 16] > 0
    assert not any("_mask" in record.source for record in crop_set.records)
    assert any("27 cells in 9 images" in note for note in crop_set.notes)
    # Each field gives an equal share, as far as it has cells; the same ones first.
    settings = dataclasses.replace(SETTINGS, crops_per_class=12, split=(8, 2, 2))
    fewer = prepare_crop_set(tmp_path / "fewer", tmp_path / "images", settings)
    assert {r.crop for r in fewer.records} < {r.crop for r in crop_set.records}
    shares = {}
    for record in fewer.records:
        shares.setdefault((record.label, record.split, record.source), []).append(record)
    assert max(len(s) for (label, *_), s in shares.items() if label == "B") == 2
    assert [
        len(s) for (label, split, _), s in shares.items() if (label, split) == ("A", "test")
    ] == [2]
    by_crop = dataclasses.replace(SETTINGS, split_by="crop")
    mixed = prepare_crop_set(tmp_path / "mixed", tmp_path / "images", by_crop)
    counts = {s: sum(r.label == "B" for r in mixed.split(s)) for s in ("train", "val", "test")}
    assert counts == {"train": 4, "val": 2, "test": 2}
