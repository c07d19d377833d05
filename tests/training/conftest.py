"""A small training in this process: two classes, 40 crops of 32 pixels, two blocks."""

import dataclasses

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

from configs import default
from jaxcells.files import Workdir
from jaxcells.models import create_model
from jaxcells.training import loop
from jaxcells.training.checkpoints import list_steps
from jaxcells.training.initialization import Initialization
from jaxcells.training.progress import read_metrics
from jaxcells.training.state import create_train_state
from jaxcells.workflows.prepare import prepare_data
from jaxcells.workflows.train import make_recipe
from tests.data.folders import write_folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Crops, arrays and audit."""
    root = write_folder(tmp_path_factory.mktemp("images"), {"A": 6, "B": 6})
    config = default.get_config()
    config.data.root, config.data.crop_size = str(root), 32
    config.data.crops_per_class, config.data.split = 28, (20, 4, 4)
    return prepare_data(config, Workdir(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def recipe():
    """Three epochs of five steps."""
    return dataclasses.replace(
        make_recipe(default.get_config()),
        model={"name": "resnet18", "width": 4},
        batch_size=8,
        num_epochs=3,
    )


@pytest.fixture(scope="session")
def compiled():
    """What trainings of this process compiled."""
    return {}


def create_small_model(**arguments):
    """A network of two blocks."""
    return create_model(**arguments).clone(stage_sizes=(1, 1))


def create_small_state(*, seed=0, **arguments):
    """Its state, as a run of that seed begins with it."""
    model = create_small_model(name="resnet18", num_classes=2, width=4, **arguments)
    key = jax.random.split(jax.random.key(seed))[0]
    return create_train_state(model, optax.sgd(0.1), sample_shape=(1, 32, 32, 3), key=key)


def last_state(workdir):
    """Returns the last checkpoint's parameters, statistics, optimiser state and step by name."""
    checkpoints = Workdir(workdir).checkpoints.absolute()
    folder = checkpoints / str(list_steps(checkpoints)[-1])
    with ocp.StandardCheckpointer() as checkpointer:
        tree = {item: checkpointer.restore(folder / item) for item in ("variables", "optimizer")}
    return flatten_dict(tree, sep="/")


def metrics(workdir):
    """Returns the records of metrics.jsonl but for what the clock measured."""
    records = read_metrics(Workdir(workdir).metrics)
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records]


def assert_same_run(workdir, expected):
    """Two runs ended bit for bit alike."""
    found, state = last_state(workdir), last_state(expected)
    assert found.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(found[name], state[name], err_msg=name)
    assert metrics(workdir) == metrics(expected) != []


@pytest.fixture(scope="session")
def train(data, compiled):
    """Trains a small network by a recipe in a folder, from random parameters."""

    def train_small(recipe, workdir, compiled=compiled):
        workdir.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "create_model", create_small_model)
            return loop.train(
                *(recipe, data.crop_set, data.arrays, Initialization("random"), Workdir(workdir)),
                compiled=compiled,
            )

    return train_small


@pytest.fixture
def stop_at(monkeypatch):
    """Lets a stop be asked for after so many steps, as a signal would."""

    def stop(last):
        def requested(self, step):
            self.signal = 15 if step - 1 == last else 0
            return self.signal != 0

        monkeypatch.setattr(loop.StopRequest, "requested", requested)

    return stop
