import functools
import os
import pathlib
import re
import shlex
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxcells
from configs import preact1001
from jaxcells.config import validate
from jaxcells.models import MODEL_NAMES, create_model
from jaxcells.models.preact import BasicUnit, BottleneckUnit, unstack
from jaxcells.training import mesh, optim
from jaxcells.training.state import create_train_state
from jaxcells.training.steps import make_train_step

ROOT = pathlib.Path(__file__).parents[2]
NAMES = [name for name in MODEL_NAMES if name.startswith("preact")]
CIFAR = ["preact164", "preact1001"]


def _images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _random_variables(module, x, seed=0):
    """Values under which nothing cancels: no norm's scale is one, no bias or mean is zero."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        if path[-1] == "kernel":
            fan_in = np.prod(shape[-4:-1]) if len(shape) > 2 else shape[0]
            return rng.normal(scale=fan_in**-0.5, size=shape)
        positive = path[-1] in ("scale", "var")
        return rng.uniform(0.5 if positive else -0.5, 1.5 if positive else 0.5, shape)

    shapes = flatten_dict(jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False)))
    return unflatten_dict(
        {path: draw(path, leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    )


@functools.cache
def _params(name, num_classes=2, **attributes):
    """Parameters of a whole network, by path: shapes and dtypes only."""
    model = create_model(name, num_classes=num_classes, **attributes)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    return flatten_dict(variables["params"], sep="/")


def _small(name, *, sizes=(3, 2), width=4, **attributes):
    """A network of the kind of `name`, of few units and channels."""
    return create_model(name, num_classes=3, width=width).clone(stage_sizes=sizes, **attributes)


def _assert_close(actual, expected, tolerance=1e-4):
    """Compares trees of arrays, relative to the largest value in each array."""

    def compare(x, y):
        y = np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())

    jax.tree.map(compare, dict(actual), dict(expected))


# Units


def _convolution(x, kernel, stride):
    """The definition, position by position."""
    size = kernel.shape[0]
    padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    y = [
        [np.tensordot(padded[:, i : i + size, j : j + size], kernel, 3) for j in columns]
        for columns in [range(0, x.shape[2], stride)]
        for i in range(0, x.shape[1], stride)
    ]
    return np.moveaxis(np.array(y), 2, 0)


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
            shortcut = _convolution(y, params["downsample_conv"]["kernel"], max(strides))
        y = _convolution(y, params[f"conv{number}"]["kernel"], stride)
    return shortcut + y


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("in_scan", [False, True])
@pytest.mark.parametrize(
    ("unit", "channels", "strides"),
    [
        (BasicUnit, 4, (1, 1)),
        (BasicUnit, 3, (1, 1)),
        (BasicUnit, 4, (2, 1)),
        (BottleneckUnit, 16, (1, 1, 1)),
        (BottleneckUnit, 3, (1, 1, 1)),
        (BottleneckUnit, 16, (1, 2, 1)),
    ],
)
def test_unit_is_that_of_the_paper(unit, channels, strides, in_scan, activated):
    module = unit(4, stride=max(strides), activated=activated, in_scan=in_scan)
    x = _images(2, 5, 6, channels)
    variables = _random_variables(module, x)
    expected = _unit(variables, x, strides, activated=activated)
    np.testing.assert_allclose(
        module.apply(variables, x, train=False), expected, rtol=1e-4, atol=1e-5
    )
    changes = max(strides) > 1 or channels != 4 * unit.expansion
    projection = {"downsample_conv"} if changes else set()
    assert {name for name in variables["params"] if "downsample" in name} == projection


@pytest.mark.parametrize("unit", [BasicUnit, BottleneckUnit])
def test_bfloat16_unit_is_near_the_float32_one(unit):
    x = _images(4, 8, 8, 3) + 1
    variables = _random_variables(unit(8, stride=2), x)
    (exact, exact_stats), (rounded, rounded_stats) = (
        unit(8, stride=2, dtype=dtype).apply(variables, x, train=True, mutable=["batch_stats"])
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == jnp.bfloat16
    _assert_close({"": rounded.astype(jnp.float32)}, {"": exact}, tolerance=0.02)
    _assert_close(rounded_stats, exact_stats, tolerance=0.02)


# Identity mappings


def _capture(model, variables, x, *, train=False):
    """Outputs of all layers, by path; those of scanned units are stacked."""
    mutable = ["batch_stats", "intermediates"]
    _, state = model.apply(variables, x, train=train, mutable=mutable, capture_intermediates=True)
    outputs = flatten_dict(state["intermediates"], sep="/")
    return {path.removesuffix("/__call__"): output for path, (output,) in outputs.items()}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(("name", "train"), [("preact18", False), ("preact164", True)])
def test_signal_is_an_earlier_one_plus_the_residuals_between(name, scan, train):
    """Equation 4, to the last bit."""
    model = _small(name, sizes=(4,), scan=scan)
    x = _images(2, 9, 8, 3)
    outputs = _capture(model, _random_variables(model, x), x, train=train)
    last = "conv2" if name == "preact18" else "conv3"
    if scan:
        signals, residuals = outputs["layer1_rest"], outputs[f"layer1_rest/{last}"]
    else:
        names = [f"layer1_{index}" for index in (1, 2, 3)]
        signals = [outputs[unit] for unit in names]
        residuals = [outputs[f"{unit}/{last}"] for unit in names]
    assert len(residuals) == 3
    total = outputs["layer1_0"]
    for signal, residual in zip(signals, residuals, strict=True):
        assert np.abs(residual).max() > 0.1
        total = total + residual
        np.testing.assert_array_equal(signal, total)


@pytest.mark.parametrize(("name", "train"), [("preact18", False), ("preact164", True)])
def test_gradient_is_the_later_one_plus_that_of_the_residuals(name, train):
    """Equation 5: dE/dx_l = dE/dx_L (1 + d/dx_l of the sum of all F)."""
    model = _small(name, sizes=(4,))
    single = model.clone(scan=False)
    variables = _random_variables(model, _images(1, 9, 8, 3))
    x = _images(2, 5, 6, 4 * model.unit.expansion)
    place = model.segments.index(("layer1_rest",))
    last = "conv2" if name == "preact18" else "conv3"

    def stage(x):
        part = {"first": place, "last": place + 1, "train": train, "mutable": ["batch_stats"]}
        return model.apply(variables, x, **part)[0]

    def sum_of_residuals(x):
        state = {kind: unstack(tree) for kind, tree in variables.items()}
        mutable = ["batch_stats", "intermediates"]
        part = {"first": place, "last": place + 3, "train": train, "mutable": mutable}
        _, moved = single.apply(state, x, **part, capture_intermediates=True)
        outputs = moved["intermediates"]
        return sum(outputs[f"layer1_{index}"][last]["__call__"][0] for index in (1, 2, 3))

    later = _images(*x.shape, seed=1)
    (earlier,) = jax.vjp(stage, x)[1](later)
    (of_residuals,) = jax.vjp(sum_of_residuals, x)[1](later)
    assert np.abs(of_residuals).max() > 0.1
    _assert_close({"": earlier}, {"": later + of_residuals}, tolerance=1e-5)


def test_without_residuals_signal_and_gradient_pass_110_units_unchanged():
    model = create_model("preact1001", num_classes=3)
    place = model.segments.index(("layer3_rest",))
    x, later = _images(1, 3, 2, 256), _images(1, 3, 2, 256, seed=1)

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
def _train_once(name, scan):
    """A compiled gradient of a small network, and what it gives under the unrolled names."""
    model = _small(name, sizes=(3, 1))
    x = _images(4, 33, 40, 3)
    variables = _random_variables(model, x)
    if not scan:
        model = model.clone(scan=False)
        variables = {kind: unstack(tree) for kind, tree in variables.items()}

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
    state = {"batch_stats": batch_stats, "gradients": gradients, "logits": {"": logits}}
    return compiled, unstack(state)


@pytest.mark.parametrize("name", ["preact18", "preact164"])
def test_scanned_and_unrolled_network_are_one(name):
    """Equal to 1e-4 of the largest number in each array, for logits, statistics and gradients."""
    (_, state), (_, expected) = (_train_once(name, scan) for scan in (True, False))
    assert {"layer1_0", "layer1_1", "layer1_2", "layer2_0"} < set(state["gradients"])
    _assert_close(state, expected)


@pytest.mark.parametrize("name", ["preact18", "preact164"])
def test_scan_holds_only_convolutions_that_are_fast_in_a_loop(name):
    compiled, _ = _train_once(name, True)
    text = compiled.as_text()
    assert " while(" in text
    # Outside loops XLA brings all of them into this order.
    assert set(re.findall(r"dim_labels=(\S+?)[,\s]", text)) == {"b01f_01io->b01f"}


@pytest.mark.parametrize("name", ["preact18", "preact50", "preact164"])
def test_unrolled_names_are_those_of_the_unstacked_tree(name):
    model = _small(name, sizes=(11, 1, 2))
    stacked, single = (
        jax.eval_shape(
            lambda m=m: m.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
        )
        for m in (model, model.clone(scan=False))
    )
    assert "layer1_10" in single["params"]
    assert "layer2_rest" not in stacked["params"]
    unstacked = jax.eval_shape(unstack, stacked)
    assert flatten_dict(unstacked) == flatten_dict(single)


def test_unstack_takes_the_slices_and_leaves_the_others():
    stage = {"conv1": {"kernel": np.arange(12.0).reshape(3, 4)}, "bn1": {"scale": np.arange(3)}}
    tree = {"fc": {"bias": np.ones(2)}, "layer10_rest": stage}
    single = unstack(tree)
    assert set(single) == {"fc", "layer10_1", "layer10_2", "layer10_3"}
    np.testing.assert_array_equal(single["layer10_3"]["conv1"]["kernel"], [8, 9, 10, 11])
    assert single["layer10_2"]["bn1"]["scale"] == 1
    assert single["fc"]["bias"] is tree["fc"]["bias"]
    assert set(unstack({"params": tree, "batch_stats": {}})["params"]) == set(single)


def test_units_of_a_scan_begin_with_different_kernels_of_he_s_variance():
    model = _small("preact50", sizes=(3,), width=32)
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
    model = _small("preact164", sizes=(3,))
    x = _images(2, 8, 8, 3)
    variables = _random_variables(model, x)

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


def _count(name, num_classes):
    """Number of parameters, from the tables of the paper alone."""

    def unit(channels, width, *, bottleneck, activated=False):
        kernels = [(1, width), (3, width), (1, 4 * width)] if bottleneck else [(3, width)] * 2
        count = 0
        first = channels
        for number, (size, out) in enumerate(kernels):
            norm = 0 if activated and number == 0 else 2 * channels
            count += norm + size * size * channels * out
            channels = out
        return count + (first * channels if first != channels else 0), channels

    depth = int(name.removeprefix("preact"))
    if name in CIFAR:
        n = (depth - 2) // 9
        stages, channels, count = (n, n, n), 16, 3 * 3 * 3 * 16
    else:
        stages = {
            18: (2, 2, 2, 2),
            34: (3, 4, 6, 3),
            50: (3, 4, 6, 3),
            101: (3, 4, 23, 3),
            152: (3, 8, 36, 3),
            200: (3, 24, 36, 3),
        }[depth]
        channels, count = 64, 7 * 7 * 3 * 64 + 2 * 64
    width = channels
    for stage, num_units in enumerate(stages):
        for index in range(num_units):
            activated = stage == index == 0 and name not in CIFAR
            more, channels = unit(
                channels, width * 2**stage, bottleneck=depth >= 50, activated=activated
            )
            count += more
    return count + 2 * channels + (channels + 1) * num_classes


@pytest.mark.parametrize(
    ("name", "at_10", "at_1000"),
    [
        ("preact18", 11_179_850, 11_687_720),
        ("preact34", 21_288_010, 21_795_880),
        ("preact50", 23_520_842, 25_549_352),
        ("preact101", 42_512_970, 44_541_480),
        ("preact152", 58_156_618, 60_185_128),
        ("preact200", 62_637_642, 64_666_152),
        ("preact164", 1_703_258, 1_957_688),
        ("preact1001", 10_327_706, 10_582_136),
    ],
)
def test_number_of_parameters(name, at_10, at_1000):
    for num_classes, expected in ((10, at_10), (1000, at_1000)):
        params = _params(name, num_classes)
        assert sum(leaf.size for leaf in params.values()) == expected
        assert _count(name, num_classes) == expected


@pytest.mark.parametrize(("name", "millions"), [("preact164", 1.7), ("preact1001", 10.2)])
def test_kernels_alone_are_what_the_paper_counts(name, millions):
    params = _params(name, 10)
    kernels = sum(leaf.size for path, leaf in params.items() if path.endswith("kernel"))
    assert round(kernels / 1e6, 1) == millions


@pytest.mark.parametrize("name", NAMES)
def test_depth_is_in_the_name(name):
    params = _params(name)
    kernels = {path: leaf.shape for path, leaf in params.items() if path.endswith("kernel")}
    layers = [
        shape[0] if "_rest" in path else 1
        for path, shape in kernels.items()
        if "downsample" not in path
    ]
    assert sum(layers) == int(name.removeprefix("preact"))


@pytest.mark.parametrize("name", NAMES)
def test_networks_project_at_the_first_unit_of_a_stage_and_nowhere_else(name):
    params = _params(name)
    projections = {path for path in params if "downsample" in path}
    # Basic units of the first stage keep the 64 channels of the stem; bottlenecks make them more.
    stages = {"preact18": (2, 3, 4), "preact34": (2, 3, 4)}.get(
        name, (1, 2, 3) if name in CIFAR else (1, 2, 3, 4)
    )
    assert projections == {f"layer{stage}_0/downsample_conv/kernel" for stage in stages}


@pytest.mark.parametrize("name", NAMES)
def test_first_norm_stands_before_the_fork(name):
    params = _params(name)
    own = {path.split("/")[0] for path in params if path.split("/")[1] == "bn1"}
    assert ("bn1/scale" in params) == (name not in CIFAR)
    assert ("layer1_0" in own) == (name in CIFAR)
    assert {"layer2_0", "layer3_0", "layer1_rest", "layer2_rest", "layer3_rest"} <= own
    assert "final_bn/scale" in params


@pytest.mark.parametrize(
    ("name", "size", "sides", "channels"),
    [
        ("preact34", 200, (50, 25, 13, 7), (64, 128, 256, 512)),
        ("preact200", 224, (56, 28, 14, 7), (256, 512, 1024, 2048)),
        ("preact1001", 32, (32, 16, 8), (64, 128, 256)),
        ("preact1001", 45, (45, 23, 12), (64, 128, 256)),
    ],
)
def test_stages_halve_the_image_and_double_the_width(name, size, sides, channels):
    model = create_model(name, num_classes=3)
    x = jnp.zeros((2, size, size, 1))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    outputs = jax.eval_shape(functools.partial(_capture, model), variables, x)
    for stage, (side, width) in enumerate(zip(sides, channels, strict=True), start=1):
        assert outputs[f"layer{stage}_0"].shape == (2, side, side, width)
        assert outputs[f"layer{stage}_rest"].shape[1:] == (2, side, side, width)
    assert outputs["fc"].shape == (2, 3)


def test_logits_are_taken_from_the_normed_and_rectified_sum():
    model = _small("preact18", sizes=(2,))
    x = _images(2, 20, 24, 3)
    variables = _random_variables(model, x)
    outputs = _capture(model, variables, x)
    norm, stats = variables["params"]["final_bn"], variables["batch_stats"]["final_bn"]
    y = (outputs["layer1_rest"][-1] - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    y = np.maximum(y * norm["scale"] + norm["bias"], 0).mean((1, 2))
    fc = variables["params"]["fc"]
    np.testing.assert_allclose(outputs["fc"], y @ fc["kernel"] + fc["bias"], rtol=1e-4, atol=1e-5)


def test_bfloat16_network_keeps_parameters_statistics_and_logits_in_float32():
    model = _small("preact164", dtype=jnp.dtype("bfloat16"))
    x = jnp.zeros((2, 8, 8, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    outputs = jax.eval_shape(functools.partial(_capture, model, train=True), variables, x)
    single = {path for path, output in outputs.items() if output.dtype == jnp.float32}
    assert single == {"", "__call__", "fc"} & set(outputs)


@pytest.mark.parametrize(("name", "scan"), [("preact18", False), ("preact164", True)])
def test_segments_one_after_another_are_the_network(name, scan):
    model = _small(name, sizes=(2, 2), scan=scan)
    x = _images(2, 20, 17, 3)
    variables = _random_variables(model, x)
    names = [name for segment in model.segments for name in segment]
    assert sorted(names) == sorted(variables["params"])
    expected, moved = model.apply(variables, x, train=True, mutable=["batch_stats"])

    stats = {}
    for first, segment in enumerate(model.segments):
        own = {
            kind: {n: leaves[n] for n in segment if n in leaves}
            for kind, leaves in variables.items()
        }
        # A segment needs its own variables, and no others.
        x, updated = model.apply(
            own, x, train=True, first=first, last=first + 1, mutable=["batch_stats"]
        )
        stats |= updated.get("batch_stats", {})
    _assert_close({"": x}, {"": expected})
    _assert_close(stats, moved["batch_stats"])


@pytest.mark.parametrize("name", ["preact18", "preact164"])
def test_without_norms_the_convolutions_and_the_head_are_left(name):
    with_norms, without = _params(name), _params(name, norms=False)
    assert set(without) == {path for path in with_norms if "bn" not in path.split("/")[-2]}


@pytest.mark.parametrize(("name", "published"), [("preact34", 64), ("preact164", 16)])
def test_width_is_that_of_the_stem_and_by_default_the_published_one(name, published):
    for attributes, expected in (({}, published), ({"width": 24}, 24)):
        params = _params(name, **attributes)
        assert params["conv1/kernel"].shape[-1] == expected
        assert params["layer2_0/conv1/kernel"].shape[-1] == 2 * expected


def test_zero_init_residual_is_refused():
    with pytest.raises(
        jaxcells.Error, match=r"--config\.model\.zero_init_residual=False"
    ) as caught:
        create_model("preact50", num_classes=2, zero_init_residual=True)
    assert "\n" not in str(caught.value)


# Training


def _train(model, devices, *, batch_size, side, num_steps, **recipe):
    """The state after some steps on one batch, and the summed loss before each."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(batch_size, side, side, 3)).astype(np.float32),
        "label": rng.integers(0, 3, batch_size, np.int32),
        "mask": np.ones(batch_size, np.float32),
    }
    batch["image"][: batch_size // 2] /= 8  # halves that differ, and so do their statistics
    schedule = optim.make_schedule("constant", learning_rate=0.1, num_steps=num_steps)
    key, placed = jax.random.key(0), mesh.make_mesh(devices)
    state = create_train_state(
        model, optim.make_optimizer(schedule, **recipe), sample_shape=batch["image"].shape, key=key
    )
    step = mesh.jit_train_step(make_train_step(lambda images: images), placed)
    state, sharded, losses = mesh.replicate(state, placed), mesh.shard_batch(batch, placed), []
    for _ in range(num_steps):
        state, sums = step(state, sharded, key)
        losses.append(float(sums["loss"]))
    return jax.device_get(state), losses


def main():
    """What the process below runs, on two devices."""
    assert jax.device_count() == 2
    model = _small("preact18", sizes=(2,))
    (one, _), (two, _) = (
        _train(model, jax.devices()[:number], batch_size=8, side=33, num_steps=1)
        for number in (1, 2)
    )
    _assert_close(two.variables, one.variables)


def test_norms_see_the_batch_of_all_devices():
    code = "from tests.models import test_preact; test_preact.main()"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_smaller_setting_of_the_config_trains():
    (command,) = re.findall(r"python launch\.py .*\\\n.*", preact1001.__doc__)
    command = command.replace("\\\n", "")
    config = preact1001.get_config()
    for flag in shlex.split(command)[4:]:
        section, key, value = re.fullmatch(r"--config\.(\w+)\.(\w+)=(.*)", flag).groups()
        config[section][key] = type(config[section][key])(value)
    validate(config)
    assert config.model.name == "preact164"
    model = create_model(**config.model, num_classes=3)
    state, losses = _train(
        model,
        jax.devices()[:1],
        batch_size=config.train.batch_size,
        side=config.data.crop_size,
        num_steps=2,
    )
    assert np.isfinite(losses).all()
    assert state.step == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.variables))
