import csv

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from configs import gradients as shipped
from jaxcells import Error, gradients
from jaxcells.models.preact import BasicUnit, PreActResNet
from jaxcells.models.resnet import BasicBlock, ResNet
from jaxcells.training.state import create_train_state
from jaxcells.workflows.gradients import compare_gradients
from tests.data.folders import write_folder


class TwoStages(nn.Module):
    """Layers named like those of a real network; a norm before the head, or none."""

    norms: bool
    num_classes: int

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(4, name="conv1")(x.mean((1, 2)))
        x = nn.relu(nn.Dense(4, name="layer1_0")(x))
        x = nn.relu(nn.Dense(4, name="layer2_0")(x))
        if self.norms:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x)
        return nn.Dense(self.num_classes, name="fc")(x)


@pytest.fixture
def made(monkeypatch):
    """Puts small networks in place of the real ones; gathers what they were made with."""
    calls = []

    def create_model(name, *, norms, num_classes, **rest):
        calls.append((name, norms, num_classes, rest))
        return TwoStages(norms, num_classes)

    monkeypatch.setattr(gradients, "create_model", create_model)
    monkeypatch.setattr(gradients, "MODEL_NAMES", ("resnet18", "plain18", "preact18", "preact164"))
    return calls


def small_config(root, **changes):
    config = shipped.get_config()
    config.update_from_flattened_dict(
        {
            "model.name": "preact18",
            "data.root": str(root),
            "data.crop_size": 32,
            "data.crops_per_class": 16,
            "data.split": (12, 2, 2),
            "train.batch_size": 8,
            **changes,
        }
    )
    return config


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_layer_of_every_network_is_written(made, tmp_path, capsys):
    root = tmp_path / "images"
    write_folder(root, {"A": 8, "B": 8})
    compare_gradients(small_config(root), tmp_path / "run")

    networks = [(n, norms) for norms in (True, False) for n in ("plain18", "resnet18", "preact18")]
    arguments = {"width": 16, "dtype": "float32", "zero_init_residual": False}
    unrolled = {"preact18": {"scan": False}}
    assert made == [
        (name, norms, 2, arguments | unrolled.get(name, {})) for name, norms in networks
    ]

    rows = read_csv(tmp_path / "run/gradients/gradients.csv")
    assert list(rows[0]) == [
        *("network", "norms", "step", "loss", "depth", "layer"),
        *("gradient_norm", "weight_norm", "ratio"),
    ]
    # 24 crops in batches of 8 are 3 steps an epoch; two epochs.
    layers = [("1", "conv1"), ("2", "layer1_0"), ("3", "layer2_0"), ("4", "fc")]
    assert [(r["network"], r["norms"], r["step"], r["depth"], r["layer"]) for r in rows] == [
        (name, str(norms), step, *layer)
        for name, norms in networks
        for step in ("0", "6")
        for layer in layers
    ]
    for row in rows:
        gradient_norm, weight_norm = float(row["gradient_norm"]), float(row["weight_norm"])
        assert float(row["ratio"]) == pytest.approx(gradient_norm / weight_norm, rel=1e-4)
        assert gradient_norm > 0

    losses = read_csv(tmp_path / "run/gradients/losses.csv")
    assert [(r["network"], r["norms"], r["step"]) for r in losses] == [
        (name, str(norms), str(step)) for name, norms in networks for step in range(6)
    ]
    assert losses[0]["loss"] == rows[0]["loss"]

    # The three are one network here: with one seed and one order of batches they stay the same.
    for table in (rows, losses):
        for row in table:
            twin = {**row, "network": "plain18"}
            assert twin in table

    assert (tmp_path / "run/gradients/gradients.png").stat().st_size > 0
    caption = (tmp_path / "run/gradients/gradients.md").read_text()
    assert "32x32 crops, batches of 8, SGD with learning rate 0.01 (constant)" in caption
    assert caption == capsys.readouterr().out


def test_kernels_of_one_name_begin_equal():
    def init(model):
        state = create_train_state(
            model, optax.identity(), sample_shape=(1, 32, 32, 3), key=jax.random.key(0)
        )
        return flatten_dict(state.params, sep="/")

    sizes = {"num_classes": 2, "width": 2, "norms": False}
    plain = init(ResNet((1, 2), BasicBlock, shortcut=False, **sizes))
    others = [
        init(ResNet((1, 2), BasicBlock, **sizes)),
        init(PreActResNet((1, 2), BasicUnit, scan=False, **sizes)),
    ]
    assert len(plain) == 1 + 3 * 2 + 2  # with the kernel and the bias of the head
    for other in others:
        assert set(other) - set(plain) == {"layer2_0/downsample_conv/kernel"}
        for name, value in plain.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_the_optimizer_is_that_of_the_config(made, tmp_path, monkeypatch):
    calls = []

    def spy(function):
        return lambda *args, **kwargs: calls.append((args, kwargs)) or function(*args, **kwargs)

    for name in ("make_schedule", "make_optimizer"):
        monkeypatch.setattr(gradients.optim, name, spy(getattr(gradients.optim, name)))
    monkeypatch.setattr(gradients, "_KINDS", ("plain",))
    root = tmp_path / "images"
    write_folder(root, {"A": 8, "B": 8})
    optimizer = {"learning_rate": 0.02, "schedule": "cosine", "momentum": 0.5, "weight_decay": 1e-3}
    config = small_config(root, **{f"optim.{key}": value for key, value in optimizer.items()})
    compare_gradients(config, tmp_path / "run")
    (name, schedule), (_, options) = calls[:2]
    assert name == ("cosine",)
    assert schedule == {"learning_rate": 0.02, "num_steps": 6}
    assert options == {"momentum": 0.5, "weight_decay": 1e-3}
    caption = (tmp_path / "run/gradients/gradients.md").read_text()
    assert "learning rate 0.02 (cosine), momentum 0.5 and weight decay 0.001, seed 0" in caption


def test_a_network_that_diverges_is_recorded(made, tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "_KINDS", ("plain",))
    root = tmp_path / "images"
    write_folder(root, {"A": 8, "B": 8})
    config = small_config(root, **{"optim.learning_rate": 1e12})
    compare_gradients(config, tmp_path / "run")
    rows = read_csv(tmp_path / "run/gradients/gradients.csv")
    after = [float(r["gradient_norm"]) for r in rows if (r["norms"], r["step"]) == ("False", "6")]
    assert len(after) == 4
    assert not np.isfinite(after).all()
    assert "plain18 diverged at step" in (tmp_path / "run/gradients/gradients.md").read_text()


def test_a_depth_that_one_kind_lacks_is_refused_before_any_crop_is_drawn(made, tmp_path):
    config = small_config(tmp_path, **{"model.name": "preact164"})
    with pytest.raises(Error) as error:
        compare_gradients(config, tmp_path / "run")
    assert str(error.value) == (
        "model.name='preact164': there is no plain164 and no resnet164 to compare it with; set "
        "--config.model.name to one of resnet18"
    )
    assert not (tmp_path / "run").exists()
