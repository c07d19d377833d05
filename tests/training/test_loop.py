"""The loop in this process: stopping anywhere and going on gives the same bits."""

import json
import random
import time

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import default
from jaxcells import Error
from jaxcells.training import loop
from jaxcells.training.checkpoints import _read_arrays, list_steps, restore_variables
from jaxcells.training.initialization import Initialization
from jaxcells.training.progress import Progress, read_metrics
from jaxcells.training.signals import Interrupted, StopRequest
from jaxcells.workflows.prepare import prepare_data
from tests.data.folders import write_folder

NUM_STEPS = 15  # three epochs of 40 crops in batches of 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("images"), {"A": 6, "B": 6})
    config = default.get_config()
    config.model.name, config.model.width, config.init = "resnet18", 2, "random"
    config.data.root, config.data.crop_size = str(root), 32
    config.data.crops_per_class, config.data.split = 28, (20, 4, 4)
    config.data.augment.dihedral, config.data.augment.intensity = True, 0.1
    config.optim.class_weights, config.optim.weight_decay = "balanced", 1e-4
    config.train.batch_size, config.train.num_epochs = 8, 3
    return config


@pytest.fixture(scope="module")
def data(config, tmp_path_factory):
    return prepare_data(config, tmp_path_factory.mktemp("data"))


def train(config, data, workdir):
    workdir.mkdir(exist_ok=True)
    return loop.train(config, workdir, data, Initialization("random"), start=time.monotonic())


def last_state(workdir) -> dict[str, np.ndarray]:
    step = list_steps(workdir / "checkpoints")[-1]
    assert step == NUM_STEPS
    folder = workdir / "checkpoints" / str(step)
    tree = {name: _read_arrays(folder, name) for name in ("variables", "optimizer")}
    return flatten_dict(tree, sep="/")


@pytest.fixture(scope="module")
def whole(config, data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train(config, data, workdir)
    return workdir


def test_stopped_at_any_step_and_resumed_is_bit_identical(
    config, data, whole, tmp_path, monkeypatch
):
    stops = sorted(random.SystemRandom().sample(range(1, NUM_STEPS), 2))

    def requested(self, step):
        self.signal = 15 if step - 1 in stops and step - 1 == stops[0] else 0
        return self.signal != 0

    monkeypatch.setattr(StopRequest, "requested", requested)
    while stops:
        with pytest.raises(Interrupted, match=f"stopped at step {stops[0]} of {NUM_STEPS}"):
            train(config, data, tmp_path)
        assert list_steps(tmp_path / "checkpoints")[-1] == stops.pop(0)
    train(config, data, tmp_path)

    expected, found = last_state(whole), last_state(tmp_path)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(expected[name], found[name], err_msg=name)
    records = [read_metrics(w / "metrics.jsonl") for w in (whole, tmp_path)]
    for record in (*records[0], *records[1]):
        record.pop("images_per_second", None)
    assert records[0] == records[1]


def test_what_is_trained_is_what_is_stored(config, data, whole):
    variables, meta = restore_variables(whole / "checkpoints", "latest")
    assert meta["class_names"] == ["A", "B"]
    assert meta["model"]["num_classes"] == 2
    assert meta["normalization"]["kind"] == "imagenet"
    assert meta["step"] == meta["num_steps"] == NUM_STEPS
    assert meta["progress"]["images"] == 3 * 40
    assert variables["params"]["fc"]["kernel"].shape == (16, 2)


def test_records_after_the_last_checkpoint_are_removed(config, data, whole, tmp_path):
    path = whole / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before + json.dumps({"step": 99, "split": "val"}) + '\n{"step": 1')
    train(config, data, whole)
    assert path.read_text() == before


def test_a_loss_that_is_not_finite_is_named_and_never_saved(config, data, tmp_path):
    config = config.copy_and_resolve_references()
    config.optim.learning_rate = 1e30
    with pytest.raises(Error, match=r"the loss is (nan|inf) at step \d"):
        train(config, data, tmp_path)
    assert list_steps(tmp_path / "checkpoints") == []


def test_balanced_class_weights_give_every_class_the_same_weight():
    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = loop._class_weights("balanced", labels)
    np.testing.assert_allclose(np.array(weights) * [6, 3, 1], 10 / 3)
    assert loop._class_weights("none", labels) is None


def test_typical_seconds_count_every_epoch_as_the_median_of_its_phase():
    progress = Progress(epochs_s=[1.0, 1.0, 10.0, 40.0, 20.0, 20.0, 400.0], activations_s=5.0)
    assert progress.typical_train_s(3) == 5 + 3 * 1 + 4 * 30
    assert progress.typical_train_s(0) == 5 + 7 * 20
