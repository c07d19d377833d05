import json
import logging
import struct
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import jaxcells
from jaxcells import Error
from jaxcells.models import create_model
from jaxcells.models.preact import unstack
from jaxcells.models.torch_format import to_torch
from jaxcells.models.weights import load_pretrained
from jaxcells.training import checkpoints
from jaxcells.training.state import inference_state
from jaxcells.workflows.export import _how_to_load, export_weights
from tests.models.seeded_tensors import seeded_tensor
from tools.torchvision_import import import_torchvision

CLASSES = ["HeLa", "Jürkat", "a b"]
NORMALIZATION = {
    "kind": "imagenet",
    "low": [0.0, 0.0, 0.0],
    "high": [255.0, 255.0, 255.0],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


def seeded_variables(model, *, channels=3, salt=""):
    """Every tensor its own values, statistics too, of a size that keeps activations finite."""
    x = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    tensors = {n: seeded_tensor(salt + n, zero.shape) for n, zero in to_torch(zeros).items()}
    return load_pretrained(tensors, zeros)[0]


def write_run(workdir, *, name="resnet18", width=2, channels=3, step=4):
    """A workdir whose best checkpoint is `step`, and whose newest is the one after."""
    model_args = {
        "name": name,
        "dtype": "float32",
        "width": width,
        "zero_init_residual": False,
        "num_classes": len(CLASSES),
    }
    model = create_model(**model_args)
    for at, salt, metrics in (
        (step, "", {"balanced_accuracy": 0.9, "loss": 0.3}),
        (step + 1, "newest ", None),
    ):
        variables = seeded_variables(model, channels=channels, salt=salt)
        meta = {
            "step": at,
            "class_names": CLASSES,
            "normalization": NORMALIZATION,
            "manifest_sha256": "0123abcd",
            "model": model_args,
            "init": {"kind": "imagenet", "source": "a file"},
            "seen": {"train": ["0123456789abcdef"], "val": []},
        }
        state = inference_state(model, variables).replace(step=jnp.int32(at))
        checkpoints.save(workdir / "checkpoints", state, meta=meta, metrics=metrics)
    return model, seeded_variables(model, channels=channels)


def metadata_of(path):
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


def assert_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_the_best_checkpoint_comes_back_bit_for_bit_and_answers_alike(tmp_path):
    model, variables = write_run(tmp_path)
    path = export_weights(tmp_path)
    assert path == tmp_path / "weights.safetensors"
    fresh = seeded_variables(model, salt="fresh ")
    loaded, report = load_pretrained(path, fresh)
    assert len(report.loaded) == len(jax.tree.leaves(variables)) == 102
    assert_equal(loaded, variables)
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    apply = jax.jit(partial(model.apply, train=False))
    np.testing.assert_array_equal(apply(loaded, x), apply(variables, x))
    assert np.abs(apply(loaded, x) - apply(fresh, x)).max() > 0.01


def test_metadata_hold_what_using_the_network_needs(tmp_path):
    write_run(tmp_path)
    metadata = metadata_of(export_weights(tmp_path))
    assert json.loads(metadata["class_names"]) == CLASSES
    normalization = json.loads(metadata["normalization"])
    assert normalization.pop("apply").startswith("input = ((pixel - low) / (high - low) - mean)")
    assert normalization == NORMALIZATION
    model = json.loads(metadata["model"])
    assert model["width"] == 2
    assert create_model(**model).num_classes == 3
    del metadata["class_names"], metadata["normalization"], metadata["model"]
    assert metadata == {
        "format": "pt",
        "architecture": "resnet18",
        "num_classes": "3",
        "step": "4",
        "manifest_sha256": "0123abcd",
        "init": "imagenet",
        "seen": '{"train": ["0123456789abcdef"], "val": []}',
        "jaxcells": jaxcells.__version__,
    }


def test_other_checkpoints_and_other_files(tmp_path):
    model, best = write_run(tmp_path / "run")
    newest = seeded_variables(model, salt="newest ")
    for which, variables in ((4, best), (5, newest), ("latest", newest)):
        output = tmp_path / f"{which}.safetensors"
        assert export_weights(tmp_path / "run", output, which) == output
        assert_equal(load_pretrained(output, newest)[0], variables)
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    with pytest.raises(Error, match=r"no checkpoint of step 7 in .*choose a step of 4, 5"):
        export_weights(tmp_path / "run", tmp_path / "7.safetensors", 7)
    with pytest.raises(Error, match=r"none: train first|none/checkpoints: train first"):
        export_weights(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path):
    write_run(tmp_path)
    first = export_weights(tmp_path).read_bytes()
    # The library alone would have to repeat one order of ten entries by chance, five times over.
    assert all(export_weights(tmp_path).read_bytes() == first for _ in range(5))
    assert struct.unpack("<Q", first[:8])[0] % 8 == 0


def test_what_is_there_is_kept_unless_it_is_our_own(tmp_path):
    write_run(tmp_path)
    output = tmp_path / "mine.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(Error, match=r"--output=.*mine\.safetensors: exists already and is kept"):
        export_weights(tmp_path, output)
    assert output.read_bytes() == b"precious"
    with pytest.raises(Error, match=r"w\.pt: weights are written as safetensors"):
        export_weights(tmp_path, tmp_path / "w.pt")
    with pytest.raises(Error, match=r"there is no folder .*away; make it first"):
        export_weights(tmp_path, tmp_path / "away" / "w.safetensors")
    before = export_weights(tmp_path, which="latest").read_bytes()
    assert export_weights(tmp_path).read_bytes() != before


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write_run(tmp_path)
    path = export_weights(tmp_path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_weights(tmp_path, which="latest")
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "weights.safetensors"]


def test_the_log_says_where_it_is_and_a_plain_network_has_no_shortcuts(tmp_path, caplog):
    model, variables = write_run(tmp_path, name="plain18")
    with caplog.at_level(logging.INFO, logger="jaxcells"):
        path = export_weights(tmp_path)
    size = path.stat().st_size / 1e6
    assert caplog.messages == [
        f"plain18 of step 4 ({size:.1f} MB) is in {path}; torchvision has no plain18 for it; "
        f"--config.init={path} starts a run from it"
    ]
    assert not [name for name in load_file(path) if "downsample" in name]
    assert_equal(load_pretrained(path, seeded_variables(model, salt="fresh "))[0], variables)


RESNET = {"name": "resnet34", "num_classes": 7}


def some_tensors(*, width=64, channels=3, norms=True):
    norm = {"bn1.weight": np.ones(width)} if norms else {}
    return {"conv1.weight": np.ones((width, channels, 7, 7))} | norm


@pytest.mark.parametrize(
    ("name", "other", "what"),
    [
        ("plain34", {}, "plain34"),
        ("preact34", {}, "preact34"),
        ("resnet34", {"width": 32}, "resnet34 of width 32"),
        ("resnet34", {"norms": False}, "resnet34"),
    ],
)
def test_networks_that_torchvision_does_not_have(name, other, what):
    text = _how_to_load(Path("w"), RESNET | {"name": name}, some_tensors(**other))
    assert text == f"torchvision has no {what} for it; --config.init=w starts a run from it"


def test_the_lines_that_load_it():
    path = Path("it's.safetensors")
    lines = [
        "torchvision loads it so:",
        "  net = torchvision.models.resnet34(num_classes=7)",
        """  net.load_state_dict(safetensors.torch.load_file("it's.safetensors"))""",
    ]
    assert _how_to_load(path, RESNET, some_tensors()).splitlines() == lines
    lines.insert(2, "  net.conv1 = torch.nn.Conv2d(5, 64, 7, 2, 3, bias=False)")
    assert _how_to_load(path, RESNET, some_tensors(channels=5)).splitlines() == lines


def test_a_scanned_network_is_written_unit_by_unit_and_comes_back(tmp_path):
    model, variables = write_run(tmp_path, name="preact34")
    path = export_weights(tmp_path)
    tensors = load_file(path)
    np.testing.assert_array_equal(
        tensors["layer3.4.conv2.weight"].transpose(2, 3, 1, 0),
        variables["params"]["layer3_rest"]["conv2"]["kernel"][3],
    )
    assert "final_bn.running_var" in tensors
    assert not [name for name in tensors if "rest" in name]
    fresh = seeded_variables(model, salt="fresh ")
    assert_equal(load_pretrained(path, fresh)[0], variables)
    # As the network without a scan has them, from which the same answer follows.
    single = create_model("preact34", num_classes=len(CLASSES), width=2, scan=False)
    loaded, _ = load_pretrained(path, seeded_variables(single, salt="fresh "))
    assert_equal(loaded, unstack(variables))


def test_torchvision_loads_it_unchanged_and_answers_alike(tmp_path, caplog):
    """Runs the lines of the log, where torch and torchvision are installed."""
    try:
        torchvision = import_torchvision()
    except ImportError as error:
        pytest.skip(f"needs torch and torchvision: pip install -e '.[bench]' ({error})")
    import safetensors.torch
    import torch

    for channels in (3, 5):
        workdir = tmp_path / str(channels)
        model, variables = write_run(workdir, width=64, channels=channels)
        with caplog.at_level(logging.INFO, logger="jaxcells"):
            export_weights(workdir)
        lines = [line.strip() for line in caplog.messages[-1].splitlines()[1:]]
        assert len(lines) == (2 if channels == 3 else 3)
        names = {"torch": torch, "torchvision": torchvision, "safetensors": safetensors}
        exec("\n".join(lines), names)  # strict: a name too many or too few is an error
        net = names["net"].eval()
        assert int(net.bn1.num_batches_tracked) == 0

        images = np.random.default_rng(0).normal(size=(2, 65, 48, channels)).astype(np.float32)
        with torch.inference_mode():
            expected = net(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
        logits = jax.jit(partial(model.apply, train=False))(variables, images)
        assert expected.std() > 0.01
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
