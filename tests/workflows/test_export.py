import json
import logging
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from safetensors.numpy import load_file

import jaxcells
from jaxcells.data.crop_set import prepare_crop_set
from jaxcells.data.crops import CropSettings
from jaxcells.data.images import write_crop
from jaxcells.data.normalization import Normalization
from jaxcells.files import Error, Workdir, from_record
from jaxcells.models import create_model
from jaxcells.models.weights import load_metadata, load_pretrained, to_torch
from jaxcells.training import checkpoints
from jaxcells.training.progress import Progress
from jaxcells.training.state import inference_state
from jaxcells.workflows.export import _how_to_load, export_tfds, export_weights
from tests.models.seeded_tensors import seeded_tensor
from tools.torchvision_import import import_torchvision

CLASSES = ("HeLa", "Jürkat", "a b")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZATION = Normalization("imagenet", low=(0.0,), high=(255.0,), mean=MEAN, std=STD)


def seeded_variables(model, *, channels=3, salt=""):
    """Every tensor its own values, statistics too, of a size that keeps activations finite."""
    x = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    tensors = {n: seeded_tensor(salt + n, zero.shape) for n, zero in to_torch(zeros).items()}
    return load_pretrained(tensors, zeros)[0]


def write_run(path, *, name="resnet18", width=2, channels=3):
    """A run whose best checkpoint is of step 4, and whose newest of step 5."""
    arguments = {"name": name, "width": width, "num_classes": len(CLASSES)}
    model, workdir = create_model(**arguments), Workdir(path)
    init, images = {"kind": "imagenet", "source": "a file"}, {"train": ("0123abcd",), "val": ()}
    scores = {"balanced_accuracy": 0.9, "loss": 0.3}
    for step, salt, metrics in ((4, "", scores), (5, "newest ", None)):
        variables = seeded_variables(model, channels=channels, salt=salt)
        what = (step, 6, Progress(), NORMALIZATION, 0, 8, CLASSES, "4567cdef")
        meta = checkpoints.CheckpointMeta(*what, arguments, init, images_by_split=images)
        state = inference_state(model, variables).replace(step=jnp.int32(step))
        checkpoints.save(workdir.checkpoints, state, meta=meta, metrics=metrics)
    return workdir, model, seeded_variables(model, channels=channels)


def assert_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("name", ["resnet18", "plain18"])
def test_the_best_checkpoint_comes_back_bit_for_bit(tmp_path, name, caplog):
    workdir, model, variables = write_run(tmp_path, name=name)
    with caplog.at_level(logging.INFO, "jaxcells"):
        path = export_weights(workdir)
    assert path == tmp_path / "weights.safetensors"
    loaded, report = load_pretrained(path, seeded_variables(model, salt="fresh "))
    assert len(report.loaded) == len(load_file(path))
    assert_equal(loaded, variables)
    said, how = caplog.messages[-1].split("; ", 1)
    assert said == f"{name} of step 4 ({path.stat().st_size / 1e6:.1f} MB) is in {path}"
    assert how == f"torchvision has no module for it; init={path} starts a run from it"


def test_a_scanned_network_is_written_unit_by_unit(tmp_path):
    workdir, _, variables = write_run(tmp_path, name="preact34")
    path = export_weights(workdir)
    tensors = load_file(path)
    np.testing.assert_array_equal(
        tensors["layer3.4.conv2.weight"].transpose(2, 3, 1, 0),
        variables["params"]["layer3_rest"]["conv2"]["kernel"][3],
    )
    assert not [name for name in tensors if "rest" in name]
    # As the network without a scan has them, from which the same answer follows.
    single = create_model("preact34", num_classes=len(CLASSES), width=2, scan=False)
    loaded, _ = load_pretrained(path, seeded_variables(single, salt="fresh "))
    assert_equal(to_torch(loaded), tensors)


def test_metadata_hold_what_using_the_network_needs(tmp_path):
    metadata = load_metadata(export_weights(write_run(tmp_path)[0]))
    assert json.loads(metadata.pop("class_names")) == list(CLASSES)
    normalization = json.loads(metadata.pop("normalization"))
    assert normalization.pop("apply").startswith("input = ((pixel - low) / (high - low) - mean)")
    assert from_record(Normalization, normalization, "") == NORMALIZATION
    assert create_model(**json.loads(metadata.pop("model"))).num_classes == 3
    images = '{"train": ["0123abcd"], "val": []}'
    origin = {"manifest_sha256": "4567cdef", "init": "imagenet", "images_by_split": images}
    network = {"format": "pt", "architecture": "resnet18", "num_classes": "3", "step": "4"}
    assert metadata == origin | network | {"jaxcells": jaxcells.__version__}


def test_other_checkpoints_and_other_files(tmp_path):
    workdir, model, best = write_run(tmp_path / "run")
    newest = seeded_variables(model, salt="newest ")
    for which, variables in ((4, best), (5, newest), ("latest", newest)):
        output = tmp_path / f"{which}.safetensors"
        assert export_weights(workdir, output, which) == output
        assert_equal(load_pretrained(output, newest)[0], variables)
    assert not (workdir.path / "weights.safetensors").exists()
    with pytest.raises(Error, match=r"no checkpoint of step 7 in .*choose a step of 4, 5"):
        export_weights(workdir, tmp_path / "7.safetensors", 7)
    with pytest.raises(Error, match="none/checkpoints: train first"):
        export_weights(Workdir(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_bytes_repeat_and_what_is_there_is_kept_unless_it_is_our_own(tmp_path, monkeypatch):
    workdir = write_run(tmp_path)[0]
    path = export_weights(workdir)
    first = path.read_bytes()
    # The library alone would have to repeat one order of ten entries by chance, five times over.
    assert all(export_weights(workdir).read_bytes() == first for _ in range(5))
    assert int.from_bytes(first[:8], "little") % 8 == 0
    for output, message in (
        (path, r"weights\.safetensors: exists already and is kept"),
        (tmp_path / "w.pt", r"w\.pt: weights are written as safetensors"),
        (tmp_path / "away" / "w.safetensors", "there is no folder .*away; make it first"),
    ):
        with pytest.raises(Error, match=message):
            export_weights(workdir, output, "latest")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            export_weights(workdir, which="latest")
    assert path.read_bytes() == first
    assert export_weights(workdir, which="latest").read_bytes() != first


@pytest.mark.parametrize("channels", [3, 5])
def test_the_lines_that_load_it(channels):
    path, model = Path("it's.safetensors"), {"name": "resnet34", "num_classes": 7}
    tensors = {"conv1.weight": np.ones((64, channels, 7, 7))}
    assert _how_to_load(path, model, tensors).startswith("torchvision has no module for it")
    conv1 = ["  net.conv1 = torch.nn.Conv2d(5, 64, 7, 2, 3, bias=False)"]
    assert _how_to_load(path, model, tensors | {"bn1.weight": np.ones(64)}).splitlines() == [
        "torchvision loads it so:",
        "  net = torchvision.models.resnet34(num_classes=7)",
        *(conv1 if channels == 5 else []),
        """  net.load_state_dict(safetensors.torch.load_file("it's.safetensors"))""",
    ]


@pytest.mark.parametrize("channels", [3, 5])
def test_torchvision_loads_it_unchanged_and_answers_alike(tmp_path, caplog, channels):
    """Runs the lines of the log, where torch and torchvision are installed."""
    try:
        torchvision = import_torchvision()
    except ImportError as error:
        pytest.skip(f"needs torch and torchvision: pip install -e '.[bench]' ({error})")
    import safetensors.torch
    import torch

    workdir, model, variables = write_run(tmp_path, width=64, channels=channels)
    with caplog.at_level(logging.INFO, logger="jaxcells"):
        export_weights(workdir)
    lines = [line.strip() for line in caplog.messages[-1].splitlines()[1:]]
    names = {"torch": torch, "torchvision": torchvision, "safetensors": safetensors}
    exec("\n".join(lines), names)  # strict: a name too many or too few is an error
    net = names["net"].eval()
    images = np.random.default_rng(0).normal(size=(2, 65, 48, channels)).astype(np.float32)
    with torch.inference_mode():
        expected = net(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    logits = jax.jit(partial(model.apply, train=False))(variables, images)
    assert expected.std() > 0.01
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_crops_become_a_data_set_that_the_line_of_the_log_reads(tmp_path, caplog):
    for label, value in (("a", 10), ("b", 20)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            write_crop(tmp_path / "images" / label / str(i), np.full((6, 6, 1), value + i, "u1"))
    workdir = Workdir(tmp_path)
    settings = CropSettings(seed=0, crop_size=6, crops_per_class=3, split=(1, 1, 1))
    prepare_crop_set(workdir.crops, tmp_path / "images", settings)
    with caplog.at_level(logging.INFO, logger="jaxcells"):
        path = export_tfds(workdir)
    assert path == tmp_path / "tensorflow_datasets" / "jaxcells_crops" / "1.0.0"
    said, line = caplog.messages[-1].splitlines()
    assert said.startswith(f"6 crops are in {path}")
    values = sorted(
        (read["label"], read["image"].max() // 10) for read in eval(line, {"tfds": tfds})
    )
    assert values == [(0, 1), (1, 2)]
    assert export_tfds(workdir, tmp_path / "sets") == tmp_path / "sets" / "jaxcells_crops" / "1.0.0"
