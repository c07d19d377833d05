import csv
import logging
import shutil

import numpy as np
import pytest

from jaxcells import Error
from jaxcells.data.crop_set import open_crop_set, prepare_crop_set
from jaxcells.data.crops import CropSettings
from jaxcells.data.sheet import find_in_sheet
from tests.data.folders import textured, write_image

SETTINGS = CropSettings(seed=0, crop_size=32, crops_per_class=10, split=(6, 2, 2))


@pytest.fixture
def images(tmp_path):
    """Twelve images in one folder, as a microscope numbers them."""
    folder = tmp_path / "data"
    for number in range(12):
        write_image(folder / "scans" / f"{number}.png", textured(60, 80, number))
    return folder


def write_sheet(folder, rows, name="labels.csv", **dialect):
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, **dialect).writerows(rows)
    return folder / name


def rows(*columns, **changes):
    """The head and twelve lines: even numbers are of class B; changes as line2={...}."""
    lines = []
    for n in range(12):
        cells = {"path": f"scans/{n}.png", "class": "AB"[n % 2], "channel": f"ch{n % 3}"}
        cells |= {"group": f"plate{n // 2}", "split": ("train", "Val", "testing")[n // 2 % 3]}
        lines.append([(cells | changes.get(f"line{n + 2}", {}))[column] for column in columns])
    return [columns, *lines]


def test_a_sheet_gives_paths_classes_channels_groups_and_splits(images):
    sheet = write_sheet(images, rows("path", "class", "channel", "group", "split"))
    fields = find_in_sheet(sheet)
    assert [f.name for f in fields] == sorted(f"scans/{n}.png" for n in range(12))
    field = fields[[f.name for f in fields].index("scans/5.png")]
    assert (field.label, field.channel, field.group, field.split) == ("B", "ch2", "plate2", "test")
    assert field.path == images / "scans/5.png"
    assert (field.info.height, field.info.width, field.info.dtype) == (60, 80, "uint8")
    plain = find_in_sheet(write_sheet(images, rows("class", "path")))
    assert [(f.channel, f.group, f.split) for f in plain] == [("", f.name, None) for f in plain]
    fewer = find_in_sheet(sheet, exclude=r"/1\d?\.png")
    assert len(fewer) == 9


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_what_spreadsheets_write_is_understood(images, delimiter, start, caplog, monkeypatch):
    lines = rows("path", "class")[1:]
    lines = [[f" {path} ".replace("/", "\\"), f"{label} ", "x"] for path, label in lines]
    lines[0][0] = str(images / "scans" / "0.png")
    lines[1][0] = "./scans/1.png"
    sheet = write_sheet(images, [("Path", " CLASS", "note"), *lines], delimiter=delimiter)
    text = sheet.read_text("utf-8") + f"\r\n{2 * delimiter}\r\n"
    sheet.write_text(start + text, "utf-8", newline="")
    monkeypatch.setattr(logging.getLogger("jaxcells"), "propagate", True)
    caplog.set_level(logging.INFO, logger="jaxcells")
    fields = find_in_sheet(sheet)
    assert f"{sheet}: columns that are not read: note" in caplog.messages
    assert {f.label for f in fields} == {"A", "B"}
    names = {str(images / "scans/0.png")} | {f"scans/{n}.png" for n in range(1, 12)}
    assert {f.name for f in fields} == names
    assert all(f.path.is_file() for f in fields)


def test_all_faults_are_listed_with_their_lines(images):
    (images / "scans/3.png").write_text("no image")
    changes = {
        "line2": {"path": "scans/77.png"},
        "line4": {"path": "scans/../scans/1.png", "class": "A"},
        "line6": {"split": "trian"},
        "line7": {"split": ""},
        "line8": {"class": ""},
        "line9": {"class": "a/b"},
        "line10": {"path": ""},
    }
    sheet = write_sheet(images, [*rows("path", "class", "split", **changes), ["a", "A", "test", 5]])
    with pytest.raises(Error) as error:
        find_in_sheet(sheet)
    text = str(error.value)
    assert text.startswith(f"{sheet}: 9 of 13 lines cannot be used: line 2: ")
    for words in (
        "77.png: cannot be opened: no such file or directory",
        "line 4: scans/../scans/1.png is in line 3 too, of class 'B'",
        "line 5: ",
        "is no PNG, JPEG, TIFF",
        "line 6: split 'trian' is none of train, val and test",
        "line 7: split '' is none of",
        "line 8: class '' cannot be the name of a folder",
        "line 9: class 'a/b' cannot",
        "line 10: ",
        "line 14: too many cells (a text with ',' needs double quotes)",
    ):
        assert words in text
    many = [("path", "class"), *((f"{n}.png", "A") for n in range(40))]
    with pytest.raises(Error, match=r"40 of 40 lines .*line 11: .*0, … 30 more|… 30 more$"):
        find_in_sheet(write_sheet(images, many))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "must name the columns path and class, .*; it has nothing"),
        (b"file,class\na,b\n", "must name the columns path and class, .*; it has file, class"),
        (b"path,class,class\na,b,c\n", "each once; it has path, class, class"),
        ("path;class\nä.png;A\n".encode("latin-1"), "cannot be read as CSV in UTF-8 .*0xe4"),
        (b"PK\x03\x04\xff\xfe", "cannot be read as CSV in UTF-8"),
        (b'path,class\n"a,b\n', "cannot be read as CSV in UTF-8 .*unexpected end of data"),
        (b"path,class\nscans/1.png,A\n", "a classifier needs two or more classes"),
        (None, "cannot be read as CSV in UTF-8 .*No such file"),
    ],
)
def test_what_is_no_such_sheet_is_refused(images, content, text):
    if content is not None:
        (images / "labels.csv").write_bytes(content)
    with pytest.raises(Error, match=rf"labels\.csv: .*{text}"):
        find_in_sheet(images / "labels.csv")


def test_crops_of_a_sheet_keep_its_split_and_its_groups(images, tmp_path):
    sheet = write_sheet(images, rows("path", "class", "group", "split"))
    crop_set = prepare_crop_set(tmp_path / "split", sheet, SETTINGS)
    assert (crop_set.came_split, crop_set.split_by, crop_set.root) == (True, "group", str(images))
    for record in crop_set.records:
        number = int(record.source.removeprefix("scans/").removesuffix(".png"))
        assert record.split == ("train", "val", "test")[number // 2 % 3]
        assert (record.label, record.group) == ("AB"[number % 2], f"plate{number // 2}")

    # Without a split, plates of both classes stay together; another policy is one asked for.
    sheet = write_sheet(images, rows("path", "class", "group"))
    crop_set = prepare_crop_set(tmp_path / "grouped", sheet, SETTINGS)
    splits = {}
    for record in crop_set.records:
        assert splits.setdefault(record.group, record.split) == record.split
    assert len(splits) == 6
    note = "column group: 6 groups in 12 images, such as plate0, plate1, plate2, … 3 more"
    assert note in crop_set.notes
    by_number = CropSettings(0, 32, 10, (6, 2, 2), split_by=r"(\d+)\.")
    crop_set = prepare_crop_set(tmp_path / "own", sheet, by_number)
    assert crop_set.split_by == by_number.split_by
    assert len({record.group for record in crop_set.records}) == 12


def test_a_changed_sheet_is_noticed_and_a_moved_one_is_not(images, tmp_path):
    sheet = write_sheet(images, rows("path", "class"))
    crop_set = prepare_crop_set(tmp_path / "crops", sheet, SETTINGS)
    assert prepare_crop_set(tmp_path / "crops", sheet, SETTINGS) == crop_set
    write_sheet(images, rows("path", "class"), delimiter=";")
    assert prepare_crop_set(tmp_path / "crops", sheet, SETTINGS) == crop_set
    # The images are the same; one has another class.
    write_sheet(images, rows("path", "class", line4={"class": "B"}))
    with pytest.raises(Error, match=r"1 new or changed, 0 gone: scans/2\.png"):
        prepare_crop_set(tmp_path / "crops", sheet, SETTINGS)
    sheet = write_sheet(images, rows("path", "class"), name="again.csv")
    assert prepare_crop_set(tmp_path / "crops", sheet, SETTINGS) == crop_set
    moved = images.rename(tmp_path / "moved")
    assert prepare_crop_set(tmp_path / "crops", moved / "again.csv", SETTINGS) == crop_set
    write_image(moved / "scans/0.png", np.zeros((60, 80), np.uint8))
    with pytest.raises(Error, match="not the images that"):
        prepare_crop_set(tmp_path / "crops", moved / "again.csv", SETTINGS)
    # All may be away: a run is resumed on its crops.
    shutil.rmtree(moved)
    assert prepare_crop_set(tmp_path / "crops", images / "labels.csv", SETTINGS) == crop_set
    assert open_crop_set(tmp_path / "crops") == crop_set
