import csv
import itertools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from configs import gradients as shipped
from jaxcells.data.loader import train_batches
from jaxcells.files import Error, Workdir
from jaxcells.models.preact import PreActBasic
from jaxcells.models.resnet import BasicBlock, ResNet
from jaxcells.workflows import gradients
from jaxcells.workflows.gradients import compare_gradients, measure_gradients
from tests.data.folders import write_folder


def small_config(**changes):
    config = shipped.get_config()
    small = {"data.crop_size": 32, "data.crops_per_class": 16, "data.split": (12, 2, 2)}
    small |= {"model.name": "preact18", "model.width": 4, "train.batch_size": 8}
    config.update_from_flattened_dict(small | changes)
    return config


def two_blocks(name, *, num_classes, width, norms, scan, **_):
    """One block in each of two stages: all that the real networks have but the depth."""
    block = PreActBasic if name.startswith("preact") else BasicBlock
    options = {"shortcut": not name.startswith("plain"), "norms": norms, "scan": scan}
    return ResNet((1, 1), block, num_classes, width, **options)


class TwoLayers(nn.Module):
    num_classes: int

    def layout(self):
        return []

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Dense(5, name="conv1")(x.reshape(len(x), -1)))
        return nn.Dense(self.num_classes, name="fc")(x)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_layer_of_every_network_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gradients, "create_model", two_blocks)
    config = small_config(**{"data.root": str(write_folder(tmp_path / "in", {"A": 8, "B": 8}))})
    compare_gradients(config, Workdir(tmp_path / "run"))

    names = ("plain18", "resnet18", "preact18")
    networks = [(name, norms) for norms in ("True", "False") for name in names]
    rows = read_csv(tmp_path / "run/gradients/gradients.csv")
    layers = ["conv1", *(f"layer{stage}_0/conv{n}" for stage in (1, 2) for n in (1, 2)), "fc"]
    # 24 crops in batches of 8 are 3 steps an epoch; two epochs. Projections are left out.
    assert [(r["network"], r["norms"], r["step"], r["depth"], r["layer"]) for r in rows] == [
        (*network, step, str(depth), layer)
        for network in networks
        for step in ("0", "6")
        for depth, layer in enumerate(layers, start=1)
    ]
    assert all(float(row["gradient_norm"]) > 0 for row in rows)
    losses = read_csv(tmp_path / "run/gradients/losses.csv")
    assert [(r["network"], r["norms"], r["step"]) for r in losses] == [
        (*network, str(step)) for network in networks for step in range(6)
    ]
    assert losses[0]["loss"] == rows[0]["loss"]

    assert (tmp_path / "run/gradients/gradients.png").stat().st_size > 0
    caption = (tmp_path / "run/gradients/gradients.md").read_text()
    assert "first stage of 4 channels, 32x32 crops, batches of 8, SGD with learning" in caption
    assert "learning rate 0.01 (constant), momentum 0.9 and weight decay 0, seed 0" in caption
    assert caption == capsys.readouterr().out


def measure_two_layers(monkeypatch, **changes):
    """Measures a small network on random images; returns them and their labels too."""
    monkeypatch.setattr(gradients, "create_model", lambda num_classes, **_: TwoLayers(num_classes))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (24, 4, 4, 3), np.uint8)
    labels = rng.integers(0, 3, 24).astype(np.int32)
    data = types.SimpleNamespace(
        arrays={"train": types.SimpleNamespace(images=images, labels=labels)},
        crop_set=types.SimpleNamespace(class_names=["A", "B", "C"]),
    )
    config = small_config(**{"train.num_epochs": 1, **changes})
    return *measure_gradients(config, data, "plain18", norms=True), images, labels


def test_both_measurements_are_of_the_first_batch(monkeypatch):
    settings = {"optim.learning_rate": 0.02, "optim.momentum": 0.5, "optim.weight_decay": 0.1}
    settings["optim.schedule"] = "cosine"
    start, end, images, labels = measure_two_layers(monkeypatch, **settings)

    normalization = gradients.fit_normalization(images, small_config().data.normalize)
    init_key, _ = jax.random.split(jax.random.key(0))
    params = TwoLayers(3).init(init_key, np.zeros((1, 4, 4, 3)), train=False)["params"]

    def loss_of(params, batch):
        logits = TwoLayers(3).apply({"params": params}, normalization(batch["image"]), train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    batches = [*itertools.islice(train_batches(images, labels, 8, seed=0), 3)]
    losses, norms, velocity = [], [], jax.tree.map(np.zeros_like, params)
    for step, batch in enumerate([*batches, batches[0]]):
        loss, slopes = jax.value_and_grad(loss_of)(params, batch)
        losses.append(float(loss))
        norms.append([np.linalg.norm(slopes[layer]["kernel"]) for layer in ("conv1", "fc")])
        for layer, slope in slopes.items():  # the decay is no part of the gradient
            slope["kernel"] += 0.1 * params[layer]["kernel"]
        velocity = jax.tree.map(lambda v, slope: 0.5 * v + slope, velocity, slopes)
        rate = 0.01 * (1 + np.cos(np.pi * step / 3))
        params = jax.tree.map(lambda p, v, rate=rate: p - rate * v, params, velocity)

    assert (start.network, start.norms, start.layers) == ("plain18", True, ["conv1", "fc"])
    assert (start.step, end.step) == (0, 3)
    assert start.losses == pytest.approx(losses[:1], rel=1e-4)
    assert end.losses == pytest.approx(losses, rel=1e-4)
    assert start.gradient_norms == pytest.approx(norms[0], rel=1e-4)
    assert end.gradient_norms == pytest.approx(norms[3], rel=1e-3)


def test_a_network_that_diverges_is_measured_all_the_same(monkeypatch):
    start, end, *_ = measure_two_layers(monkeypatch, **{"optim.learning_rate": 1e38})
    assert start.diverged is None
    assert end.step == 3
    assert not np.isfinite(end.gradient_norms).all()
    assert end.diverged in (1, 2)


def test_kernels_of_one_name_begin_equal():
    params = []
    for name in ("plain18", "resnet18", "preact18"):
        model = two_blocks(name, num_classes=2, width=2, norms=False, scan=False)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
        params.append(flatten_dict(variables["params"], sep="/"))
    plain, *others = params
    assert len(plain) == 1 + 2 * 2 + 2  # with the kernel and the bias of the head
    for other in others:
        assert set(other) - set(plain) == {"layer2_0/downsample_conv/kernel"}
        assert all((other[name] == value).all() for name, value in plain.items())


def test_a_depth_that_one_kind_lacks_is_refused_before_any_crop_is_drawn(tmp_path):
    with pytest.raises(Error) as error:
        compare_gradients(small_config(**{"model.name": "preact164"}), Workdir(tmp_path / "run"))
    assert str(error.value) == (
        "model.name='preact164': there is no plain164 and no resnet164 to compare it with; choose "
        "a depth that plain has too, such as model.name=resnet18"
    )
    assert not (tmp_path / "run").exists()
