import csv
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcells import Error
from jaxcells.data import crop_writer as module
from jaxcells.data.crop_set import open_crop_set, verify_pixels
from jaxcells.data.crop_writer import prepare_crop_set
from jaxcells.data.images import read_image
from jaxcells.data.manifest import pixel_sha256, read_manifest
from tests.data.folders import textured, write_folder, write_image

SETTINGS = {
    "seed": 0,
    "crop_size": 32,
    "crops_per_class": 10,
    "split": (6, 2, 2),
    "split_by": "field",
}


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "images", {"A (1)/ch 1": 3, "B": 4})


def test_every_crop_is_the_pixels_that_the_manifest_says(root, tmp_path):
    crop_set = prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    assert crop_set.class_names == ("A (1)", "B")
    assert len(crop_set.records) == 20
    assert [len(crop_set.split(side)) for side in ("train", "val", "test")] == [12, 4, 4]
    for record in crop_set.records:
        field = read_image(root / record.source)
        pixels = read_image(tmp_path / "crops" / record.crop)
        window = field[record.y : record.y + 32, record.x : record.x + 32]
        np.testing.assert_array_equal(pixels, window)
        assert record.sha256 == pixel_sha256(pixels)
        assert record.crop.startswith(f"{record.split}/{record.label}/")
        assert record.channel == ("ch 1" if record.label == "A (1)" else "")
        assert record.group == record.source
    with open(tmp_path / "crops" / "manifest.csv", newline="") as file:
        header = next(csv.reader(file))
    assert header == ["crop", "class", "channel", "source", "group", "y", "x", "split", "sha256"]


def test_the_same_crops_are_made_anywhere(root, tmp_path):
    first = prepare_crop_set(tmp_path / "one", root, **SETTINGS)
    second = prepare_crop_set(tmp_path / "two", root, **SETTINGS)
    assert first.records == second.records


def test_a_rerun_reuses_what_is_there(root, tmp_path, monkeypatch):
    first = prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    monkeypatch.setattr(module, "write_crop_set", None)
    assert prepare_crop_set(tmp_path / "crops", root, **SETTINGS) == first
    # The folder may be away by then: a run is resumed on its crops.
    root.rename(tmp_path / "unmounted")
    assert prepare_crop_set(tmp_path / "crops", root, **SETTINGS) == first


def test_other_settings_are_named(root, tmp_path):
    prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    changed = SETTINGS | {"crop_size": 40, "split_by": "crop"}
    with pytest.raises(Error) as error:
        prepare_crop_set(tmp_path / "crops", root, **changed)
    assert "data.crop_size was 32, now 40; data.split_by was 'field', now 'crop'" in str(
        error.value
    )


def test_changed_missing_and_added_files_are_named(root, tmp_path):
    crop_set = prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    victim = tmp_path / "crops" / crop_set.records[3].crop
    before = victim.read_bytes()
    Image.fromarray(255 - np.asarray(Image.open(victim))).save(victim)
    with pytest.raises(Error, match=r"pixels are not those of manifest.csv \(1 of 20") as error:
        prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    assert str(victim) in str(error.value)
    victim.unlink()
    with pytest.raises(Error, match="1 missing, such as train/"):
        open_crop_set(tmp_path / "crops")
    victim.write_bytes(before)
    verify_pixels(open_crop_set(tmp_path / "crops"))
    (victim.parent / "mine.png").write_bytes(before)
    with pytest.raises(Error, match=r"1 not in the manifest, such as .*mine\.png"):
        open_crop_set(tmp_path / "crops")


def test_a_changed_image_folder_is_refused(root, tmp_path):
    prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    write_image(root / "B" / "new.png", textured(60, 80, 77))
    with pytest.raises(Error, match=r"1 new or changed, 0 gone: B/new\.png"):
        prepare_crop_set(tmp_path / "crops", root, **SETTINGS)


def test_another_folder_is_compared_by_its_pixels(root, tmp_path):
    first = prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    moved = root.rename(tmp_path / "moved")
    assert prepare_crop_set(tmp_path / "crops", moved, **SETTINGS) == first
    # Another day of one microscope: equal names and sizes, other cells.
    victim = moved / "B" / "field0.png"
    size = victim.stat().st_size
    write_image(victim, textured(60, 80, 4242))
    with open(victim, "ab") as file:
        file.write(b"\0" * (size - victim.stat().st_size))
    with pytest.raises(Error, match=r"not the images that .* was drawn from \(1 new or changed"):
        prepare_crop_set(tmp_path / "crops", moved, **SETTINGS)
    with pytest.raises(Error, match="the image folder does not exist"):
        prepare_crop_set(tmp_path / "crops", tmp_path / "typo", **SETTINGS)


def test_what_the_file_browser_leaves_is_no_change(root, tmp_path):
    first = prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    (tmp_path / "crops" / "train" / ".DS_Store").write_text("")
    assert prepare_crop_set(tmp_path / "crops", root, **SETTINGS) == first


def test_a_folder_that_is_no_crop_set_is_left_alone(root, tmp_path):
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "precious.txt").write_text("mine")
    with pytest.raises(Error, match="not a crop set"):
        prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    assert (tmp_path / "crops" / "precious.txt").read_text() == "mine"


def test_images_of_crop_size_are_used_whole(tmp_path, caplog):
    write_folder(tmp_path / "images", {"A": 20, "B": 10}, size=(32, 32))
    crop_set = prepare_crop_set(tmp_path / "crops", tmp_path / "images", **SETTINGS)
    assert len(crop_set.records) == 30
    assert [len(crop_set.split(side)) for side in ("train", "val", "test")] == [18, 6, 6]
    assert "images are used whole, as crops that were made elsewhere" in crop_set.notes
    as_asked = prepare_crop_set(
        tmp_path / "whole", tmp_path / "images", **SETTINGS | {"crop_size": None}
    )
    assert as_asked.records == crop_set.records


def test_crops_of_16_bit_images_keep_their_bits(tmp_path):
    rng = np.random.default_rng(0)
    for label in "AB":
        for number in range(3):
            pixels = rng.integers(0, 4096, (50, 50), dtype=np.uint16)
            write_image(tmp_path / "images" / label / f"{number}.png", pixels)
    crop_set = prepare_crop_set(tmp_path / "crops", tmp_path / "images", **SETTINGS)
    crop = read_image(crop_set.directory / crop_set.records[0].crop)
    assert crop.dtype == np.uint16
    assert crop.max() > 255


def test_a_field_that_shrinks_meanwhile_is_an_error(root, tmp_path, monkeypatch):
    def shrunk(path, **kwargs):
        return read_image(path, **kwargs)[:-1]

    monkeypatch.setattr(module, "read_image", shrunk)
    with pytest.raises(Error, match="its header says"):
        prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    assert not (tmp_path / "crops").exists()


def test_a_killed_write_leaves_nothing_that_passes_for_a_set(tmp_path):
    write_folder(tmp_path / "images", {"A": 4, "B": 4}, size=(400, 400))
    script = textwrap.dedent(
        """
        import sys
        from jaxcells.data.crop_writer import prepare_crop_set
        prepare_crop_set(sys.argv[1] + "/crops", sys.argv[1] + "/images", seed=0, crop_size=64,
                         crops_per_class=2000, split=(1000, 500, 500), split_by="field")
        """
    ).replace('sys.argv[1] + "/crops"', '__import__("pathlib").Path(sys.argv[1], "crops")')
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment)
    partial = tmp_path / "crops.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and sum(1 for _ in partial.rglob("*.png")) > 50):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "crops").exists()
    crop_set = prepare_crop_set(tmp_path / "crops", tmp_path / "images", **SETTINGS)
    assert len(crop_set.records) == 20
    assert not partial.exists()


def test_damaged_manifests(root, tmp_path):
    prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    path = tmp_path / "crops" / "manifest.csv"
    text = path.read_text()
    path.write_text(text[: len(text) - 100].rsplit(",", 3)[0] + "\n")
    with pytest.raises(Error, match="a line is damaged"):
        read_manifest(path)
    path.write_text("a,b\n")
    with pytest.raises(Error, match="not a manifest"):
        read_manifest(path)


def test_an_edited_manifest_is_refused(root, tmp_path):
    prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    path = tmp_path / "crops" / "manifest.csv"
    path.write_text(path.read_text().replace(",train,", ",test,", 1))
    with pytest.raises(Error, match=r"manifest\.csv was changed after it was written"):
        prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    (tmp_path / "crops" / "crop_set.json").write_text("{}")
    with pytest.raises(Error, match="not a crop set, or a damaged one"):
        open_crop_set(tmp_path / "crops")


def test_what_was_done_is_logged(root, tmp_path, caplog):
    logging.getLogger("jaxcells").propagate = True
    with caplog.at_level(logging.INFO, logger="jaxcells"):
        prepare_crop_set(tmp_path / "crops", root, **SETTINGS)
    assert "found 7 images: A (1) 3, B 4" in caplog.text
    assert "wrote 20 crops to" in caplog.text
