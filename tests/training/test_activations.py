"""Training on kept activations gives what training on images gives."""

import functools
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import default
from jaxcells.data.normalization import fit_normalization
from jaxcells.models import create_model
from jaxcells.training import activations, inputs, loop
from jaxcells.training.activations import discard_activations, keep_activations
from jaxcells.training.checkpoints import restore_variables
from jaxcells.training.initialization import Initialization
from jaxcells.training.progress import read_metrics
from jaxcells.training.signals import Interrupted, StopRequest
from jaxcells.workflows.prepare import prepare_data
from tests.data.folders import write_folder

# The same sums of float32 in another order: around the cut, layers are compiled apart.
RTOL, ATOL = 1e-4, 1e-5


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("images"), {"A": 6, "B": 6})
    config = default.get_config()
    config.model.name, config.model.width, config.init = "resnet18", 4, "random"
    config.data.root, config.data.crop_size = str(root), 32
    config.data.crops_per_class, config.data.split = 28, (20, 4, 4)
    config.optim.learning_rate, config.optim.weight_decay = 0.05, 1e-3
    config.train.batch_size, config.train.num_epochs = 8, 3
    return config


STEPS_PER_EPOCH = 5


@pytest.fixture(scope="module")
def data(config, tmp_path_factory):
    return prepare_data(config, tmp_path_factory.mktemp("data"))


@pytest.fixture
def log(monkeypatch):
    """Lines that the loop writes to its log."""
    lines = []
    monkeypatch.setattr(inputs.logger, "info", lambda text, *values: lines.append(text % values))
    return lines


def train(config, data, workdir, **optim):
    config = config.copy_and_resolve_references()
    if optim.pop("dihedral", False):
        # As many epochs as there are symmetries, or they are not worth keeping.
        config.data.augment.dihedral, config.train.num_epochs = True, 8
    config.optim.update(optim)
    workdir.mkdir(exist_ok=True)
    return loop.train(config, workdir, data, Initialization("random"), start=time.monotonic())


def variables_at(workdir, step):
    return flatten_dict(restore_variables(workdir / "checkpoints", step)[0], sep="/")


@pytest.mark.parametrize(
    "optim",
    [
        {"freeze": ("(?!layer4|fc)",)},
        {"freeze": ("(?!fc)",), "freeze_epochs": 2, "multipliers": ("layer4=0.1",)},
        {"freeze": ("(?!layer4_1|fc)",), "dihedral": True},
    ],
    ids=["a stage and the head", "head first, then all", "flips and turns"],
)
def test_same_parameters_and_figures_as_without(config, data, tmp_path, monkeypatch, log, optim):
    kept = train(config, data, tmp_path / "kept", **optim)
    assert any("computed once" in line for line in log)
    assert kept.activations_s > 0
    log.clear()
    monkeypatch.setattr(activations, "_make_room", lambda directory, size: False)
    computed = train(config, data, tmp_path / "computed", **optim)
    assert any("the disk has no room" in line for line in log)
    assert computed.images == kept.images

    found, expected = (variables_at(tmp_path / name, "latest") for name in ("kept", "computed"))
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], RTOL, ATOL, err_msg=name)
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("kept", "computed")]
    for one, other in zip(*records, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    # Of no use once the run is over.
    assert not list((tmp_path / "kept").glob("activations*"))


def test_two_phases_resume_bit_for_bit_and_move_the_head_first(config, data, tmp_path, monkeypatch):
    optim = {"freeze": ("(?!fc)",), "freeze_epochs": 2}
    boundary = 2 * STEPS_PER_EPOCH
    train(config, data, tmp_path / "whole", **optim)

    stops = [2, boundary]  # inside a phase, and between two

    def requested(self, step):
        self.signal = 15 if stops and step - 1 == stops[0] else 0
        return self.signal != 0

    monkeypatch.setattr(StopRequest, "requested", requested)
    moved = {}
    while stops:
        with pytest.raises(Interrupted, match=f"stopped at step {stops[0]} "):
            train(config, data, tmp_path / "parts", **optim)
        stop = stops.pop(0)
        moved[stop] = variables_at(tmp_path / "parts", stop)
    train(config, data, tmp_path / "parts", **optim)

    whole, parts = (variables_at(tmp_path / w, 3 * STEPS_PER_EPOCH) for w in ("whole", "parts"))
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name], err_msg=name)
        is_head = name.startswith("params/fc")
        assert np.array_equal(moved[2][name], moved[boundary][name]) is not is_head, name
        assert not np.array_equal(moved[boundary][name], whole[name]), name


@pytest.mark.parametrize(
    ("augment", "text"),
    [
        ({"intensity": 0.1}, "brightness changes at random"),
        ({"dihedral": True}, "8 symmetries of every crop would take longer than 1 epochs"),
    ],
)
def test_what_changes_at_random_is_computed_in_every_step(
    config, data, tmp_path, log, augment, text
):
    config = config.copy_and_resolve_references()
    config.train.num_epochs = 1
    config.data.augment.update(augment)
    progress = train(config, data, tmp_path, freeze=("(?!fc)",))
    assert any("computed in every step" in line and text in line for line in log)
    assert progress.activations_s == 0


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def network(request):
    model = create_model("resnet18", num_classes=2, width=4, dtype=request.param)
    init = jax.jit(functools.partial(model.init, train=False))
    return model, init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def keep(network, images, directory, num_segments=3, fingerprint="a"):
    model, variables = network
    return keep_activations(
        model,
        variables,
        num_segments,
        fit_normalization(images, "imagenet"),
        {"train": images, "val": images[:3]},
        directory,
        batch_size=4,
        fingerprint=fingerprint,
    )


def test_what_is_kept_is_what_the_segments_give(network, tmp_path):
    model, variables = network
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    kept = keep(network, images, tmp_path / "activations").arrays
    pixels = fit_normalization(images, "imagenet")(images)
    expected = model.apply(variables, pixels, train=False, last=3)
    assert kept["train"].shape == (7, 8, 8, 4)
    assert kept["train"].dtype == expected.dtype == model.dtype
    tolerance = 1e-5 if model.dtype == np.float32 else 0.05
    np.testing.assert_allclose(
        kept["train"].astype(np.float32), expected.astype(np.float32), tolerance, tolerance
    )
    np.testing.assert_array_equal(kept["val"], kept["train"][:3])
    # The rest of the network takes it as it is.
    logits = model.apply(variables, kept["train"], train=False, first=3)
    whole = model.apply(variables, pixels, train=False)
    np.testing.assert_allclose(logits, whole, tolerance, tolerance)
    if model.dtype == ml_dtypes.bfloat16:
        assert kept["train"].nbytes == 2 * kept["train"].size


def test_activations_are_found_again_and_never_those_of_others(network, tmp_path):
    model, variables = network
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    directory = tmp_path / "activations"

    def written():
        return (directory / "train.npy").stat().st_mtime_ns

    began = time.monotonic()
    made = keep(network, images, directory)
    assert 0 < made.seconds + made.compile_s < time.monotonic() - began
    first = written()
    found = keep(network, images, directory)
    assert written() == first
    # The time that it took counts, whoever finds it.
    assert (found.seconds, found.compile_s) == (made.seconds, made.compile_s)
    keep(network, images, directory, fingerprint="b")
    second = written()
    assert second != first
    keep(network, images, directory, num_segments=2, fingerprint="b")
    third = written()
    assert third != second
    other = jax.tree.map(lambda leaf: leaf * 1.5, variables)
    keep((model, other), images, directory, num_segments=2, fingerprint="b")
    assert written() != third
    # A head that learns changes nothing about what comes before it.
    fourth = written()
    other["params"]["fc"]["kernel"] += 1
    keep((model, other), images, directory, num_segments=2, fingerprint="b")
    assert written() == fourth

    # What is damaged is computed again.
    expected = keep((model, other), images, directory, num_segments=2, fingerprint="b")
    first = np.array(expected.arrays["train"])
    for damage in (b"", b"cut off", (directory / "train.npy").read_bytes()[:-64] + bytes(64)):
        (directory / "train.npy").write_bytes(damage)
        again = keep((model, other), images, directory, num_segments=2, fingerprint="b")
        np.testing.assert_array_equal(again.arrays["train"], first)
    for damage in ("[]", "{}", "{"):
        (directory / "record.json").write_text(damage)
        assert keep((model, other), images, directory, num_segments=2, fingerprint="b")
    discard_activations(directory)
    assert not directory.exists()


def test_every_symmetry_of_every_image_has_its_row(network, tmp_path):
    model, variables = network
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    normalize = fit_normalization(images, "imagenet")
    kept = keep_activations(
        model,
        variables,
        3,
        normalize,
        {"train": images},
        tmp_path / "activations",
        batch_size=4,
        fingerprint="a",
        num_symmetries={"train": 8},
    ).arrays["train"]
    assert kept.shape == (40, 8, 8, 4)
    tolerance = 1e-5 if model.dtype == np.float32 else 0.05
    for symmetry in range(8):
        turned = images[:, ::-1] if symmetry & 1 else images
        turned = turned[:, :, ::-1] if symmetry & 2 else turned
        turned = turned.swapaxes(1, 2) if symmetry & 4 else turned
        expected = model.apply(variables, normalize(turned), train=False, last=3)
        np.testing.assert_allclose(
            kept[5 * symmetry : 5 * symmetry + 5].astype(np.float32),
            expected.astype(np.float32),
            tolerance,
            tolerance,
        )


def test_a_run_that_fills_the_disk_computes_instead(network, tmp_path, monkeypatch):
    images = np.zeros((5, 32, 32, 3), np.uint8)
    monkeypatch.setattr(
        activations.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})
    )
    assert keep(network, images, tmp_path / "activations") is None
    assert not list(tmp_path.glob("activations*/*.npy"))


def test_computing_activations_can_be_stopped(config, data, tmp_path, monkeypatch):
    def stopped(self):
        self.signal = 15
        return self

    monkeypatch.setattr(StopRequest, "__enter__", stopped)
    monkeypatch.setattr(StopRequest, "__exit__", lambda self, *error: None)
    with pytest.raises(Interrupted, match="stopped at step 0 of 15"):
        train(config, data, tmp_path, freeze=("(?!fc)",))
    assert not (tmp_path / "activations").exists()
