"""Training on features gives what training on images gives."""

import dataclasses
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxcells.data.normalization import fit_normalization
from jaxcells.training import features
from jaxcells.training.checkpoints import restore_variables
from jaxcells.training.features import Inputs, compute_features, discard_features, make_inputs
from jaxcells.training.progress import read_metrics
from jaxcells.training.recipe import Phase
from jaxcells.training.signals import Interrupted, StopRequest
from tests.training.conftest import create_small_model, create_small_state

STEPS_PER_EPOCH = 5
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
NORMALIZE = fit_normalization(IMAGES, "imagenet")
PHASES = {"freeze": ("(?!fc)",), "freeze_epochs": 2}


@pytest.fixture(scope="module")
def network():
    return make_network()


def make_network(**arguments):
    model = create_small_model(name="resnet18", num_classes=2, width=4, **arguments)
    return model, create_small_state(**arguments).variables


@pytest.fixture
def log(monkeypatch):
    """Lines in the log of this module."""
    lines = []
    monkeypatch.setattr(features.logger, "info", lambda text, *values: lines.append(text % values))
    return lines


def variables_at(workdir, step):
    return flatten_dict(restore_variables(workdir / "checkpoints", step)[0], sep="/")


@pytest.mark.parametrize(
    "settings",
    [
        PHASES | {"multipliers": (("layer4", 0.1),)},
        # As many epochs as there are symmetries, or they are not worth keeping.
        {"freeze": ("(?!layer4|fc)",), "dihedral": True, "num_epochs": 8},
    ],
    ids=["head first, then all", "flips and turns"],
)
def test_same_updates_and_figures_as_without(train, recipe, tmp_path, monkeypatch, log, settings):
    # Two programs round differently. Small steps keep that small; large ones would magnify it.
    recipe = dataclasses.replace(recipe, learning_rate=1e-3, batch_size=20, **settings)
    kept = train(recipe, tmp_path / "kept")
    assert any("computed once" in line for line in log)
    assert kept.features_s > 0
    log.clear()
    monkeypatch.setattr(features, "_make_room", lambda *_: False)
    computed = train(recipe, tmp_path / "computed")
    assert any("the disk has no room" in line for line in log)
    assert computed.images == kept.images
    assert computed.features_s == 0

    start = flatten_dict(create_small_state().variables, sep="/")
    found, expected = (variables_at(tmp_path / name, "latest") for name in ("kept", "computed"))
    assert start.keys() == expected.keys() == found.keys()
    for name in expected:
        moved, error = expected[name] - start[name], found[name] - expected[name]
        assert np.linalg.norm(error) <= 1e-2 * np.linalg.norm(moved), name  # 0 where frozen
    frozen = np.array_equal(found["params/conv1/kernel"], start["params/conv1/kernel"])
    assert frozen is ("freeze_epochs" not in settings)
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("kept", "computed")]
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

    whole, parts = (variables_at(tmp_path / w, 3 * STEPS_PER_EPOCH) for w in ("whole", "parts"))
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name], err_msg=name)
        is_head = name.startswith("params/fc")
        assert np.array_equal(moved[2][name], moved[boundary][name]) is not is_head, name
        assert not np.array_equal(moved[boundary][name], whole[name]), name


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"intensity": 0.1}, "brightness changes at random"),
        ({"dihedral": True}, "8 symmetries of every crop would take longer than 1 epochs"),
    ],
)
def test_what_changes_at_random_is_computed_in_every_step(
    recipe, network, tmp_path, log, settings, text
):
    crops = Inputs(IMAGES, IMAGES, NORMALIZE)
    recipe, phase = dataclasses.replace(recipe, **settings), Phase(1, 1, ("(?!fc)",))
    found = make_inputs(
        *(*network, crops, recipe, phase, tmp_path), fingerprint="", check_stop=lambda: None
    )
    assert found is crops
    assert any("computed in every step" in line and text in line for line in log)


def compute(network, directory, num_segments=3, fingerprint="a", symmetries=False):
    return compute_features(
        *network,
        num_segments,
        Inputs(IMAGES, IMAGES[:3], NORMALIZE),
        directory,
        symmetries=symmetries,
        batch_size=4,
        fingerprint=fingerprint,
    )


@pytest.mark.parametrize(
    ("dtype", "symmetries"), [("float32", False), ("float32", True), ("bfloat16", True)]
)
def test_features_are_what_the_segments_give_for_every_symmetry(tmp_path, dtype, symmetries):
    network = model, variables = make_network(dtype=dtype)
    found = compute(network, tmp_path / "features", symmetries=symmetries)
    assert found.train.dtype == model.dtype
    assert found.train.shape == (56 if symmetries else 7, 4, 4, 8)
    assert found.has_symmetries is symmetries
    if model.dtype == ml_dtypes.bfloat16:
        assert found.train.nbytes == 2 * found.train.size
    tolerance = 1e-5 if model.dtype == np.float32 else 0.05
    for symmetry in range(8 if symmetries else 1):
        turned = IMAGES[:, ::-1] if symmetry & 1 else IMAGES
        turned = turned[:, :, ::-1] if symmetry & 2 else turned
        turned = turned.swapaxes(1, 2) if symmetry & 4 else turned
        expected = model.apply(variables, NORMALIZE(turned), train=False, last=3)
        rows = found.train[7 * symmetry : 7 * symmetry + 7]
        np.testing.assert_allclose(
            rows.astype(np.float32), expected.astype(np.float32), tolerance, tolerance
        )
    np.testing.assert_allclose(
        found.val.astype(np.float32), found.train[:3].astype(np.float32), tolerance, tolerance
    )
    # The rest of the network takes it as it is.
    logits = model.apply(variables, found.normalize(found.train[:7]), train=False, first=3)
    whole = model.apply(variables, NORMALIZE(IMAGES), train=False)
    np.testing.assert_allclose(logits, whole, tolerance, tolerance)


def test_features_are_found_again_and_never_those_of_others(network, tmp_path):
    model, variables = network
    directory = tmp_path / "features"

    def written():
        return (directory / "train.npy").stat().st_mtime_ns

    began = time.monotonic()
    made = compute((model, variables), directory)
    assert 0 < made.features_s + made.compile_s < time.monotonic() - began
    times = [written()]
    found = compute((model, variables), directory)
    assert written() == times[0]
    # The time that it took counts, whoever finds it.
    assert (found.features_s, found.compile_s) == (made.features_s, made.compile_s)
    # A head that learns changes nothing about what comes before it.
    head = {**variables["params"], "fc": jax.tree.map(lambda x: x + 1, variables["params"]["fc"])}
    compute((model, {**variables, "params": head}), directory)
    assert written() == times[0]

    other = jax.tree.map(lambda leaf: leaf * 1.5, variables)
    for changed in (
        {"fingerprint": "b"},
        {"num_segments": 2},
        {"symmetries": True},
        {"network": (model, other)},
        {},
    ):
        compute(**{"network": (model, variables), "directory": directory, **changed})
        times.append(written())
    assert len(set(times)) == 6

    # What is damaged is computed again.
    content = (directory / "train.npy").read_bytes()
    for damage in (b"", b"cut off", content[:-64] + bytes(64)):
        (directory / "train.npy").write_bytes(damage)
        again = compute((model, variables), directory)
        np.testing.assert_array_equal(again.train, made.train)
    for damage in ("[]", "{}", "{"):
        (directory / "record.json").write_text(damage)
        assert compute((model, variables), directory)
    discard_features(directory)
    assert not directory.exists()


def test_a_run_that_fills_the_disk_computes_instead(network, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage)
    assert compute(network, tmp_path / "features") is None
    assert not list(tmp_path.glob("features*/*.npy"))


def test_computing_features_can_be_stopped(train, recipe, tmp_path, monkeypatch):
    def stopped(self):
        self.signal = 15
        return self

    monkeypatch.setattr(StopRequest, "__enter__", stopped)
    monkeypatch.setattr(StopRequest, "__exit__", lambda self, *error: None)
    with pytest.raises(Interrupted, match="stopped at step 0 of 15"):
        train(dataclasses.replace(recipe, freeze=("(?!fc)",)), tmp_path)
    assert not (tmp_path / "features").exists()
