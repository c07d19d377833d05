"""Training on features gives what training on images gives."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxcells.data.normalization import fit_normalization
from jaxcells.training import features, loop
from jaxcells.training.checkpoints import restore_variables
from jaxcells.training.signals import Interrupted, StopRequest
from tests.training.conftest import (
    assert_same_run,
    create_small_model,
    create_small_state,
    metrics,
)

STEPS_PER_EPOCH = 5
PHASES = {"freeze": ("(?!fc)",), "freeze_epochs": 2}
START = {"freeze": ("conv1|bn1|layer1",)}


@pytest.fixture
def log(caplog):
    caplog.set_level("INFO", "jaxcells")
    return caplog


def variables_at(workdir, step):
    return flatten_dict(restore_variables(workdir / "checkpoints", step)[0], sep="/")


@pytest.mark.parametrize(
    "settings",
    [
        PHASES | {"multipliers": (("layer2", 0.1),)},
        # As many epochs as there are symmetries, or they are not worth keeping.
        {"freeze": ("(?!layer2|fc)",), "augmentation": {"dihedral": True}, "num_epochs": 8},
    ],
    ids=["head first, then all", "flips and turns"],
)
def test_same_updates_and_figures_as_without(train, recipe, tmp_path, log, settings):
    # Two programs round differently. Small steps keep that small; large ones would magnify it.
    recipe = dataclasses.replace(recipe, learning_rate=1e-3, batch_size=20, **settings)
    kept = train(recipe, tmp_path / "kept")
    assert "computed once" in log.text
    # So little that it changes no bit, but nothing is computed in advance for it.
    random = {"augmentation": {**recipe.augmentation, "intensity": 1e-30}}
    computed = train(dataclasses.replace(recipe, **random), tmp_path / "computed")
    assert "computed in every step: intensity changes crops at random" in log.text
    assert computed.images == kept.images
    assert computed.features_s == 0 < kept.features_s

    start = flatten_dict(create_small_state().variables, sep="/")
    found, expected = (variables_at(tmp_path / name, "latest") for name in ("kept", "computed"))
    assert start.keys() == expected.keys() == found.keys()
    for name in expected:
        moved, error = expected[name] - start[name], found[name] - expected[name]
        assert np.linalg.norm(error) <= 1e-2 * np.linalg.norm(moved), name  # 0 where frozen
    frozen = np.array_equal(found["params/conv1/kernel"], start["params/conv1/kernel"])
    assert frozen is ("freeze_epochs" not in settings)
    records = [metrics(tmp_path / name) for name in ("kept", "computed")]
    for one, other in zip(*records, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    # Of no use once the run is over.
    assert not list((tmp_path / "kept").glob("features*"))


def test_two_phases_resume_bit_for_bit_and_move_the_head_first(train, recipe, tmp_path, stop_at):
    recipe = dataclasses.replace(recipe, **PHASES)
    boundary = 2 * STEPS_PER_EPOCH
    train(recipe, tmp_path / "whole")

    moved = {}
    for stop in (2, boundary):  # inside a phase, and between two
        stop_at(stop)
        with pytest.raises(Interrupted, match=f"stopped at step {stop} "):
            train(recipe, tmp_path / "parts")
        moved[stop] = variables_at(tmp_path / "parts", stop)
    stop_at(None)
    train(recipe, tmp_path / "parts")

    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    for name, last in variables_at(tmp_path / "whole", 3 * STEPS_PER_EPOCH).items():
        is_head = name.startswith("params/fc")
        assert np.array_equal(moved[2][name], moved[boundary][name]) is not is_head, name
        assert not np.array_equal(moved[boundary][name], last), name


@pytest.fixture
def make_inputs(train, recipe, tmp_path, monkeypatch):
    """Returns what a training by a recipe with these changes would run on."""
    made = []

    def make_and_stop(*args, **kwargs):
        made.append(features.make_inputs(*args, **kwargs))
        raise Interrupted("made", 15)

    monkeypatch.setattr(loop, "make_inputs", make_and_stop)

    def make(**settings):
        with pytest.raises(Interrupted, match="made"):
            train(dataclasses.replace(recipe, **settings), tmp_path)
        return made[-1]

    return make


@pytest.mark.parametrize(
    ("dtype", "symmetries"), [("float32", False), ("float32", True), ("bfloat16", True)]
)
def test_features_are_what_the_segments_give_for_every_symmetry(
    make_inputs, recipe, data, dtype, symmetries
):
    model_args = recipe.model | {"dtype": dtype}
    found = make_inputs(
        model=model_args, augmentation={"dihedral": symmetries}, num_epochs=8, **START
    )
    model = create_small_model(**model_args, num_classes=2)
    variables = create_small_state(dtype=dtype).variables
    images = data.arrays["train"].images
    normalize = fit_normalization(images, recipe.normalize)
    assert found.first_segment == 2
    assert found.has_symmetries is symmetries
    assert found.train.dtype == model.dtype
    flips = [images, images[:, ::-1], images[:, :, ::-1], images[:, ::-1, ::-1]]
    turned = [*flips, *(flip.swapaxes(1, 2) for flip in flips)][: 8 if symmetries else 1]
    split = [*np.split(found.train, len(turned)), found.val]
    tolerance = 1e-5 if dtype == "float32" else 0.05
    for inputs, rows in zip([*turned, data.arrays["val"].images], split, strict=True):
        expected = model.apply(variables, normalize(inputs), train=False, last=2)
        values = (x.astype(np.float32) for x in (rows, expected))
        np.testing.assert_allclose(*values, tolerance, tolerance)


def test_symmetries_that_take_longer_than_the_epochs_are_drawn_in_every_step(make_inputs, log):
    assert make_inputs(augmentation={"dihedral": True}, num_epochs=7, **START).first_segment == 0
    assert "8 symmetries of every crop would take longer than 7 epochs" in log.text


def test_a_disk_without_room_is_spared(make_inputs, tmp_path, monkeypatch, log):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert make_inputs(**START).first_segment == 0
    assert "computed in every step: the disk has no room" in log.text
    assert not list(tmp_path.glob("features*/*.npy"))


def test_computing_features_can_be_stopped(train, recipe, tmp_path, monkeypatch):
    def stopped(self):
        self.signal = 15
        return self

    monkeypatch.setattr(StopRequest, "__enter__", stopped)
    monkeypatch.setattr(StopRequest, "__exit__", lambda self, *error: None)
    with pytest.raises(Interrupted, match="stopped at step 0 of 15"):
        train(dataclasses.replace(recipe, **START), tmp_path)
    assert not (tmp_path / "features").exists()
