import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcells.models import MODEL_NAMES, create_model
from jaxcells.models.preact import PreActBasic, PreActBottleneck
from jaxcells.models.resnet import unstack
from tests.models.networks import (
    assert_close,
    convolve,
    images,
    outputs,
    params,
    random_variables,
    shapes,
    small,
)

CIFAR = ["preact164", "preact1001"]


# Units


def _unit(variables, x, strides, *, activated):
    """Figure 4e in NumPy: norm, ReLU and convolution for each of `strides`, and nothing after."""
    params, stats = variables["params"], variables["batch_stats"]
    y = shortcut = x.astype(np.float64)
    for number, stride in enumerate(strides, start=1):
        if number > 1 or not activated:
            norm, own = params[f"bn{number}"], stats[f"bn{number}"]
            y = (y - own["mean"]) / np.sqrt(own["var"] + 1e-5) * norm["scale"] + norm["bias"]
            y = np.maximum(y, 0)
        if number == 1 and "downsample_conv" in params:
            shortcut = convolve(y, params["downsample_conv"]["kernel"], max(strides))
        y = convolve(y, params[f"conv{number}"]["kernel"], stride)
    return shortcut + y


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize(
    ("unit", "channels", "strides"),
    [
        (PreActBasic, 4, (1, 1)),
        (PreActBasic, 3, (1, 1)),
        (PreActBasic, 4, (2, 1)),
        (PreActBottleneck, 16, (1, 1, 1)),
        (PreActBottleneck, 3, (1, 1, 1)),
        (PreActBottleneck, 16, (1, 2, 1)),
    ],
)
def test_unit_is_that_of_the_paper(unit, channels, strides, activated):
    module = unit(4, stride=max(strides), activated=activated)
    x = images(2, 5, 6, channels)
    variables = random_variables(module, x)
    expected = _unit(variables, x, strides, activated=activated)
    for run in (module, module.clone(in_scan=True)):
        y = run.apply(variables, x, train=False)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    changes = max(strides) > 1 or channels != 4 * unit.expansion
    projection = {"downsample_conv"} if changes else set()
    assert {name for name in variables["params"] if "downsample" in name} == projection


# Identity mappings


@pytest.mark.parametrize(
    ("name", "scan", "train"), [("preact18", False, True), ("preact164", True, False)]
)
def test_signal_is_an_earlier_one_plus_the_residuals_between(name, scan, train):
    """Equation 4."""
    model = small(name, sizes=(4,), scan=scan)
    x = images(2, 9, 8, 3)
    found = outputs(model, random_variables(model, x), x, train=train)
    last = "conv2" if name == "preact18" else "conv3"
    if scan:
        signals, residuals = found["layer1_rest"], found[f"layer1_rest/{last}"]
    else:
        names = [f"layer1_{index}" for index in (1, 2, 3)]
        signals = [found[unit] for unit in names]
        residuals = [found[f"{unit}/{last}"] for unit in names]
    assert len(residuals) == 3
    total = found["layer1_0"]
    for signal, residual in zip(signals, residuals, strict=True):
        assert np.abs(residual).max() > 0.1
        total = total + residual
        np.testing.assert_allclose(signal, total, rtol=1e-5, atol=1e-5)


def test_gradient_is_the_later_one_plus_that_of_the_residuals():
    """Equation 5: dE/dx_l = dE/dx_L (1 + d/dx_l of the sum of all F)."""
    model = small("preact164", sizes=(3,))
    single = model.clone(scan=False)
    variables = random_variables(model, images(1, 9, 8, 3))
    x = images(2, 5, 6, 4 * model.block.expansion)
    place = model.segments.index(("layer1_rest",))

    def stage(x):
        return model.apply(variables, x, first=place, last=place + 1, train=False)

    def sum_of_residuals(x):
        found = outputs(single, unstack(variables), x, first=place, last=place + 2)
        return sum(found[f"layer1_{index}/conv3"] for index in (1, 2))

    later = images(*x.shape, seed=1)
    (earlier,) = jax.jit(lambda x: jax.vjp(stage, x)[1](later))(x)
    (of_residuals,) = jax.jit(lambda x: jax.vjp(sum_of_residuals, x)[1](later))(x)
    assert np.abs(of_residuals).max() > 0.1
    assert_close(earlier, later + of_residuals, tolerance=1e-5)


def test_without_residuals_signal_and_gradient_pass_110_units_unchanged():
    model = create_model("preact1001", num_classes=3)
    place = model.segments.index(("layer3_rest",))
    x, later = images(1, 3, 2, 256), images(1, 3, 2, 256, seed=1)

    @jax.jit
    def run(x, later):
        rest = model.init(jax.random.key(0), x, train=False, first=place, last=place + 1)
        kernel = rest["params"]["layer3_rest"]["conv3"]["kernel"]
        assert kernel.shape == (110, 1, 1, 64, 256)
        rest["params"]["layer3_rest"]["conv3"]["kernel"] = jnp.zeros_like(kernel)
        part = {"first": place, "last": place + 1, "train": False}
        y, pull_back = jax.vjp(lambda x: model.apply(rest, x, **part), x)
        return y, pull_back(later)[0]

    y, gradient = run(x, later)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(gradient, later)


# Scanned and unrolled


@functools.cache
def _train_once(scan):
    """A compiled gradient of a small network, and what it gives under the unrolled names."""
    model = small("preact164", sizes=(3,))
    x = images(4, 9, 12, 3)
    variables = random_variables(model, x)
    if not scan:
        model, variables = model.clone(scan=False), unstack(variables)

    @jax.jit
    def train(variables):
        def loss(params):
            logits, moved = model.apply(
                variables | {"params": params}, x, train=True, mutable=["batch_stats"]
            )
            return -jax.nn.log_softmax(logits)[:, 0].sum(), (logits, moved["batch_stats"])

        return jax.grad(loss, has_aux=True)(variables["params"])

    compiled = train.lower(variables).compile()
    gradients, (logits, batch_stats) = compiled(variables)
    return compiled, unstack({"stats": batch_stats, "gradients": gradients, "logits": logits})


def test_scanned_and_unrolled_network_are_one():
    """Equal to 1e-4 of the largest number in each array, for logits, statistics and gradients."""
    (_, state), (_, expected) = _train_once(True), _train_once(False)
    assert {"layer1_0", "layer1_1", "layer1_2"} < set(state["gradients"])
    assert_close(state, expected)


def test_scan_holds_only_convolutions_that_are_fast_in_a_loop():
    compiled, _ = _train_once(True)
    text = compiled.as_text()
    assert " while(" in text
    # Outside loops XLA brings all of them into this order.
    assert set(re.findall(r"dim_labels=(\S+?)[,\s]", text)) == {"b01f_01io->b01f"}


@pytest.mark.parametrize("name", ["preact18", "preact164"])
def test_unrolled_names_are_those_of_the_unstacked_tree(name):
    model = small(name, sizes=(11, 1, 2))
    x = jnp.zeros((1, 32, 32, 3))
    stacked, single = shapes(model, x), shapes(model.clone(scan=False), x)
    assert "layer1_10" in single["params"]
    assert "layer2_rest" not in stacked["params"]
    unstacked = jax.eval_shape(unstack, stacked)
    assert flatten_dict(unstacked) == flatten_dict(single)


def test_units_of_a_scan_begin_with_different_kernels_of_he_s_variance():
    model = small("preact50", sizes=(3,), width=32)
    place = model.segments.index(("layer1_rest",))
    x = jnp.zeros((1, 2, 2, 128))
    variables = jax.jit(
        lambda: model.init(jax.random.key(0), x, train=False, first=place, last=place + 1)
    )()
    for layer, fan_out in {"conv1": 32, "conv2": 9 * 32, "conv3": 128}.items():
        kernel = variables["params"]["layer1_rest"][layer]["kernel"]
        np.testing.assert_allclose(kernel.std(axis=(1, 2, 3, 4)), np.sqrt(2 / fan_out), rtol=0.05)
        assert np.abs(kernel[0] - kernel[1]).max() > 0.1


def test_a_norm_told_to_use_its_running_statistics_keeps_them_in_a_scan():
    model = small("preact164", sizes=(3,))
    x = images(2, 8, 8, 3)
    variables = random_variables(model, x)

    def intercept(call, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.module.path[-1] == "bn2":
            kwargs |= {"use_running_average": True}
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        _, moved = model.apply(variables, x, train=True, mutable=["batch_stats"])
    before, after = (flatten_dict(tree["batch_stats"]) for tree in (variables, moved))
    assert {path[0] for path in before} >= {"layer1_0", "layer1_rest"}
    for path, statistic in before.items():
        assert np.array_equal(after[path], statistic) == (path[-2] == "bn2"), path


# Networks


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("preact18", 11_687_720),
        ("preact34", 21_795_880),
        ("preact50", 25_549_352),
        ("preact101", 44_541_480),
        ("preact152", 60_185_128),
        ("preact200", 64_666_152),
        ("preact164", 1_957_688),
        ("preact1001", 10_582_136),
    ],
)
def test_number_of_parameters_at_1000_classes(name, count):
    assert sum(leaf.size for leaf in params(name).values()) == count


@pytest.mark.parametrize("name", [name for name in MODEL_NAMES if "preact" in name])
def test_first_norm_stands_before_the_fork(name):
    leaves = params(name)
    own = {path.split("/")[0] for path in leaves if path.split("/")[1] == "bn1"}
    assert ("bn1/scale" in leaves) == (name not in CIFAR)
    assert ("layer1_0" in own) == (name in CIFAR)
    assert {"layer2_0", "layer3_0", "layer1_rest", "layer2_rest", "layer3_rest"} <= own
    assert "final_bn/scale" in leaves


def test_logits_are_taken_from_the_normed_and_rectified_sum():
    model = small("preact18", sizes=(2,))
    x = images(2, 20, 24, 3)
    variables = random_variables(model, x)
    found = outputs(model, variables, x)
    norm, stats = variables["params"]["final_bn"], variables["batch_stats"]["final_bn"]
    y = (found["layer1_rest"][-1] - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    y = np.maximum(y * norm["scale"] + norm["bias"], 0).mean((1, 2))
    fc = variables["params"]["fc"]
    np.testing.assert_allclose(found["fc"], y @ fc["kernel"] + fc["bias"], rtol=1e-4, atol=1e-5)


def test_norms_in_a_scan_see_the_batch_of_all_devices():
    assert jax.device_count() == 2
    model = small("preact164")
    x = images(8, 9, 8, 3)
    x[:4] /= 8  # halves that differ, and so do their statistics
    variables = random_variables(model, x)
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    replicated = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    assert_close(apply(replicated, sharded), apply(variables, x))
