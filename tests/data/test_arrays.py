import logging

import numpy as np
import pytest
from PIL import Image

from jaxcells import Error
from jaxcells.data import crop_set as crop_set_module
from jaxcells.data.arrays import open_arrays, with_fraction
from jaxcells.data.crop_set import prepare_crop_set
from jaxcells.data.crops import CropSettings
from jaxcells.data.images import read_image
from tests.data.folders import write_folder

SETTINGS = CropSettings(seed=0, crop_size=32, crops_per_class=10, split=(6, 2, 2))


@pytest.fixture
def crop_set(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 3, "B": 3})
    return prepare_crop_set(tmp_path / "crops", root, SETTINGS)


def test_arrays_hold_the_crops_in_the_order_of_the_manifest(crop_set, tmp_path):
    arrays = open_arrays(crop_set, tmp_path / "arrays")
    assert arrays["train"].images.shape == (12, 32, 32, 1)
    assert arrays["train"].images.dtype == np.uint8
    assert isinstance(arrays["train"].images, np.memmap)
    for split in arrays.values():
        for image, label, record in zip(split.images, split.labels, split.records, strict=True):
            np.testing.assert_array_equal(image, read_image(crop_set.directory / record.crop))
            assert crop_set.class_names[label] == record.label
    assert arrays["test"].labels.dtype == np.int32
    assert set(arrays["val"].groups) == {r.group for r in crop_set.split("val")}


def test_whole_arrays_are_read_without_the_files_of_the_crops(crop_set, tmp_path, monkeypatch):
    expected = np.array(open_arrays(crop_set, tmp_path / "arrays")["train"].images)
    monkeypatch.setattr(crop_set_module, "read_image", None)
    again = open_arrays(crop_set, tmp_path / "arrays")["train"].images
    np.testing.assert_array_equal(again, expected)


def test_changed_pixels_do_not_get_into_the_arrays(crop_set, tmp_path):
    path = crop_set.directory / crop_set.records[5].crop
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    with pytest.raises(Error, match=rf"pixels of .*{path.name} differ from manifest\.csv"):
        open_arrays(crop_set, tmp_path / "arrays")
    assert not (tmp_path / "arrays").exists()


@pytest.mark.parametrize("damage", ["a bit", "truncated", "missing", "a row less"])
def test_damaged_arrays_are_made_anew(crop_set, tmp_path, damage, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jaxcells"), "propagate", True)
    before = np.array(open_arrays(crop_set, tmp_path / "arrays")["val"].images)
    assert not caplog.messages
    path = tmp_path / "arrays" / "val.npy"
    content = path.read_bytes()
    path.unlink()
    if damage == "a bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncated":
        path.write_bytes(content[:-900])
    elif damage == "a row less":
        np.save(path, before[:-1])
    np.testing.assert_array_equal(open_arrays(crop_set, tmp_path / "arrays")["val"].images, before)
    assert "not the pixels of the manifest; decoding the crops again" in caplog.text


def test_arrays_are_made_where_a_link_leads(crop_set, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "arrays").symlink_to("../arrays")
    made = open_arrays(crop_set, tmp_path / "run" / "arrays")["val"].images
    np.save(tmp_path / "arrays" / "val.npy", made[:-1])
    again = open_arrays(crop_set, tmp_path / "run" / "arrays")["val"].images
    assert len(again) == len(crop_set.split("val"))
    assert (tmp_path / "run" / "arrays").is_symlink()
    assert sorted(path.name for path in tmp_path.glob("arrays/*"))[1] == "train.npy"


def test_a_fraction_of_the_training_images_is_a_part_of_a_larger_one(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 12, "B": 5})
    settings = CropSettings(seed=0, crop_size=32, crops_per_class=40, split=(30, 5, 5))
    crop_set = prepare_crop_set(tmp_path / "crops", root, settings)
    train = open_arrays(crop_set, tmp_path / "arrays")["train"]
    number = {n: len({r.source for r in train.records if r.label == n}) for n in "AB"}
    before = set()
    for fraction in (0.01, 0.25, 0.5, 0.75):
        part = with_fraction(train, fraction, seed=3)
        kept = {record.source for record in part.records}
        for label in "AB":
            expected = max(1, round(fraction * number[label]))
            assert sum(name.startswith(label) for name in kept) == expected
        assert before <= kept
        before = kept
        rows = [row for row, record in enumerate(train.records) if record.source in kept]
        np.testing.assert_array_equal(part.images, train.images[rows])
        assert part.labels.tolist() == train.labels[rows].tolist()
        assert part.records == tuple(train.records[row] for row in rows)
    assert with_fraction(train, 1.0, seed=3) is train
    others = [with_fraction(train, 0.25, seed=seed) for seed in range(8)]
    assert len({tuple(part.records) for part in others}) > 1
