import dataclasses

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from jaxcells import Error
from jaxcells.data.crop_writer import prepare_crop_set
from jaxcells.models import create_model
from jaxcells.models.fetch import WeightsUnavailableError
from jaxcells.models.torch_format import to_torch
from jaxcells.training import initialization
from jaxcells.training.initialization import (
    Initialization,
    check_no_leak,
    find_initialization,
    initialize,
)
from jaxcells.training.state import create_train_state
from tests.data.folders import write_folder


def fresh_state(num_classes: int, seed: int = 0):
    model: nn.Module = create_model("resnet18", num_classes=num_classes, width=2)
    return create_train_state(
        model, optax.sgd(0.1), sample_shape=(1, 32, 32, 3), key=jax.random.key(seed)
    )


@pytest.fixture
def offline(monkeypatch):
    def fetch(name):
        raise WeightsUnavailableError(f"cannot download {name}")

    monkeypatch.setattr(initialization, "fetch_imagenet", fetch)


def test_the_sample_goes_on_without_weights_loudly(offline, caplog):
    found = find_initialization("imagenet", "resnet34", random_if_missing=True)
    assert found.kind == "random"
    assert "RANDOM parameters instead of ImageNet's: cannot download resnet34" in found.warning
    state = fresh_state(3)
    started, record = initialize(state, found)
    assert started is state
    assert record["kind"] == "random"
    assert record["warning"] == found.warning


def test_anyones_own_images_do_not(offline):
    with pytest.raises(WeightsUnavailableError):
        find_initialization("imagenet", "resnet34", random_if_missing=False)


def test_a_file_gives_all_but_the_head(tmp_path):
    source = fresh_state(10, seed=1)
    save_file(to_torch(source.variables), tmp_path / "weights.safetensors")
    found = find_initialization(
        str(tmp_path / "weights.safetensors"), "resnet18", random_if_missing=False
    )
    assert found.kind == "file"
    state = fresh_state(3)
    started, record = initialize(state, found)
    np.testing.assert_array_equal(
        started.params["conv1"]["kernel"], source.params["conv1"]["kernel"]
    )
    np.testing.assert_array_equal(started.params["fc"]["kernel"], state.params["fc"]["kernel"])
    assert len(record["sha256"]) == 64
    assert record["source"].endswith("weights.safetensors")
    assert int(started.step) == 0


def test_a_wrong_file_is_noticed_before_anything_else(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(Error, match="pickled weights are not read"):
        find_initialization(str(path), "resnet18", random_if_missing=False)
    with pytest.raises(Error, match="no validated checkpoint to start from"):
        find_initialization(str(tmp_path), "resnet18", random_if_missing=False)


def test_a_run_that_saw_what_is_held_out_is_refused(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 9, "B": 9})
    settings = {
        "crop_size": 32,
        "crops_per_class": 9,
        "split": (5, 2, 2),
        "split_by": "field",
    }
    prepare_crop_set(tmp_path / "run" / "crops", root, seed=0, **settings)
    same = prepare_crop_set(tmp_path / "same", root, seed=0, **settings)
    other = prepare_crop_set(tmp_path / "other", root, seed=1, **settings)
    init = Initialization("run", tmp_path / "run")
    check_no_leak(init, same)
    with pytest.raises(Error, match=r"images that are held out here, such as [AB]/field"):
        check_no_leak(init, other)
    check_no_leak(dataclasses.replace(init, kind="random", path=None), other)
