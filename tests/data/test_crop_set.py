import dataclasses
import json
import logging
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from jaxcells import Error
from jaxcells.data import crop_set as module
from jaxcells.data.crop_set import open_crop_set, pixel_sha256, prepare_crop_set, verify_pixels
from jaxcells.data.crops import CropSettings
from jaxcells.data.images import read_image
from tests.data.folders import textured, write_folder, write_image

SETTINGS = CropSettings(seed=0, crop_size=32, crops_per_class=10, split=(6, 2, 2))


@pytest.fixture
def root(tmp_path):
    root = write_folder(tmp_path / "images", {"A (1)/ch 1": 3, "B": 4})
    for path in root.rglob("*.png"):
        write_image(path, read_image(path)[..., 0].astype(np.uint16) << 4)
    return root


@pytest.fixture
def crop_set(root, tmp_path):
    return prepare_crop_set(tmp_path / "crops", root, SETTINGS)


def test_every_crop_is_the_pixels_that_the_manifest_says(crop_set, root, tmp_path):
    assert crop_set.class_names == ("A (1)", "B")
    assert len(crop_set.records) == 20
    assert [len(crop_set.split(name)) for name in ("train", "val", "test")] == [12, 4, 4]
    for record in crop_set.records:
        field = read_image(root / record.source)
        pixels = read_image(tmp_path / "crops" / record.crop)
        window = field[record.y : record.y + 32, record.x : record.x + 32]
        np.testing.assert_array_equal(pixels, window)
        assert pixels.dtype == np.uint16
        assert record.sha256 == pixel_sha256(pixels)
        assert record.crop.startswith(f"{record.split}/{record.label}/")
        assert record.channel == ("ch 1" if record.label == "A (1)" else "")
        assert record.group == record.source
    header = (tmp_path / "crops" / "manifest.csv").read_text().splitlines()[0]
    assert header == "crop,class,channel,source,group,y,x,foreground,split,sha256"
    assert prepare_crop_set(tmp_path / "two", root, SETTINGS).records == crop_set.records


def test_a_rerun_reuses_what_is_there(crop_set, root, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "draw_crops", None)
    monkeypatch.setattr(module, "read_image", None)
    # What a file browser leaves is no change.
    (tmp_path / "crops" / "train" / ".DS_Store").write_text("")
    assert prepare_crop_set(tmp_path / "crops", root, SETTINGS) == crop_set
    # The folder may be away by then: a run is resumed on its crops.
    root.rename(tmp_path / "unmounted")
    assert prepare_crop_set(tmp_path / "crops", root, SETTINGS) == crop_set


def test_other_settings_are_named(crop_set, root, tmp_path):
    changed = dataclasses.replace(SETTINGS, seed=4, crop_size=40, split_by="crop")
    with pytest.raises(Error) as error:
        prepare_crop_set(tmp_path / "crops", root, changed)
    assert str(error.value).startswith(
        f"{tmp_path / 'crops'} was drawn with other settings: data.seed was 0, now 4; "
        "data.crop_size was 32, now 40; data.split_by was 'field', now 'crop'; choose another"
    )


def test_changed_missing_and_added_files_are_named(crop_set, tmp_path):
    verify_pixels(crop_set)
    victim = tmp_path / "crops" / crop_set.records[3].crop
    before = victim.read_bytes()
    Image.fromarray(255 - np.asarray(Image.open(victim))).save(victim)
    with pytest.raises(Error, match=rf"pixels of .*{victim.name} differ from manifest\.csv"):
        verify_pixels(open_crop_set(tmp_path / "crops"))
    victim.unlink()
    with pytest.raises(Error, match=rf"1 missing, 0 added: train/.*{victim.name}"):
        open_crop_set(tmp_path / "crops")
    victim.write_bytes(before)
    (victim.parent / "mine.png").write_bytes(before)
    with pytest.raises(Error, match=r"0 missing, 1 added: .*mine\.png"):
        open_crop_set(tmp_path / "crops")


def test_changed_images_are_refused(crop_set, root, tmp_path):
    write_image(root / "B" / "new.png", textured(60, 80, 77))
    (root / "B" / "field1.png").unlink()
    with pytest.raises(Error, match=r"1 new or changed, 1 gone: B/new\.png, B/field1\.png"):
        prepare_crop_set(tmp_path / "crops", root, SETTINGS)


def test_another_folder_is_compared_by_its_pixels(crop_set, root, tmp_path):
    moved = root.rename(tmp_path / "moved")
    assert prepare_crop_set(tmp_path / "crops", moved, SETTINGS) == crop_set
    # Another day of one microscope: equal names and sizes, other cells.
    victim = moved / "B" / "field0.png"
    size = victim.stat().st_size
    write_image(victim, textured(60, 80, 4242))
    with open(victim, "ab") as file:
        file.write(b"\0" * (size - victim.stat().st_size))
    with pytest.raises(Error, match=r"not the images that .* was drawn from \(1 new or changed"):
        prepare_crop_set(tmp_path / "crops", moved, SETTINGS)
    with pytest.raises(Error, match="the image folder does not exist"):
        prepare_crop_set(tmp_path / "crops", tmp_path / "typo", SETTINGS)


def test_a_folder_that_is_no_crop_set_is_left_alone(root, tmp_path):
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "precious.txt").write_text("mine")
    with pytest.raises(Error, match="not a crop set"):
        prepare_crop_set(tmp_path / "crops", root, SETTINGS)
    assert (tmp_path / "crops" / "precious.txt").read_text() == "mine"


def test_images_of_crop_size_are_used_whole(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 20, "B": 10}, size=(32, 32))
    crop_set = prepare_crop_set(tmp_path / "crops", root, SETTINGS)
    assert [len(crop_set.split(name)) for name in ("train", "val", "test")] == [18, 6, 6]
    assert crop_set.notes[0].startswith("images are used whole, as if cut elsewhere")
    as_asked = dataclasses.replace(SETTINGS, crop_size=0)
    assert prepare_crop_set(tmp_path / "whole", root, as_asked).records == crop_set.records


def test_what_was_done_is_noted_and_logged(root, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jaxcells"), "propagate", True)
    caplog.set_level(logging.INFO, logger="jaxcells")
    settings = dataclasses.replace(SETTINGS, split_by=r"field(\d)")
    notes = prepare_crop_set(tmp_path / "crops", root, settings).notes
    assert notes == (r"data.split_by=field(\d): 4 groups in 7 images, such as 0, 1, 2, … 1 more",)
    assert f"note: {notes[0]}" in caplog.messages
    assert "found 7 images: A (1) 3, B 4" in caplog.messages
    assert "wrote 20 crops to" in caplog.text


@pytest.mark.parametrize("change", [lambda image: image[:-1], lambda image: image.astype("uint8")])
def test_a_field_that_changes_meanwhile_is_an_error(root, tmp_path, monkeypatch, change):
    monkeypatch.setattr(module, "read_image", lambda path, **kwargs: change(read_image(path)))
    with pytest.raises(Error, match="damaged, or changed since its header was read"):
        prepare_crop_set(tmp_path / "crops", root, SETTINGS)
    assert not (tmp_path / "crops").exists()


@pytest.mark.parametrize("step", ["write_crop", "write_csv", "write_json"])
def test_an_interrupted_write_leaves_nothing_that_passes_for_a_set(
    root, tmp_path, monkeypatch, step
):
    with monkeypatch.context() as patch:
        patch.setattr(module, step, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_crop_set(tmp_path / "crops", root, SETTINGS)
    assert not (tmp_path / "crops").exists()
    assert (tmp_path / "crops.partial").exists()
    assert len(prepare_crop_set(tmp_path / "crops", root, SETTINGS).records) == 20
    assert not (tmp_path / "crops.partial").exists()


def test_an_edited_manifest_is_refused(crop_set, tmp_path):
    path = tmp_path / "crops" / "manifest.csv"
    path.write_text(path.read_text().replace(",train,", ",test,", 1))
    with pytest.raises(Error, match=r"manifest\.csv is not the one that was written there"):
        open_crop_set(tmp_path / "crops")
    path.unlink()
    with pytest.raises(Error, match="not a crop set, or a damaged one"):
        open_crop_set(tmp_path / "crops")


def test_a_set_of_another_version_is_refused_in_words(crop_set, tmp_path):
    path = tmp_path / "crops" / "crop_set.json"
    description = json.loads(path.read_text())
    description["settings"]["data.plane"] = description["settings"].pop("plane")
    path.write_text(json.dumps(description))
    with pytest.raises(Error, match=r"another version .*\(data.plane, plane\)"):
        open_crop_set(tmp_path / "crops")
