"""The loop in this process: stopping anywhere and going on gives the same bits."""

import collections
import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

from jaxcells import Error
from jaxcells.training import loop
from jaxcells.training.checkpoints import list_steps, restore_variables
from jaxcells.training.progress import Progress
from jaxcells.training.signals import Interrupted
from tests.training.conftest import assert_same_run, last_state, metrics

NUM_STEPS = 15  # three epochs of 40 crops in batches of 8


@pytest.fixture(scope="module")
def augmented(recipe):
    """A recipe that uses everything."""
    changes = {"class_weights": "balanced", "weight_decay": 1e-4, "every_steps": 3}
    return dataclasses.replace(recipe, augmentation={"dihedral": True, "intensity": 0.1}, **changes)


@pytest.fixture(scope="module")
def whole(train, augmented, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train(augmented, workdir)
    return workdir


# Inside an epoch, beside a checkpoint within it, between two epochs, and before the last step.
def test_stopped_at_any_step_and_resumed_is_bit_identical(
    train, augmented, whole, tmp_path, stop_at
):
    for stop in (1, 3, 5, 14):
        stop_at(stop)
        with pytest.raises(Interrupted, match=f"stopped at step {stop} of {NUM_STEPS}"):
            train(augmented, tmp_path)
        assert list_steps(tmp_path / "checkpoints")[-1] == stop
    stop_at(None)
    train(augmented, tmp_path)
    assert_same_run(tmp_path, whole)
    assert len(metrics(whole)) == 6


def test_what_is_trained_is_what_is_stored(data, whole):
    variables, meta = restore_variables(whole / "checkpoints", "latest")
    assert meta.class_names == ("A", "B")
    assert meta.model["num_classes"] == 2
    assert meta.normalization.kind == "imagenet"
    assert meta.step == meta.num_steps == NUM_STEPS
    assert meta.progress.images == 3 * 40
    assert meta.progress.step_bytes > 50_000
    assert meta.manifest_sha256 == data.crop_set.manifest_sha256
    assert variables["params"]["fc"]["kernel"].shape == (8, 2)


def test_records_after_the_last_checkpoint_are_removed(train, augmented, whole):
    path = whole / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before + json.dumps({"step": 99, "split": "val"}) + '\n{"step": 1')
    train(augmented, whole)
    assert path.read_text() == before


def test_a_loss_that_is_not_finite_is_named_and_never_saved(train, augmented, whole, tmp_path):
    # What `whole` compiled is of another rate and must not be taken for this one.
    with pytest.raises(Error, match=r"training diverged: loss is not finite at step \d"):
        train(dataclasses.replace(augmented, learning_rate=1e30), tmp_path)
    assert list_steps(tmp_path / "checkpoints") == []


def test_another_seed_compiles_nothing_again(train, augmented, whole, tmp_path):
    counts = collections.Counter()

    class Listener(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("Finished XLA compilation of "):
                counts[record.getMessage().split()[4]] += 1

    logger, listener = logging.getLogger("jax._src.dispatch"), Listener()
    logger.addHandler(listener)
    try:
        with jax.log_compiles():
            train(dataclasses.replace(augmented, seed=1), tmp_path)
    finally:
        logger.removeHandler(listener)
    assert counts  # initialising is compiled
    assert not counts["jit(train_step)"] + counts["jit(eval_step)"]
    first, second = (last_state(workdir) for workdir in (whole, tmp_path))
    assert not np.array_equal(
        first["variables/params/fc/kernel"], second["variables/params/fc/kernel"]
    )


def test_balanced_class_weights_give_every_class_the_same_weight():
    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = loop._class_weights("balanced", labels)
    np.testing.assert_allclose(np.array(weights) * [6, 3, 1], 10 / 3)
    assert loop._class_weights("none", labels) is None


def test_typical_seconds_count_every_epoch_as_the_median_of_its_phase():
    progress = Progress(epochs_s=[1.0, 1.0, 10.0, 40.0, 20.0, 20.0, 400.0], features_s=5.0)
    assert progress.typical_train_s(3) == 5 + 3 * 1 + 4 * 30
    assert progress.typical_train_s(0) == 5 + 7 * 20
