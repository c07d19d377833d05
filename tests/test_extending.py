"""What docs/extending.md shows works as it says: its code is taken from the page and run."""

import logging
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from jaxcells import Error, models
from jaxcells.files import Workdir
from jaxcells.models.summary import summarize, totals
from jaxcells.training import augment
from jaxcells.workflows.describe import describe
from jaxcells.workflows.evaluate import evaluate
from jaxcells.workflows.export import export_weights
from jaxcells.workflows.train import train_and_evaluate
from tests.data.folders import write_folder

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture
def config(monkeypatch):
    """The default config after all that the page adds, each block where its first line says."""
    monkeypatch.setattr(models, "NETWORKS", dict(models.NETWORKS))
    monkeypatch.setattr(augment, "AUGMENTATIONS", dict(augment.AUGMENTATIONS))
    config = default.get_config()
    spaces = {"models/__init__.py": vars(models), "training/augment.py": vars(augment)}
    for path, code in re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text("utf-8"), re.S):
        if path == "configs/default.py":
            exec(code, {"config": config})
        elif (place := path.removeprefix("jaxcells/")) in spaces:
            exec(code, dict(spaces[place]))
        else:
            module = types.ModuleType(path.removesuffix(".py").replace("/", "."))
            exec(code, vars(module))
            monkeypatch.setitem(sys.modules, module.__name__, module)
    return config


def test_a_network_of_ones_own_trains_and_says_what_it_cannot(config, tmp_path, caplog):
    caplog.set_level(logging.INFO, "jaxcells")
    config.data.root = str(write_folder(tmp_path / "images", {"A": 6, "B": 6}))
    config.data.crop_size, config.data.crops_per_class, config.data.split = 32, 12, (8, 2, 2)
    config.train.batch_size, config.train.num_epochs, config.init = 8, 2, "random"
    config.model.name, config.model.width = "small", 4
    config.data.augment.noise, config.optim.freeze = 0.1, ("conv1|bn1",)
    run = Workdir(tmp_path / "run")

    results = train_and_evaluate(config, run)
    assert results.model["name"] == "small"
    assert "is frozen is computed in every step: the network has no segments" in caplog.text
    assert evaluate(run, split="test", which="best").accuracy == results.test.accuracy
    for refused, what in (
        (lambda: describe(config, run), "its description"),
        (lambda: export_weights(run), "the export of weights"),
    ):
        with pytest.raises(Error) as error:
            refused()
        assert str(error.value) == (
            f"model.name=small: {what} needs the segments and names of a residual network, and "
            "this network has none; it can be trained, evaluated and compared"
        )
    with pytest.raises(Error, match=r"one of resnet18, .*, preact1001, small$"):
        models.create_model("smal", num_classes=2)


def test_a_comparison_counts_its_parameters_and_multiply_adds(config):
    model = models.create_model("small", num_classes=3, width=4)
    convs, head = 3 * 9 * 4 + 4 * 9 * 8, 8 * 3
    expected = convs + (4 + 8) + head + 3 + 2 * (4 + 8)  # kernels, biases, scales and offsets
    counted = totals(summarize(model, (32, 32, 3)))
    assert counted == (expected, 16 * 16 * 3 * 9 * 4 + 8 * 8 * 4 * 9 * 8 + head)


def test_an_augmentation_of_ones_own_draws_apart_from_the_others(config):
    assert config.data.augment.to_dict().keys() == augment.AUGMENTATIONS.keys()
    images = jnp.asarray(np.random.default_rng(0).standard_normal((50, 8, 8, 3), np.float32))
    before = {"dihedral": True, "intensity": 0.2}
    key = jax.random.key(0)
    plain = augment.augment(images, key, **before)
    noisy = augment.augment(images, key, **before, noise=0.5)
    # Nothing that the others draw has changed.
    assert np.std(noisy - plain) == pytest.approx(0.5, rel=0.02)
    assert np.mean(noisy - plain) == pytest.approx(0, abs=0.02)
    with pytest.raises(ValueError, match="nose"):
        augment.augment(images, key, nose=1.0)


def test_every_augmentation_has_its_key():
    keys = default.get_config().data.augment.to_dict()
    assert keys.keys() == augment.AUGMENTATIONS.keys()
    assert not any(keys.values())  # off unless asked for
