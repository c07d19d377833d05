import dataclasses

import numpy as np
import pytest

from jaxcells import Error
from jaxcells.data.arrays import open_arrays
from jaxcells.data.audit import audit_crops, describe_audit
from jaxcells.data.crop_set import prepare_crop_set
from jaxcells.data.crops import CropSettings
from jaxcells.data.fields import SPLITS
from tests.data.folders import textured, write_folder, write_image

SETTINGS = CropSettings(seed=0, crop_size=32, crops_per_class=30, split=(18, 6, 6))


def audit(tmp_path, root, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    crop_set = prepare_crop_set(tmp_path / "crops", root, settings)
    return audit_crops(crop_set, open_arrays(crop_set, tmp_path / "arrays")), crop_set


def audit_batches(crop_set, arrays, batch_by):
    settings = dataclasses.replace(crop_set.settings, batch_by=batch_by)
    return audit_crops(dataclasses.replace(crop_set, settings=settings), arrays)


def test_a_clean_set_passes_with_its_counts(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 20, "a long name, " * 4: 20})
    result, crop_set = audit(tmp_path, root)
    assert result.errors == ()
    assert result.shared_pixels == {"val": 0, "test": 0}
    assert result.counts["train"]["A"] == {"crops": 18, "fields": 12}
    assert result.counts["test"]["A"] == {"crops": 6, "fields": 4}
    assert any("few independent fields in test (A 4, a long" in w for w in result.warnings)
    lines = describe_audit(result, crop_set.class_names).splitlines()
    assert lines[0].split() == ["class", *SPLITS]
    assert lines[1].split() == ["A", "18", "/", "12", "6", "/", "4", "6", "/", "4"]
    assert len(lines[0]) == len(lines[1]) == len(lines[2])
    assert lines[-1] == "audit passed: nothing stands in two splits"
    result.raise_errors()


@pytest.fixture
def audit_changed(tmp_path):
    """Returns a function that audits a good crop set of which the records were changed."""
    root = write_folder(tmp_path / "images", {"A": 9, "B": 9})
    _, crop_set = audit(tmp_path, root)

    def audit_records(change):
        changed = dataclasses.replace(crop_set, records=tuple(change(crop_set.records)))
        return audit_crops(changed, open_arrays(crop_set, tmp_path / "arrays"))

    return audit_records


def test_a_source_in_two_splits_is_an_error(audit_changed):
    def move(records):
        last = records[-1]
        return [dataclasses.replace(records[0], source=last.source, group=last.group), *records[1:]]

    result = audit_changed(move)
    assert result.errors[0].startswith("1 groups in two splits, such")
    with pytest.raises(Error, match=r"the audit found \d errors: 1 groups in two splits"):
        result.raise_errors()
    assert "ERROR: 1 groups in two splits" in describe_audit(result, ("A", "B"))


def test_identical_crops_of_different_images_are_an_error(audit_changed):
    result = audit_changed(
        lambda records: [dataclasses.replace(records[0], sha256=records[-1].sha256), *records[1:]]
    )
    assert [error[:35] for error in result.errors] == [
        "1 crops are identical in two splits",
        "1 crops are identical in two classe",
    ]


def test_a_split_without_crops_of_a_class_is_an_error(audit_changed):
    result = audit_changed(
        lambda records: [r for r in records if (r.label, r.split) != ("B", "val")]
    )
    assert "class 'B' has no crops in val" in result.errors


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_without_any_crops_is_an_error(tmp_path, split):
    root = write_folder(tmp_path / "images", {"A": 3, "B": 3})
    _, crop_set = audit(tmp_path, root)
    records = tuple(record for record in crop_set.records if record.split != split)
    crop_set = dataclasses.replace(crop_set, records=records)
    result = audit_crops(crop_set, open_arrays(crop_set, tmp_path / "others"))
    assert result.errors == tuple(f"class {name!r} has no crops in {split}" for name in "AB")
    assert "ERROR" in describe_audit(result, crop_set.class_names)


def test_copies_under_other_names_are_found_though_their_crops_differ(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 9, "B": 9})
    for copy in ("A/copy1.png", "A/copy2.png", "A/copy3.png", "B/of_a.png"):
        original = "A/field5.png" if copy == "B/of_a.png" else "A/field0.png"
        (root / copy).write_bytes((root / original).read_bytes())
    result, crop_set = audit(tmp_path, root)
    assert len({record.sha256 for record in crop_set.records}) == len(crop_set.records)
    in_splits, in_classes = result.errors
    assert "are there twice, under two names in two splits, such as A/" in in_splits
    assert "in two classes, such as A/field5.png and B/of_a.png" in in_classes


def test_a_fold_may_share_fields_between_train_and_val_and_nothing_with_test(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 2, "B": 3})
    result, crop_set = audit(tmp_path, root, fold="1/0 all")  # tests a field of A alone
    assert result.errors == ()
    assert result.counts["test"]["B"]["crops"] == 0
    (shared,) = [text for text in result.warnings if "this fold" in text]
    assert "1 groups give crops to train and val of this fold" in shared
    assert not any("in val" in text or "in test" in text for text in result.warnings)
    assert "A/field1.png" in shared
    last = describe_audit(result, crop_set.class_names).splitlines()[-1]
    assert last == "audit passed, with pixels of val in training crops too"

    arrays = open_arrays(crop_set, tmp_path / "arrays")
    *others, tested = crop_set.records
    for split in ("train", "val"):
        known = next(r for r in others if r.split == split)
        moved = dataclasses.replace(tested, source=known.source, group=known.group)
        leaking = audit_crops(dataclasses.replace(crop_set, records=(*others, moved)), arrays)
        assert leaking.errors[0].startswith("1 groups in two splits")


def test_the_random_split_says_how_many_pixels_are_shared(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 2, "B": 2})
    result, crop_set = audit(tmp_path, root, split_by="crop")
    assert result.errors == ()

    def pixels(split):
        for r in crop_set.split(split):
            yield from ((r.source, r.y + y, r.x + x) for y in range(32) for x in range(32))

    trained = set(pixels("train"))
    shown = [pixel in trained for pixel in pixels("test")]
    assert 0.5 < np.mean(shown) < 1
    assert result.shared_pixels["test"] == np.mean(shown)
    assert any("data.split_by=crop: 4 images" in w for w in result.warnings)


@pytest.mark.parametrize("crop_size", [0, 32])
def test_whole_images_split_as_crops_are_split_by_field(tmp_path, crop_size):
    root = write_folder(tmp_path / "images", {"A": 6, "B": 6}, size=(32, 32))
    result, crop_set = audit(tmp_path, root, split_by="crop", crop_size=crop_size)
    assert crop_set.split_by == "field"
    assert result.shared_pixels == {"val": 0, "test": 0}
    (root / "B" / "field1.png").write_bytes((root / "B" / "field0.png").read_bytes())
    found = set()
    for seed in range(4):
        changes = {"split_by": "crop", "crop_size": crop_size, "seed": seed}
        result, _ = audit(tmp_path / str(seed), root, **changes)
        found |= {"there twice" in text for text in result.errors}
    assert True in found  # which a random split of crops would not refuse


def test_near_constant_crops_are_warned_of_and_are_no_leak(tmp_path):
    for label in "AB":
        for number in range(10):
            pixels = np.full((32, 32), 9, np.uint8) if number < 3 else textured(32, 32, number)
            pixels = pixels + (label == "B" and number >= 3)
            write_image(tmp_path / "images" / label / f"{number}.png", pixels.astype(np.uint8))
    result, _ = audit(tmp_path, tmp_path / "images")
    assert result.errors == ()
    assert any(w.startswith("6 of 20 crops are nearly constant") for w in result.warnings)


def test_shortcuts_between_classes_are_warned_of(tmp_path):
    for number in range(8):
        write_image(tmp_path / "images" / "A" / f"{number}.png", textured(60, 80, number))
        write_image(tmp_path / "images" / "B" / f"{number}.bmp", textured(70, 80, 50 + number))
    result, _ = audit(tmp_path, tmp_path / "images")
    assert any("differ in file type (A: .png; B: .bmp)" in w for w in result.warnings)
    assert any("differ in image size (A: 60x80; B: 70x80)" in w for w in result.warnings)


def test_unequal_classes_are_warned_of(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 30, "B": 9}, size=(32, 32))
    result, _ = audit(tmp_path, root)
    assert any("A has 18 training crops, B 5" in w for w in result.warnings)


def write_plates(root, layout, suffix="png"):
    """Writes `layout["A/plate0"]` images whose names begin with the plate."""
    for number, (folder, count) in enumerate(layout.items()):
        label, plate = folder.split("/")
        for image in range(count):
            name = f"{label}/{plate}_{image}.{suffix}"
            write_image(root / name, textured(60, 80, 1000 * number + image))
    return root


def confounded(result):
    return [warning for warning in result.warnings if "confounded" in warning]


def test_batches_that_lack_a_class_are_warned_of(tmp_path):
    layout = {"A/plate0": 3, "A/plate1": 5, "B/plate1": 5, "B/plate2": 3}
    root = write_plates(tmp_path / "images", layout)
    result, crop_set = audit(tmp_path, root)
    assert confounded(result) == []
    arrays = open_arrays(crop_set, tmp_path / "arrays")
    (warning,) = confounded(audit_batches(crop_set, arrays, r"(plate\d)"))
    assert warning.startswith(
        "data.batch_by: batches and classes are confounded (plate0: A, plate1: A+B, plate2: B)"
    )
    assert "may tell these apart instead of cells" in warning
    # One batch of all, and batches that show every class, are no shortcut.
    assert confounded(audit_batches(crop_set, arrays, "(plate)")) == []
    with pytest.raises(
        Error, match=r"batch_by='\(plate0\)' finds no group 1 in the path of A/plate1"
    ):
        audit_batches(crop_set, arrays, "(plate0)")


def test_a_batch_for_each_class_is_said_strongly(tmp_path):
    layout = {"A/day0": 5, "A/day1": 5, "B/day2": 5, "B/day3": 5}
    root = write_plates(tmp_path / "images", layout)
    crop_set = audit(tmp_path, root)[1]
    arrays = open_arrays(crop_set, tmp_path / "arrays")
    (warning,) = confounded(audit_batches(crop_set, arrays, r"(day\d)"))
    assert "(day0: A, day1: A, day2: B, day3: B)" in warning
    assert "need not look at cells at all, and no figure of this study could show it" in warning


def test_groups_of_an_expression_are_batches_where_they_hold_many_images(tmp_path):
    layout = {
        f"{label}/plate{k}": 5 for label, ks in (("A", range(5)), ("B", (2, 3, 4))) for k in ks
    }
    root = write_plates(tmp_path / "images", layout)
    (warning,) = confounded(audit(tmp_path, root, split_by=r"(plate\d)")[0])
    assert warning.startswith(r"data.split_by=(plate\d): groups and classes are confounded")
    assert "plate0: A, plate1: A, plate2: A+B, plate3: A+B, plate4: A+B" in warning
    # The pictures of one field, of which a class has more than another, are no plates.
    small = write_plates(
        tmp_path / "small", {f"{c}/f{k}": 2 for c in "AB" for k in range(4 + (c == "A"))}
    )
    result = audit(tmp_path / "other", small, split_by=r"(f\d)")[0]
    assert confounded(result) == []


@pytest.mark.parametrize(("factor", "number"), [(16, 1), (4, 0)])
def test_pixel_ranges_that_differ_sixteenfold_are_warned_of(tmp_path, factor, number):
    for label, scale in (("A", 16), ("B", 16 * factor)):
        for image in range(9):
            pixels = textured(60, 80, ord(label) * 100 + image).astype(np.uint16) * scale
            write_image(tmp_path / "images" / label / f"{image}.png", pixels)
    result, _ = audit(tmp_path, tmp_path / "images")
    found = [warning for warning in result.warnings if "range of their pixels" in warning]
    assert len(found) == number
    if found:
        # Noise fills the range of either class: up to 255 times its scale.
        assert "(99.9 % are below: A: 4080, B: 65280)" in found[0]
