import numpy as np
import pytest
from PIL import Image

from jaxcells import Error
from jaxcells.data.arrays import open_arrays
from jaxcells.data.crop_set import open_crop_set
from jaxcells.data.crop_writer import prepare_crop_set
from jaxcells.data.images import read_image
from tests.data.folders import write_folder

SETTINGS = {"crop_size": 32, "crops_per_class": 10, "split": (6, 2, 2), "split_by": "field"}


@pytest.fixture
def crop_set(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 3, "B": 3})
    return prepare_crop_set(tmp_path / "crops", root, seed=0, **SETTINGS)


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


def test_arrays_are_made_once_and_anew_for_another_manifest(crop_set, tmp_path):
    open_arrays(crop_set, tmp_path / "arrays")
    written = (tmp_path / "arrays" / "train.npy").stat().st_mtime_ns
    open_arrays(crop_set, tmp_path / "arrays")
    assert (tmp_path / "arrays" / "train.npy").stat().st_mtime_ns == written
    other = prepare_crop_set(tmp_path / "other", tmp_path / "images", seed=1, **SETTINGS)
    arrays = open_arrays(other, tmp_path / "arrays")
    first = read_image(other.directory / arrays["train"].records[0].crop)
    np.testing.assert_array_equal(arrays["train"].images[0], first)


def test_changed_pixels_do_not_get_into_the_arrays(crop_set, tmp_path):
    path = crop_set.directory / crop_set.records[5].crop
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    with pytest.raises(Error, match=r"the pixels are not those of manifest\.csv"):
        open_arrays(open_crop_set(crop_set.directory), tmp_path / "arrays")
    assert not (tmp_path / "arrays").exists()


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_damaged_arrays_are_made_anew(crop_set, tmp_path, damage):
    before = np.array(open_arrays(crop_set, tmp_path / "arrays")["val"].images)
    path = tmp_path / "arrays" / "val.npy"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + b"\0" if damage == "changed" else content[:-900])
    np.testing.assert_array_equal(open_arrays(crop_set, tmp_path / "arrays")["val"].images, before)
