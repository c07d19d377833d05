"""Images of one field under several names: found by name or by pixels, and what cures it."""

import functools
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from jaxcells import Error
from jaxcells.data.crop_set import prepare_crop_set
from jaxcells.data.crops import CropSettings
from jaxcells.data.fields import find_fields
from jaxcells.data.sheet import find_in_sheet
from jaxcells.data.siblings import check_siblings
from jaxcells.data.splits import with_groups
from tests.data.folders import textured, write_folder, write_image

SHARED = Path(__file__).parents[3] / "shared" / "data"


@functools.cache
def stains(seed):
    """Returns one field in two stains (nuclei, and larger cells beside them) and its mask."""
    rng = np.random.default_rng(seed)
    cells = np.zeros((160, 200))
    cells[rng.integers(0, 160, 12), rng.integers(0, 200, 12)] = 1
    nuclei = ndimage.gaussian_filter(cells, 4) * 100
    bodies = ndimage.gaussian_filter(np.roll(cells, (3, -3), (0, 1)), 9) * 500
    noisy = [40 + 60 * image + rng.normal(0, 3, image.shape) for image in (nuclei, bodies)]
    return *(image.clip(0, 255).astype(np.uint8) for image in noisy), (nuclei > 0.3) * np.uint8(255)


def write_stains(root, *names, kinds=(0, 1), fields=6):
    """Writes fields of two classes; a name has {c} for the class and {i} for the field."""
    for c in "AB":
        for i in range(fields):
            images = stains(1000 * ord(c) + i)
            for name, kind in zip(names, kinds, strict=True):
                write_image(root / name.format(c=c, i=i), images[kind])
    return root


def refusal(root, split_by="field"):
    with pytest.raises(Error) as caught:
        check_siblings(find_fields(root), split_by, "")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "num_groups"),
    [
        (("{c}/DAPI/f{i}.png", "{c}/GFP/f{i}.png"), 6),
        (("{c}/f{i}_DAPI.png", "{c}/f{i}_GFP.png"), 12),
        (("{c}/f{i}.ch0.png", "{c}/f{i}.ch1.png"), 12),
        (("{c}/BF/plate1/f{i}.png", "{c}/cy5/plate1/f{i}.png"), 6),
        (("{c}/plate1/BF/f{i}.png", "{c}/plate1/cy5/f{i}.png"), 6),
        (("{c}/f{i}_DAPI.ome.tif", "{c}/f{i}_GFP.ome.tif"), 12),
        (("{c}/A01_DAPI_f{i}.png", "{c}/A01_GFP_f{i}.png"), 6),
        (("{c}/A0{i}_DAPI_f1.png", "{c}/A0{i}_GFP_f1.png"), 12),
        (("{c}/plate1/DAPI/site1/f{i}.png", "{c}/plate1/GFP/site1/f{i}.png"), 6),
        (("{c}/f{i}.ab.png", "{c}/DAPI/f{i}.ab.png"), 6),
        (("{c}/raw/f{i}.png", "{c}/images/f{i}.png"), 6),
        # What names do not say, pixels show.
        (("{c}/near/f{i}.png", "{c}/far/f{i}.png"), 6),
        (("{c}/f{i}_C1.png", "{c}/f{i}_C2.png"), 12),
        (("{c}/f{i}.png", "{c}/f{i}_again.png"), 12),
    ],
    ids=str,
)
def test_stains_of_one_field_are_refused_with_a_pattern_that_cures_it(tmp_path, names, num_groups):
    root = write_stains(tmp_path, *names)
    message = refusal(root)
    assert refusal(root, "channel") == message
    assert re.match(r"(12|6) sets of images, such as A/", message)
    assert "training and test would share cells" in message
    pattern = re.search(r"data\.split_by='(.*?)' keeps each together", message)[1]
    fields = find_fields(root)
    # Each set is in one group, and a group holds no more than a field of every class.
    groups = {}
    for field in with_groups(fields, pattern):
        number = re.search(r"f(\d)", field.name)[1]
        groups.setdefault(field.group, set()).add((field.label, number))
    assert len(groups) == num_groups
    assert all(len({number for _, number in members}) == 1 for members in groups.values())
    assert check_siblings(fields, pattern, "") == []
    assert check_siblings(fields, "(.+)", "") == []


@pytest.mark.parametrize(
    ("names", "num_left"),
    [
        (("{c}/f{i}.png", "{c}/f{i}_mask.png"), 12),
        (("{c}/f{i}.png", "{c}/f{i}_cp_masks.png"), 12),
        (("{c}/images/f{i}.png", "{c}/masks/f{i}.png"), 12),
        (("{c}/images/f{i}.png", "{c}/masks/f{i}_mask.png"), 12),
        (("{c}/f{i}.png", "{c}/Labels/f{i}.png"), 12),
        (("{c}/A01_f{i}.png", "{c}/A01_mask_f{i}.png"), 12),
    ],
    ids=str,
)
def test_masks_are_refused_with_a_pattern_that_leaves_them_out(tmp_path, names, num_left):
    root = write_stains(tmp_path, *names, kinds=(1, 2))
    message = refusal(root)
    assert refusal(root, "(.+)") == message
    assert "show one field each, as their names say" in message
    pattern = re.search(r"data\.exclude='(.*?)' leaves the masks out", message)[1]
    fields = find_fields(root, exclude=pattern)
    assert [Path(names[0].format(c=f.label, i=i % 6)) for i, f in enumerate(fields)] == [
        Path(field.name) for field in fields
    ]
    assert len(fields) == num_left
    assert check_siblings(fields, "field", "") == []


def test_channels_of_a_device_that_repeat_names_are_no_siblings(tmp_path):
    walls = np.zeros((160, 200), np.uint8)
    walls[30:36], walls[140:146], walls[:, 90:94] = 80, 80, 80
    for c in "AB":
        for channel in (1, 2, 3):
            for i in range(5):
                image = stains(1000 * ord(c) + 100 * channel + i)[1] // 2 + walls
                write_image(tmp_path / f"{c}/channel {channel}/field {i:03d}.png", image)
    fields = find_fields(tmp_path)
    (note,) = check_siblings(fields, "field", "")
    assert note.startswith("5 sets of images, such as A/channel 1/field 000.png, A/channel 2/field")
    assert note.endswith("are different fields, to go by their pixels")
    # The same walls, and now the same cells: channel 2 is a copy of channel 1 in other colours.
    for i in range(5):
        for c in "AB":
            image = 255 - stains(1000 * ord(c) + 100 + i)[0] // 2 - walls
            write_image(tmp_path / f"{c}/channel 2/field {i:03d}.png", image)
    assert "with detail in the same places" in refusal(tmp_path)


def test_series_wells_and_single_pairs_are_no_siblings(tmp_path):
    write_folder(tmp_path, {"A": 4, "B": 4}, size=(32, 32))
    for number in range(3):
        write_image(tmp_path / "A" / f"day 1_00{number}.png", textured(60, 80, number))
    for number in range(6):
        name = f"plate_{'ABC'[number % 3]}{number // 3 + 1}.png"
        write_image(tmp_path / "B" / name, textured(60, 80, 10 + number))
        # Of another size; and what differs in a number alone is a series, though it be a copy.
        write_image(tmp_path / "B" / f"field{number}_overview.png", textured(200, 300, number))
        write_image(tmp_path / "A" / f"site{number // 2}_{number % 2}.png", stains(number // 2)[0])
    assert check_siblings(find_fields(tmp_path), "field", "") == []


def test_what_a_split_or_the_study_asks_for_is_not_questioned(tmp_path):
    folders = [f"{split}/{{c}}/f{{i}}_{stain}.png" for split in ("train", "val", "test")
               for stain in ("DAPI", "GFP")]  # fmt: skip
    root = write_stains(tmp_path / "split", *folders, kinds=(0, 1) * 3, fields=1)
    assert check_siblings(find_fields(root), "field", "") == []
    for image in root.glob("val/*/*"):  # now train is divided
        image.unlink()
    for folder in sorted(root.glob("val/**"), reverse=True):
        folder.rmdir()
    assert "as their names say" in refusal(root)
    root = write_stains(tmp_path / "study", "{c}/f{i}_DAPI.png", "{c}/f{i}_GFP.png")
    assert check_siblings(find_fields(root), "crop", "") == []


def test_a_fold_divides_what_came_split_anew(tmp_path):
    folders = [f"{split}/{{c}}/{split}{{i}}_{stain}.png" for split in ("train", "val", "test")
               for stain in ("DAPI", "GFP")]  # fmt: skip
    root = write_stains(tmp_path / "images", *folders, kinds=(0, 1) * 3, fields=2)
    settings = {"seed": 0, "crop_size": 64, "crops_per_class": 16, "split": (10, 3, 3)}
    for fold in ("1/2", "1/3 all"):
        with pytest.raises(Error, match="as their names say") as caught:
            prepare_crop_set(tmp_path / "crops", root, CropSettings(**settings, fold=fold))
    pattern = re.search(r"data\.split_by='(.*?)' keeps", str(caught.value))[1]
    settings = CropSettings(**settings, fold=fold, split_by=pattern)
    splits = {}
    for record in prepare_crop_set(tmp_path / "crops", root, settings).records:
        field = record.source.rpartition("_")[0]
        splits.setdefault(field, set()).add(record.split == "test")
    assert len(splits) == 12
    assert all(len(tested) == 1 for tested in splits.values())


@pytest.mark.parametrize(
    ("name", "num_groups"),
    [
        ("imgs/{c}/{s}/day1/f{i}.png", 6),
        ("{s}/{c}/f{i}.png", 12),
        ("{s}_{c}_f{i}.png", 12),
        ("{s}/day1/{c}_f{i}.png", 12),
    ],
)
@pytest.mark.parametrize("words", [("DAPI", "GFP"), ("C1", "C2")])
def test_stains_in_a_sheet_are_known_words_or_its_channels(tmp_path, name, num_groups, words):
    names = [name.replace("{s}", word) for word in words]
    write_stains(tmp_path, *names)
    lines = ["path,class,channel"]
    for c, i, s in itertools.product("AB", range(6), words):
        lines.append(f"{name.format(c=c, i=i, s=s)},{c},{s if words == ('C1', 'C2') else ''}")
    (tmp_path / "sheet.csv").write_text("\n".join(lines))
    fields = find_in_sheet(tmp_path / "sheet.csv")
    with pytest.raises(Error, match="training and test would share cells") as caught:
        check_siblings(fields, "field", "")
    pattern = re.search(r"data\.split_by='(.*?)' keeps", str(caught.value))[1]
    grouped = with_groups(fields, pattern)
    assert len({field.group for field in grouped}) == num_groups
    fields_of = {}
    for field in grouped:
        fields_of.setdefault(field.group, set()).add((field.label, field.name[-6:]))
    assert all(len({n for _, n in members}) == 1 for members in fields_of.values())


@pytest.mark.parametrize(("name", "cures"), [("{split}{i}", True), ("f{i}", False)])
def test_the_cure_parts_what_came_split_or_is_left_to_write(tmp_path, name, cures):
    names = [f"{split}/{{c}}/{stain}/day1/{name.replace('{split}', split)}.png"
             for split in ("train", "test") for stain in ("DAPI", "GFP")]  # fmt: skip
    message = refusal(write_stains(tmp_path, *names, kinds=(0, 1) * 2, fields=3))
    assert ("data.split_by='([^/]+?)" in message) == cures
    assert ("data.split_by=EXPRESSION, whose group 1 is the same in all" in message) != cures


def test_the_same_names_in_folders_that_came_split_are_no_siblings(tmp_path):
    for number, split in enumerate(("train", "test")):
        write_stains(tmp_path / split, "{c}/f{i}.png", kinds=(number,))
    assert check_siblings(find_fields(tmp_path), "field", "") == []


def test_the_crop_set_is_not_drawn_and_the_cure_draws_it(tmp_path):
    root = write_stains(tmp_path / "images", "{c}/DAPI/f{i}.png", "{c}/GFP/f{i}.png")
    settings = {"seed": 0, "crop_size": 64, "crops_per_class": 16, "split": (10, 3, 3)}
    with pytest.raises(Error, match="as their names say") as caught:
        prepare_crop_set(tmp_path / "crops", root, CropSettings(**settings))
    assert not (tmp_path / "crops").exists()
    pattern = re.search(r"data\.split_by='(.*?)' keeps", str(caught.value))[1]
    crop_set = prepare_crop_set(
        tmp_path / "crops", root, CropSettings(**settings, split_by=pattern)
    )
    splits = {}
    for record in crop_set.records:
        splits.setdefault((record.label, Path(record.source).name), set()).add(record.split)
    assert len(splits) == 12
    assert all(len(of_field) == 1 for of_field in splits.values())


@pytest.mark.parametrize("name", ["smear_fields", "single_cells"])
def test_real_images_are_no_siblings(name):
    if not (SHARED / name).exists():
        pytest.skip("the collections of images are not beside the repository")
    assert check_siblings(find_fields(SHARED / name), "field", "") == []
