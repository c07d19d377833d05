import logging

import numpy as np
import pytest
from PIL import Image

from jaxcells import Error
from jaxcells.data import crop_set as crop_set_module
from jaxcells.data.arrays import open_arrays
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
