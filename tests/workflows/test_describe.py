import csv
import logging

import pytest
from PIL import Image

from configs import default
from jaxcells.files import Workdir
from jaxcells.models import create_model
from jaxcells.models.summary import layer_table, summarize
from jaxcells.workflows import describe as workflow
from jaxcells.workflows.describe import describe


@pytest.fixture
def config():
    config = default.get_config()
    config.model.name = "resnet18"
    config.model.width = 8
    config.init = "random"
    return config


def described(config, workdir, capsys):
    """The printed table and the rows of the file."""
    describe(config, Workdir(workdir))
    with open(workdir / "describe/layers.csv", newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    return capsys.readouterr().out, rows


def test_table_file_and_picture(config, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, "jaxcells")
    table, rows = described(config, tmp_path / "run", capsys)
    model = create_model("resnet18", num_classes=3, width=8)
    assert table == layer_table(summarize(model, (200, 200, 3))) + "\n"
    assert rows["fc"]["output"] == "3"  # the built-in sample
    assert rows["conv1"]["output"] == "100x100x8"
    with Image.open(tmp_path / "run/describe/network.png") as image:
        image.load()
    assert str(tmp_path / "run/describe") in caplog.text
    names = {path.name for path in (tmp_path / "run/describe").iterdir()}
    assert names == {"layers.csv", "network.png"}


@pytest.fixture
def drawn(monkeypatch):
    """What the drawing was told, in place of a file."""
    calls = []
    monkeypatch.setattr(workflow, "plot_network", lambda *_, **kw: calls.append(kw))
    return calls


def test_plain_network_is_drawn_as_one(config, tmp_path, drawn):
    for config.model.name in ("resnet18", "plain18"):
        describe(config, Workdir(tmp_path))
    assert [kw["shortcuts"] for kw in drawn] == [True, False]
    assert [kw["title"] for kw in drawn] == ["resnet18", "plain18"]


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("split", [False, True])
def test_classes_are_the_folders(config, tmp_path, capsys, split):
    root = tmp_path / "images"
    for folder in ("Train", "val", "test") if split else ("",):
        for name in ("a", "b", "c d", "e", ".hidden"):
            (root / folder / name).mkdir(parents=True)
    (root / "notes.txt").touch()
    config.data.root = str(root)
    _, rows = described(config, tmp_path / "run", capsys)
    assert rows["fc"]["output"] == "4"


@pytest.mark.usefixtures("drawn")
def test_what_is_not_known_is_said(config, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, "jaxcells")
    config.data.update(source="tfds:cells", crop_size=0)
    _, rows = described(config, tmp_path, capsys)
    assert rows["conv1"]["output"] == "112x112x8"
    assert rows["fc"]["output"] == "2"
    assert "the classes in tfds:cells are not known yet: shown with K=2" in caplog.text
    assert "data.crop_size=0 uses images whole: shown for 224x224 pixels" in caplog.text
