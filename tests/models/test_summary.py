import csv
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxcells.models import create_model
from jaxcells.models.summary import Layer, layer_table, summarize, totals, write_layers_csv


@functools.cache
def _summary(name):
    return summarize(create_model(name, num_classes=1000), (224, 224, 3))


def _rows(layers):
    return {layer.name: layer for layer in layers}


# The multiply-adds are the column "GFLOPS" of torchvision's table of weights.
@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("resnet18", 11_689_512, 1.81),
        ("resnet34", 21_797_672, 3.66),
        ("resnet50", 25_557_032, 4.09),
        ("resnet152", 60_192_808, 11.51),
    ],
)
def test_totals_are_those_of_torchvision(name, parameters, multiply_adds):
    found = totals(_summary(name))
    assert found[0] == parameters
    assert round(found[1] / 1e9, 2) == multiply_adds


@pytest.mark.parametrize("name", ["plain34", "resnet50", "preact18"])
def test_parameters_are_those_of_the_initialised_network(name):
    model = create_model(name, num_classes=7, width=8)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 40, 40, 3)), train=False)
    )
    layers = summarize(model, (40, 40, 3))
    leaves = flatten_dict(variables["params"])
    names = {"/".join(module) for *module, _ in leaves}
    assert {layer.name for layer in layers if layer.parameters} == names
    assert totals(layers)[0] == sum(leaf.size for leaf in leaves.values())


def test_rows_of_a_residual_network_in_order():
    layers = summarize(create_model("resnet18", num_classes=3), (200, 120, 1))
    assert layers[:5] == (
        Layer("conv1", "conv", 7, 2, (100, 60, 64), 3136, 18_816_000, 7),
        Layer("bn1", "norm", 1, 1, (100, 60, 64), 128, 0, 7),
        Layer("maxpool", "max pool", 3, 2, (50, 30, 64), 0, 0, 11),
        Layer("layer1_0/conv1", "conv", 3, 1, (50, 30, 64), 36_864, 55_296_000, 19),
        Layer("layer1_0/bn1", "norm", 1, 1, (50, 30, 64), 128, 0, 19),
    )
    assert layers[-2:] == (
        Layer("avgpool", "mean", 1, 1, (512,), 0, 0, None),
        Layer("fc", "dense", 1, 1, (3,), 512 * 3 + 3, 512 * 3, None),
    )
    rows = _rows(layers)
    # 13 x 8 positions: two halvings of 50 x 30, each rounded up.
    projection = Layer(
        "layer3_0/downsample_conv", "conv", 1, 2, (13, 8, 256), 32_768, 13 * 8 * 32_768, 99
    )
    assert rows["layer3_0/downsample_conv"] == projection
    assert rows["layer3_0/downsample_bn"].receptive_field == 99
    assert len(layers) == 2 * (1 + 16 + 3) + 3


def _probed_side(name, last, size, silent=""):
    """Counts the input pixels that reach one position of what `segments[:last]` give.

    All kernels are positive and the image is constant, so that nothing cancels and no maximum is
    chosen; kernels of layers whose path contains `silent` are zero.
    """
    model = create_model(name, num_classes=2, width=1, norms=False)
    x = jnp.ones((1, size, size, 1))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))

    def kernel(path, leaf):
        zero = silent and silent in jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.full(leaf.shape, 0.0 if zero else 1 / leaf.shape[0])

    variables = jax.tree_util.tree_map_with_path(kernel, shapes)

    def middle(x):
        y = model.apply(variables, x, train=False, last=last)
        return y[0, y.shape[1] // 2, y.shape[2] // 2].sum()

    reached = np.asarray(jax.jit(jax.grad(middle))(x)[0, :, :, 0]) > 0
    rows, columns = reached.any(1).sum(), reached.any(0).sum()
    assert rows == columns
    assert reached.sum() == rows * columns  # a square
    assert rows < size  # all of it
    return rows


@pytest.mark.parametrize(
    ("name", "last", "row", "side"),
    [
        ("plain18", 9, "layer4_1/conv2", 435),
        ("resnet50", 8, "layer2_3/conv3", 91),
        ("preact34", 5, "layer2_rest/conv2", 179),
    ],
)
def test_receptive_field_is_what_gradients_reach(name, last, row, side):
    assert _rows(_summary(name))[row].receptive_field == side
    assert _probed_side(name, last, size=side + 32) == side


def test_receptive_field_of_a_projection_is_what_gradients_reach_through_it():
    row = _rows(_summary("resnet18"))["layer3_0/downsample_conv"]
    assert row.receptive_field == _probed_side("resnet18", 6, 128, silent="layer3_0/conv2") == 99


def test_stacked_units_are_counted_as_often_as_they_run():
    model = create_model("preact164", num_classes=10)
    layers = summarize(model, (32, 32, 3))
    rows = _rows(layers)
    assert [row.repeats for row in layers if row.name.startswith("layer2_rest")] == [17] * 6
    assert {row.repeats for row in layers if "_rest" not in row.name} == {1}
    kernel, positions = 3 * 3 * 16 * 16, 32 * 32
    # The stem sees 3 pixels, each unit of the first stage 2 more; of the last one that is shown.
    assert rows["layer1_rest/conv2"] == Layer(
        *("layer1_rest/conv2", "conv", 3, 1, (32, 32, 16)),
        *(17 * kernel, 17 * kernel * positions, 3 + 18 * 2, 17),
    )
    assert rows["layer1_rest/bn1"].parameters == 17 * 2 * 64
    assert rows["layer1_rest/bn1"].receptive_field == 3 + 17 * 2
    assert rows["layer2_0/conv1"].receptive_field == 3 + 18 * 2

    stacked, unrolled = (
        summarize(model.clone(stage_sizes=(4, 3, 3), scan=scan), (32, 32, 3))
        for scan in (True, False)
    )
    assert totals(stacked) == totals(unrolled)
    assert stacked[-3:] == unrolled[-3:]  # the last norm's receptive field among them
    last = _rows(unrolled)["layer3_2/conv3"].receptive_field
    assert _rows(stacked)["layer3_rest/conv3"].receptive_field == last


def test_1001_layers_take_no_time():
    start = time.process_time()
    layers = summarize(create_model("preact1001", num_classes=10), (32, 32, 3))
    assert time.process_time() - start < 10
    assert sum(layer.repeats for layer in layers if layer.kind == "conv") == 999 + 1 + 3


def test_table_fits_a_terminal_and_ends_with_the_totals():
    layers = _summary("resnet152")
    lines = layer_table(layers).split("\n")
    assert max(map(len, lines)) <= 100
    assert len(lines) == len(layers) + 2
    assert lines[0].split() == [
        *("layer", "kind", "kernel", "output", "parameters", "multiply-adds"),
        *("receptive", "field"),
    ]
    assert lines[1].split() == ["conv1", "conv", "7x7/2", "112x112x64", "9,408", "118,013,952", "7"]
    assert lines[-2].split() == ["fc", "dense", "1000", "2,049,000", "2,048,000", "all"]
    assert lines[-1].split() == ["total", "60,192,808", f"{totals(layers)[1]:,}"]


def test_table_says_how_often_a_layer_is_stacked():
    assert "\nlayer1_rest/bn2 x2 " in layer_table(_summary("preact34"))


def test_csv_holds_every_layer(tmp_path):
    layers = summarize(create_model("preact34", num_classes=3, width=4), (64, 48, 3))
    write_layers_csv(tmp_path / "layers.csv", layers)
    with open(tmp_path / "layers.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [layer.name for layer in layers]
    expected = {"name": "layer1_rest/conv1", "kind": "conv", "kernel": "3", "stride": "1"}
    expected |= {"output": "16x12x4", "parameters": "288", "multiply_adds": str(288 * 16 * 12)}
    expected |= {"receptive_field": "51", "repeats": "2"}
    assert next(row for row in rows if row["name"] == "layer1_rest/conv1") == expected
    assert rows[-1]["receptive_field"] == "all"
    assert [path.name for path in tmp_path.iterdir()] == ["layers.csv"]
