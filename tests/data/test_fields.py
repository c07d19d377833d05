import logging
import os

import numpy as np
import pytest

from jaxcells import Error
from jaxcells.data.fields import find_fields, usable_fields
from tests.data.folders import textured, write_folder, write_image

NO_BORDER = (0, 0, 0, 0)


def test_classes_and_channels_come_from_folders(tmp_path):
    write_folder(tmp_path, {"A/ch1": 2, "A/ch2/deeper": 1, "B": 3})
    fields = find_fields(tmp_path)
    assert [(f.label, f.channel, f.name) for f in fields] == [
        ("A", "ch1", "A/ch1/field0.png"),
        ("A", "ch1", "A/ch1/field1.png"),
        ("A", "ch2", "A/ch2/deeper/field0.png"),
        ("B", "", "B/field0.png"),
        ("B", "", "B/field1.png"),
        ("B", "", "B/field2.png"),
    ]
    assert all((f.info.height, f.info.width, f.info.dtype) == (60, 80, "uint8") for f in fields)
    assert all(f.split is None for f in fields)


def test_awkward_names_are_found_and_strays_left_out(tmp_path, caplog):
    write_folder(tmp_path, {"HE (1)": 1, "-line [2]": 1})
    write_image(tmp_path / "HE (1)" / "sample A.JPG", textured(50, 50, 1, channels=3))
    write_image(tmp_path / "HE (1)" / "--W1 [x].png", textured(50, 50, 2))
    write_image(tmp_path / "HE (1)" / ".hidden.png", textured(50, 50, 3))
    write_image(tmp_path / ".cache" / "a.png", textured(50, 50, 4))
    (tmp_path / "SOURCE.md").write_text("where from")
    (tmp_path / "HE (1)" / "table.csv").write_text("a,b")
    (tmp_path / "HE (1)" / "Thumbs.db").write_text("")
    logging.getLogger("jaxcells").propagate = True
    with caplog.at_level(logging.INFO, logger="jaxcells"):
        fields = find_fields(tmp_path)
    assert [f.name for f in fields] == [
        "-line [2]/field0.png",
        "HE (1)/--W1 [x].png",
        "HE (1)/field0.png",
        "HE (1)/sample A.JPG",
    ]
    assert "ignored, being no images: SOURCE.md, HE (1)/table.csv" in caplog.text


def test_a_folder_that_comes_split_keeps_its_split(tmp_path):
    write_folder(
        tmp_path,
        {f"{side}/{label}": 1 for side in ("Train", "valid", "test") for label in ("A", "B")},
    )
    assert {(f.split, f.label) for f in find_fields(tmp_path)} == {
        (side, label) for side in ("train", "val", "test") for label in ("A", "B")
    }


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
        ({"A": 0, "B": 0}, "no images in any of the 2 class folders"),
        ({".": 2}, "no class folders found, but 2 images"),
        ({"train/A": 1, "test/A": 1}, "needs train, val and test"),
        ({"train/A": 1, "train/B": 1, "val/A": 1, "val/B": 1}, "needs train, val and test"),
        ({"train/A": 1, "val/A": 1, "test/A": 1, "other": 1}, "use either"),
        (
            {"train/A": 1, "val/A": 1, "test/A": 1, "test/B": 1},
            "class 'B' is in test but not in train and val",
        ),
    ],
)
def test_wrong_folders_are_named_with_counts(tmp_path, layout, text):
    for folder in layout:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    write_folder(tmp_path, layout)
    with pytest.raises(Error, match=text) as error:
        find_fields(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_root_names_the_key(tmp_path):
    with pytest.raises(Error, match=r"does not exist; set --config\.data\.root"):
        find_fields(tmp_path / "nothing")


def test_formats_that_are_not_read_are_not_left_out_silently(tmp_path):
    write_folder(tmp_path, {"A": 1, "B": 1})
    (tmp_path / "A" / "stack.czi").write_bytes(b"ZISRAWFILE")
    with pytest.raises(Error, match=r"in a format that is not read: A/stack\.czi; export"):
        find_fields(tmp_path)


def test_unreadable_images_are_counted(tmp_path):
    write_folder(tmp_path, {"A": 2, "B": 1})
    for name in ("field0.png", "field1.png"):
        (tmp_path / "A" / name).write_bytes(b"not an image")
    with pytest.raises(Error, match=r"A/field0\.png.*and 1 more of 3 images"):
        find_fields(tmp_path)


def test_images_smaller_than_the_crop(tmp_path):
    write_folder(tmp_path, {"A": 2, "B": 3})
    write_image(tmp_path / "A" / "small.png", textured(30, 90, 9))
    fields = find_fields(tmp_path)
    kept, notes = usable_fields(fields, 50, NO_BORDER)
    assert len(kept) == 5
    assert notes == ["1 of 3 images of 'A' are smaller than the 50x50 crop and give no crops"]
    with pytest.raises(Error, match=r"'A': 3, the largest 60x80, 'B': 3, the largest 60x80"):
        usable_fields(fields, 61, NO_BORDER)
    # 60 rows minus a border of 15 leave 45.
    with pytest.raises(Error, match="inside the border"):
        usable_fields(fields, 50, (15, 0, 0, 0))


def test_images_of_two_kinds_are_refused(tmp_path):
    write_folder(tmp_path, {"A": 1, "B": 1})
    write_image(tmp_path / "B" / "colour.png", textured(60, 80, 1, channels=3))
    with pytest.raises(Error, match="differ in number of colour channels: 2 with 1"):
        usable_fields(find_fields(tmp_path), 50, NO_BORDER)
    (tmp_path / "B" / "colour.png").unlink()
    write_image(tmp_path / "B" / "deep.png", textured(60, 80, 1).astype(np.uint16))
    with pytest.raises(Error, match=r"differ in pixel type: 2 with uint8.*1 with uint16"):
        usable_fields(find_fields(tmp_path), 50, NO_BORDER)
    (tmp_path / "B" / "deep.png").unlink()
    write_image(tmp_path / "B" / "wide.png", textured(60, 90, 1))
    with pytest.raises(Error, match="differ in size"):
        usable_fields(find_fields(tmp_path), None, NO_BORDER)


def test_names_that_are_not_utf8_are_refused(tmp_path):
    write_folder(tmp_path, {"A": 1, "B": 1})
    os.rename(os.fsencode(tmp_path / "B"), os.fsencode(tmp_path) + b"/zelle\xff")
    with pytest.raises(Error, match=r"zelle\\udcff: the name is not valid UTF-8"):
        find_fields(tmp_path)
