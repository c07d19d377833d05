import json
import logging
from functools import partial

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
from jaxcells.models.weights import load_metadata, load_pretrained, load_safetensors, to_torch
from jaxcells.training import checkpoints
from jaxcells.training.progress import Progress
from jaxcells.training.state import inference_state
from jaxcells.workflows.export import export_tfds, export_weights
from tests.models.networks import assert_close, random_variables
from tools.torchvision_import import import_torchvision

CLASSES = ("HeLa", "Jürkat", "a b")
NORMALIZATION = Normalization("imagenet", (0.0,), (255.0,), mean=(0.5, 0.4, 0.3), std=(0.2,) * 3)


def make_variables(model, *, seed=0, channels=3):
    return random_variables(model, np.zeros((1, 32, 32, channels), np.float32), seed)


def write_run(path, *, name="resnet18", width=2, channels=3):
    """A run whose best checkpoint is of step 4, and whose newest of step 5."""
    arguments = {"name": name, "width": width, "num_classes": len(CLASSES)}
    model, workdir = create_model(**arguments), Workdir(path)
    init, images = {"kind": "imagenet", "source": "a file"}, {"train": ("0123abcd",), "val": ()}
    scores = {"balanced_accuracy": 0.9, "loss": 0.3}
    for step, seed, metrics in ((4, 0, scores), (5, 1, None)):
        variables = make_variables(model, seed=seed, channels=channels)
        what = (step, 6, Progress(), NORMALIZATION, 0, 8, CLASSES, "4567cdef")
        meta = checkpoints.CheckpointMeta(*what, arguments, init, images_by_split=images)
        state = inference_state(model, variables).replace(step=jnp.int32(step))
        checkpoints.save(workdir.checkpoints, state, meta=meta, metrics=metrics)
    return workdir, model, make_variables(model, channels=channels)


def assert_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("name", ["resnet18", "plain18"])
def test_the_best_checkpoint_comes_back_bit_for_bit(tmp_path, name, caplog):
    workdir, model, variables = write_run(tmp_path, name=name)
    with caplog.at_level(logging.INFO, "jaxcells"):
        path = export_weights(workdir)
    assert path == tmp_path / "weights.safetensors"
    loaded, report = load_pretrained(load_safetensors(path), make_variables(model, seed=2))
    assert len(report.loaded) == len(load_file(path))
    assert_equal(loaded, variables)
    said = f"{name} of step 4 ({path.stat().st_size / 1e6:.1f} MB) is in {path}; init={path} "
    assert caplog.messages[-1] == f"{said}starts a run from it"


def test_a_scanned_network_is_written_unit_by_unit(tmp_path):
    workdir, _, variables = write_run(tmp_path, name="preact34")
    path = export_weights(workdir)
    tensors = load_file(path)
    np.testing.assert_array_equal(
        tensors["layer3.4.conv2.weight"].transpose(2, 3, 1, 0),
        variables["params"]["layer3_rest"]["conv2"]["kernel"][3],
    )
    # As the network without a scan has them, from which the same answer follows.
    single = create_model("preact34", num_classes=len(CLASSES), width=2, scan=False)
    loaded, _ = load_pretrained(load_safetensors(path), make_variables(single, seed=2))
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
    newest = make_variables(model, seed=1)
    for which, variables in ((4, best), (5, newest), ("latest", newest)):
        output = tmp_path / f"{which}.safetensors"
        assert export_weights(workdir, output, which) == output
        assert_equal(load_pretrained(load_safetensors(output), newest)[0], variables)
    assert not (workdir.path / "weights.safetensors").exists()
    with pytest.raises(Error, match=r"no checkpoint of step 7 in .*choose a step of 4, 5"):
        export_weights(workdir, tmp_path / "7.safetensors", 7)


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
        patch.setattr("os.fsync", lambda file: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_weights(workdir, which="latest")
    assert path.read_bytes() == first
    assert export_weights(workdir, which="latest").read_bytes() != first


@pytest.mark.parametrize("channels", [3, 5])
def test_torchvision_loads_it_unchanged_and_answers_alike(tmp_path, channels):
    """Runs where torch and torchvision are installed."""
    try:
        torchvision = import_torchvision()
    except ImportError as error:
        pytest.skip(f"needs torch and torchvision: pip install -e '.[bench]' ({error})")
    import safetensors.torch
    import torch

    workdir, model, variables = write_run(tmp_path, width=64, channels=channels)
    net = torchvision.models.resnet18(num_classes=len(CLASSES)).eval()
    net.conv1 = torch.nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    # Strict: a name too many or too few is an error.
    net.load_state_dict(safetensors.torch.load_file(export_weights(workdir)))
    images = np.random.default_rng(0).normal(size=(2, 65, 48, channels)).astype(np.float32)
    with torch.inference_mode():
        expected = net(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    logits = jax.jit(partial(model.apply, train=False))(variables, images)
    assert_close(logits, expected)


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
    examples = eval(caplog.messages[-1].partition(" by ")[2], {"tfds": tfds})
    assert {(e["label"], e["image"].max() // 10) for e in examples} == {(0, 1), (1, 2)}
    assert export_tfds(workdir, tmp_path / "sets") == tmp_path / "sets" / "jaxcells_crops" / "1.0.0"
