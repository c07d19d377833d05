import dataclasses
import logging

import numpy as np
import pytest
from PIL import Image

from configs import default
from jaxcells import Error
from jaxcells.data import arrays as arrays_module
from jaxcells.files import Workdir
from jaxcells.workflows import prepare
from tests.data.folders import write_folder


@pytest.fixture
def config(tmp_path):
    config = default.get_config()
    config.data.root = str(write_folder(tmp_path / "images", {"A": 5, "B": 5}))
    config.data.update(crop_size=32, crops_per_class=10, split=(6, 2, 2), border=(1, 2, 3, 4))
    return config


@pytest.fixture
def workdir(tmp_path):
    return Workdir(tmp_path / "run")


def test_settings_come_from_the_config(config, workdir, monkeypatch):
    monkeypatch.setattr(prepare, "prepare_crop_set", lambda directory, root, settings: settings)
    changes = {"split_by": "crop", "min_foreground": 0.5, "plane": "Z=1", "exclude": "_mask"}
    config.data.update(seed=7, **changes)
    settings = dataclasses.asdict(prepare.prepare_crops(config, workdir))
    assert settings.pop("seed") == 7
    assert settings == {name: config.data[name] for name in settings}
    assert changes.items() <= settings.items()


def test_check_verifies_and_shows_the_crops(config, workdir, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jaxcells"), "propagate", True)
    caplog.set_level(logging.INFO, logger="jaxcells")
    prepare.check(config, workdir)
    assert workdir.figure("crops").stat().st_size > 1000
    assert "audit passed" in caplog.text
    assert (
        "few independent fields in train (A 3, B 3): crops of one field are alike, so what is"
        in (caplog.text)
    )
    data = prepare.prepare_data(config, workdir)
    assert [len(split.labels) for split in data.arrays.values()] == [12, 4, 4]
    assert data.seconds > 0
    # A training reads the arrays, which are still right; it is `check` that looks at every file.
    monkeypatch.setattr(arrays_module, "read_crop", None)
    victim = workdir.crops / data.crop_set.records[7].crop
    Image.fromarray(255 - np.asarray(Image.open(victim))).save(victim)
    assert prepare.prepare_data(config, workdir).crop_set == data.crop_set
    with pytest.raises(Error, match=rf"pixels of .*{victim.name} differ from manifest\.csv"):
        prepare.check(config, workdir)


def test_check_may_be_repeated_with_other_settings_until_something_is_trained(config, workdir):
    prepare.check(config, workdir)
    config.data.update(crop_size=40, border=(0, 0, 0, 0))
    prepare.check(config, workdir)
    data = prepare.prepare_data(config, workdir)
    assert data.arrays["train"].images.shape == (12, 40, 40, 1)
    drawn = workdir.crops.joinpath("manifest.csv").read_bytes()
    config.data.exclude = "png"
    with pytest.raises(Error):
        prepare.check(config, workdir)  # what was there stays where nothing can be drawn
    assert workdir.crops.joinpath("manifest.csv").read_bytes() == drawn
    config.data.exclude = ""
    config.data.crop_size = 32
    with pytest.raises(Error, match="drawn with other settings"):  # any other verb
        prepare.prepare_data(config, workdir)
    for place in ("checkpoints/3", "experiments/one_seed0/checkpoints/3"):
        (workdir.path / place).mkdir(parents=True)
        with pytest.raises(Error, match=r"data\.crop_size was 40, now 32; choose another workdir"):
            prepare.check(config, workdir)
        (workdir.path / place).rmdir()
    prepare.check(config, workdir)


def test_batches_reach_the_audit(config, workdir):
    config.data.batch_by = "([AB])/"
    assert any(
        "(A: A, B: B)" in text for text in prepare.prepare_data(config, workdir).audit.warnings
    )


def test_crop_makes_crops_and_no_more(config, workdir):
    prepare.crop(config, workdir)
    assert sorted(path.name for path in workdir.path.iterdir()) == [".lock", "crops"]


def test_check_refuses_what_the_audit_finds(config, workdir, tmp_path):
    (tmp_path / "images/B/copy.png").write_bytes((tmp_path / "images/A/field0.png").read_bytes())
    with pytest.raises(Error, match="the audit found 2 errors: 1 images are there twice"):
        prepare.check(config, workdir)


@pytest.mark.parametrize("verb", [prepare.crop, prepare.check, prepare.prepare_data])
@pytest.mark.parametrize("place", ["", "runs/first"])
def test_a_workdir_in_the_image_folder_is_refused_and_not_made(config, tmp_path, verb, place):
    images = tmp_path / "images"
    with pytest.raises(Error, match=r"lies in the image folder .* choose a workdir outside"):
        verb(config, Workdir(images / place))
    assert sorted(path.name for path in images.iterdir()) == ["A", "B"]


def test_a_workdir_may_lie_beside_a_sheet_but_is_not_its_folder(config, tmp_path):
    images = tmp_path / "images"
    lines = [f"{path.relative_to(images)},{path.parent.name}" for path in images.glob("*/*")]
    (images / "labels.csv").write_text("\n".join(["path,class", *lines]))
    config.data.update(root="", sheet=str(images / "labels.csv"))
    with pytest.raises(Error, match=r"is the folder of .*labels\.csv; choose a workdir of its own"):
        prepare.check(config, Workdir(images))
    prepare.check(config, Workdir(images / "runs"))
    assert sorted(path.name for path in images.iterdir()) == ["A", "B", "labels.csv", "runs"]
