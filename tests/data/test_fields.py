"""What is found below a folder of images, and what is said where it is not as it should be."""

import logging
import os
import re

import numpy as np
import pytest

from jaxcells import Error
from jaxcells.data.fields import find_fields, image_notes, usable_fields
from jaxcells.data.images import FOREIGN
from tests.data.folders import textured, write_folder, write_image

NO_BORDER = (0, 0, 0, 0)


@pytest.fixture
def log(caplog):
    logging.getLogger("jaxcells").propagate = True
    with caplog.at_level(logging.INFO, logger="jaxcells"):
        yield caplog


def names(fields):
    return [field.name for field in fields]


def test_classes_and_channels_come_from_folders(tmp_path, log):
    write_folder(tmp_path, {"A/ch1": 2, "A/ch2/deeper": 1, "B": 1})
    fields = find_fields(tmp_path)
    assert [(f.label, f.channel, f.name) for f in fields] == [
        ("A", "ch1", "A/ch1/field0.png"),
        ("A", "ch1", "A/ch1/field1.png"),
        ("A", "ch2", "A/ch2/deeper/field0.png"),
        ("B", "", "B/field0.png"),
    ]
    assert all((f.info.height, f.info.width, f.info.dtype) == (60, 80, "uint8") for f in fields)
    assert all(f.split is None for f in fields)
    assert "classes: A, B; channels: ch1, ch2" in log.text


def test_awkward_names_are_found_and_strays_left_out(tmp_path, log):
    write_folder(tmp_path, {"HE (1)": 1, "-line [2]": 1})
    write_image(tmp_path / "HE (1)" / "sample A.JPG", textured(50, 50, 1, channels=3))
    write_image(tmp_path / "HE (1)" / "--W1 [x].png", textured(50, 50, 2))
    write_image(tmp_path / "HE (1)" / ".hidden.png", textured(50, 50, 3))
    write_image(tmp_path / ".cache" / "a.png", textured(50, 50, 4))
    for name in ("SOURCE.md", "HE (1)/table.csv", "HE (1)/Thumbs.db", "HE (1)/field0.roi"):
        (tmp_path / name).write_text("no image")
    assert names(find_fields(tmp_path)) == [
        "-line [2]/field0.png",
        "HE (1)/--W1 [x].png",
        "HE (1)/field0.png",
        "HE (1)/sample A.JPG",
    ]
    assert "being no images: SOURCE.md, HE (1)/field0.roi, HE (1)/table.csv" in log.text


def test_a_folder_that_comes_split_keeps_its_split(tmp_path):
    folders = [f"{split}/{label}" for split in ("Train", "valid", "test") for label in "AB"]
    write_folder(tmp_path, dict.fromkeys(folders, 1))
    assert {(f.split, f.label) for f in find_fields(tmp_path)} == {
        (split, label) for split in ("train", "val", "test") for label in "AB"
    }


def test_without_a_folder_for_validation_the_training_images_are_divided(tmp_path):
    write_folder(tmp_path, {f"{split}/{label}": 2 for split in ("train", "TEST") for label in "AB"})
    fields = find_fields(tmp_path)
    assert [(f.split, f.name.split("/")[0]) for f in fields] == [("test", "TEST")] * 4 + [
        (None, "train")
    ] * 4
    (note,) = image_notes(fields)
    assert note.startswith("4 images: from the folder train, divided into training and validation")


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "elsewhere", {"B": 2})
    write_folder(tmp_path / "root", {"A": 2})
    (tmp_path / "root" / "B").symlink_to(tmp_path / "elsewhere" / "B")
    (tmp_path / "elsewhere" / "B" / "loop").symlink_to(tmp_path / "elsewhere" / "B")
    assert len(find_fields(tmp_path / "root")) == 4


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ({"A": 2}, "only one class, 'A' with 2 images"),
        ({"A": 2, "B": 0}, r"no images in B \(images per class: A: 2\)"),
        ({"A": 0, "B": 0}, r"no images in A, B .*none.*\.png"),
        ({".": 2}, "no class folders found; put the images of each cell line into a folder"),
        (
            {".": 2, "labels.csv": 0},
            "take the classes from labels.csv, save it as CSV .* set data.sheet=FILE",
        ),
        ({"images": 2, "labels.xlsx": 0}, "classes from labels.xlsx, save it as CSV with"),
        ({"one/A": 1, "one/B": 2}, r"one holds 2 folders of images \(A, B\).*data\.root=.*/one$"),
        ({"one/x/A": 1, "one/x/B": 2}, r"'one'; .*one/x holds 2 folders.*data\.root=.*/one/x$"),
        ({"one/A": 1, "one": 1}, "'one' with 2 images; a classifier needs two or more"),
        ({"train/A": 1, "val/A": 1}, "train, val look like a split, which needs the folders"),
        ({"train/A": 1, "training/A": 1, "test/A": 1}, "there are test, train, training: rename"),
        ({"train/A": 1, "test/A": 1, "test/B": 1}, "test, train need the same class folders"),
        ({"train/A": 1, "val/A": 1, "test/A": 1, "other": 1}, "there are other, test, train"),
        (
            {"train/A": 1, "val/A": 1, "test/A": 1, "test/B": 1},
            "need the same class folders, and not all of them have B",
        ),
    ],
)
def test_wrong_folders_are_named_with_what_to_do(tmp_path, layout, text):
    for name in layout:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        if "." in name[1:]:
            (tmp_path / name).rmdir()
            (tmp_path / name).write_text("name,label")
    write_folder(tmp_path, layout)
    with pytest.raises(Error, match=r"nothing: .*does not exist.*; set data\.root"):
        find_fields(tmp_path / "nothing")
    with pytest.raises(Error, match=text) as error:
        find_fields(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", sorted(FOREIGN))
def test_formats_that_are_not_read_are_not_left_out_silently(tmp_path, suffix):
    write_folder(tmp_path, {"A": 1, "B": 1})
    stack = tmp_path / "A" / f"stack{suffix}"
    write_image(stack / "0.png", textured(9, 9, 1)) if suffix == ".zarr" else stack.touch()
    with pytest.raises(Error, match=rf"not read: A/stack\{suffix}; .*exclude='\\\{suffix}\$'"):
        find_fields(tmp_path)
    assert len(find_fields(tmp_path, exclude=rf"\{suffix}$")) == 2


def test_files_are_left_out_on_demand(tmp_path, log):
    write_folder(tmp_path, {"A": 3, "B/overview": 1, "B": 1, "masks": 2})
    fields = find_fields(tmp_path, exclude=r"^masks/|overview|field[12]\.")
    assert names(fields) == ["A/field0.png", "B/field0.png"]
    assert "leaves out 5 files" in log.text


def test_unreadable_images_are_counted(tmp_path):
    write_folder(tmp_path, {"A": 2, "B": 1})
    for name in ("field0.png", "field1.png"):
        (tmp_path / "A" / name).write_bytes(b"not an image")
    with pytest.raises(Error, match=r"A/field0\.png.*and 1 more of 3 images"):
        find_fields(tmp_path)


def test_images_smaller_than_the_crop(tmp_path):
    write_folder(tmp_path, {"A": 2, "B": 12})
    write_image(tmp_path / "B" / "small.png", textured(30, 90, 9))
    fields = find_fields(tmp_path)
    kept, notes = usable_fields(fields, 50, NO_BORDER)
    assert len(kept) == 14
    hardly_larger, lost = notes
    assert "each counts as a field" in hardly_larger
    assert lost == "1 of 13 images of 'B' are smaller than the 50x50 crop and give no crops"
    fits = r"data\.crop_size=60 fits into at least nine of ten images of every class"
    whole = r"data\.crop_size=0 uses the images whole"
    with pytest.raises(Error, match=f"2 of 2 images of 'A'.*13 of 13 .*'B'.*; {fits}; {whole}"):
        usable_fields(fields, 61, NO_BORDER)
    # 60 rows minus a border of 15 leave 45.
    with pytest.raises(Error, match=r"inside the border .*data\.crop_size=45 fits"):
        usable_fields(fields, 50, (15, 0, 0, 0))
    write_image(tmp_path / "A" / "large.png", textured(90, 90, 9))
    write_image(tmp_path / "B" / "large.png", textured(90, 90, 9))
    kept, notes = usable_fields(find_fields(tmp_path), 61, NO_BORDER)
    assert names(kept) == ["A/large.png", "B/large.png"]
    assert all(re.search(f"2 of 3|13 of 14.*{fits}", note) for note in notes[1:])


def test_images_that_may_be_crops_are_noted(tmp_path):
    write_folder(tmp_path, {"A": 2, "B": 1})  # 60x80
    fields = find_fields(tmp_path)
    assert usable_fields(fields, 40, NO_BORDER)[1] == []
    for size, words in ((41, "are hardly larger than crops"), (None, "are used whole")):
        (note,) = usable_fields(fields, size, NO_BORDER)[1]
        assert note.startswith(f"images {words}, as if cut elsewhere, and each counts as a field")
        assert "need a group in common (data.split_by)" in note


def test_images_of_two_kinds_are_refused(tmp_path):
    write_folder(tmp_path, {"A": 1, "B": 1})
    odd = tmp_path / "B" / "odd.png"
    grey = textured(60, 80, 1)
    for image, size, text in (
        (textured(60, 80, 1, channels=3), 50, "number of colour channels: 2 with 1"),
        (grey.astype(np.uint16), 50, "pixel type: 2 with uint8.*1 with uint16, e.g. B/odd"),
        (textured(60, 90, 1), None, "size: 2 with 60x80 pixels"),
    ):
        write_image(odd, image)
        with pytest.raises(Error, match=f"differ in {text}"):
            usable_fields(find_fields(tmp_path), size, NO_BORDER)


def test_names_that_are_not_utf8_are_refused(tmp_path):
    write_folder(tmp_path, {"A": 1, "B": 1})
    os.rename(os.fsencode(tmp_path / "B"), os.fsencode(tmp_path) + b"/zelle\xff")
    with pytest.raises(Error, match=r"zelle\\udcff/field0.png': the name is not valid UTF-8"):
        find_fields(tmp_path)
