import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import jaxcells
from jaxcells.models import create_model
from jaxcells.models.preact import PreActBottleneck
from jaxcells.models.resnet import BasicBlock, Bottleneck
from tests.models.networks import (
    assert_close,
    images,
    output_shapes,
    outputs,
    params,
    random_variables,
    shapes,
    small,
)

BLOCKS = [BasicBlock, Bottleneck]
KINDS = ["resnet18", "plain50", "preact18", "preact164"]


# Blocks


@pytest.mark.parametrize(("block", "train"), [(BasicBlock, False), (Bottleneck, True)])
def test_identity_block_with_last_scale_zero_is_relu(block, train):
    module = block(4, zero_init_residual=True)
    x = images(2, 5, 6, 4 * block.expansion)
    variables = module.init(jax.random.key(0), x, train=False)
    y, _ = module.apply(variables, x, train=train, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, np.maximum(x, 0))


@pytest.mark.parametrize(
    ("block", "stride", "expected"),
    [
        (BasicBlock, 1, {"conv1": (1, 4), "conv2": (1, 4)}),
        (BasicBlock, 2, {"conv1": (2, 4), "conv2": (2, 4)}),
        (Bottleneck, 1, {"conv1": (1, 4), "conv2": (1, 4), "conv3": (1, 16)}),
        # The first 1x1 convolution sees every pixel: the stride is in the 3x3.
        (Bottleneck, 2, {"conv1": (1, 4), "conv2": (2, 4), "conv3": (2, 16)}),
    ],
)
def test_shape_and_stride(block, stride, expected):
    def shape(step, channels):
        return (2, -(-7 // step), -(-4 // step), channels)

    found = output_shapes(block(4, stride=stride), images(2, 7, 4, 3))
    for name, (step, channels) in expected.items():
        assert found[name].shape == shape(step, channels)
    assert found["downsample_conv"].shape == shape(stride, 4 * block.expansion)
    assert found[""].shape == shape(stride, 4 * block.expansion)


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_block_has_a_projection_exactly_where_the_shape_changes(block, shortcut):
    for channels in (4, 16):
        for stride in (1, 2):
            module = block(4, stride=stride, shortcut=shortcut)
            names = set(shapes(module, images(1, 8, 8, channels))["params"])
            changes = stride != 1 or channels != 4 * block.expansion
            projection = {"downsample_conv", "downsample_bn"}
            assert names & projection == (projection if changes and shortcut else set())


@pytest.mark.parametrize("block", BLOCKS)
def test_projection_is_added_to_the_branch(block):
    module, plain = block(4, stride=2), block(4, stride=2, shortcut=False)
    x = images(2, 6, 6, 3)
    variables = random_variables(module, x)
    last = "bn2" if block is BasicBlock else "bn3"
    variables["params"][last]["bias"] += 100  # no ReLU at the end: the parts can be told apart

    shortcut = module.apply(variables, x, train=False) - plain.apply(variables, x, train=False)

    kernel = variables["params"]["downsample_conv"]["kernel"][0, 0]
    norm, stats = variables["params"]["downsample_bn"], variables["batch_stats"]["downsample_bn"]
    projected = (x[:, ::2, ::2] @ kernel - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(shortcut, projected * norm["scale"] + norm["bias"], atol=1e-4)


@pytest.mark.parametrize(("block", "train"), [(BasicBlock, False), (Bottleneck, True)])
def test_input_gradient_is_the_incoming_one_plus_the_branch_s(block, train):
    module, plain = block(4), block(4, shortcut=False)
    x = images(2, 5, 6, 4 * block.expansion)
    variables = random_variables(module, x)
    last = "bn2" if block is BasicBlock else "bn3"
    variables["params"][last]["bias"] += 100  # no ReLU at the end: the plain block is the branch

    def pull_back(network, cotangent):
        def run(x):
            return network.apply(variables, x, train=train, mutable=["batch_stats"])[0]

        return jax.jit(lambda cotangent: jax.vjp(run, x)[1](cotangent)[0])(cotangent)

    incoming = images(*x.shape, seed=1)
    branch = pull_back(plain, incoming)
    assert np.abs(branch).min() > 0
    np.testing.assert_allclose(pull_back(module, incoming), incoming + branch, atol=1e-5)


@pytest.mark.parametrize("block", [BasicBlock, PreActBottleneck])
def test_bfloat16_block_is_near_the_float32_one(block):
    x = images(4, 8, 8, 3) + 1
    variables = random_variables(block(8, stride=2), x)
    exact, rounded = (
        block(8, stride=2, dtype=dtype).apply(variables, x, train=True, mutable=["batch_stats"])
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded[0].dtype == jnp.bfloat16
    assert_close(rounded, exact, tolerance=0.02)


# Networks


@pytest.mark.parametrize("depth", [18, 152])
def test_plain_network_is_the_residual_one_without_shortcut_parameters(depth):
    residual, plain = params(f"resnet{depth}"), params(f"plain{depth}")
    assert plain == {path: leaf for path, leaf in residual.items() if "downsample" not in path}


@pytest.mark.parametrize(
    ("name", "size", "last", "sides", "channels"),
    [
        ("resnet34", 200, (2, 3, 5, 2), (50, 25, 13, 7), (64, 128, 256, 512)),
        ("resnet50", 224, (2, 3, 5, 2), (56, 28, 14, 7), (256, 512, 1024, 2048)),
        ("preact34", 200, ("rest",) * 4, (50, 25, 13, 7), (64, 128, 256, 512)),
        ("preact1001", 45, ("rest",) * 3, (45, 23, 12), (64, 128, 256)),
    ],
)
def test_stages_halve_the_image_and_double_the_width(name, size, last, sides, channels):
    found = output_shapes(create_model(name, num_classes=3), jnp.zeros((2, size, size, 1)))
    for stage, (index, side, width) in enumerate(zip(last, sides, channels, strict=True), start=1):
        assert found[f"layer{stage}_0"].shape == (2, side, side, width)
        assert found[f"layer{stage}_{index}"].shape[-4:] == (2, side, side, width)
    assert found["fc"].shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("resnet18", (17, 40, 1)), ("plain50", (1, 1, 2)), ("preact164", (33, 9, 5))],
)
def test_any_size_and_number_of_channels(name, shape):
    found = output_shapes(small(name), jnp.zeros((2, *shape)))
    assert found["fc"].shape == (2, 3)


def test_training_moves_the_running_statistics_by_the_momentum_rule():
    model = small("resnet18")
    x = images(4, 32, 32, 1)
    variables = random_variables(model, x)
    _, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    inputs = outputs(model, variables, x, train=True)
    before = flatten_dict(variables["batch_stats"])
    after = flatten_dict(updated["batch_stats"])
    assert len(after) == 2 * (1 + 3 * 2 + 1)
    for path in after:
        # Each norm follows the convolution of the same name.
        convolved = np.asarray(inputs["/".join(path[:-1]).replace("bn", "conv")], np.float64)
        batch = convolved.mean((0, 1, 2)) if path[-1] == "mean" else convolved.var((0, 1, 2))
        np.testing.assert_allclose(
            after[path], 0.9 * before[path] + 0.1 * batch, rtol=1e-5, atol=1e-5
        )


def test_evaluation_leaves_the_running_statistics_and_does_not_mix_the_batch():
    model = small("resnet18")
    x = images(4, 32, 32, 1)
    variables = random_variables(model, x)
    logits, updated = model.apply(variables, x, train=False, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])
    alone = model.apply(variables, x[:1], train=False)
    np.testing.assert_allclose(logits[:1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_residual_reaches_the_last_scale_of_every_block_and_no_other(name, last):
    model = create_model(name, num_classes=3, width=4, zero_init_residual=True)

    @jax.jit
    def scales():  # compiled, so that the rest of the initialisation is not even computed
        variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
        leaves = flatten_dict(variables["params"], sep="/").items()
        return {path: leaf for path, leaf in leaves if path.endswith("scale")}

    for path, scale in scales().items():
        np.testing.assert_array_equal(scale, 0 if path.endswith(f"{last}/scale") else 1)


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_network_keeps_parameters_statistics_and_logits_in_float32(name):
    model, x = (
        create_model(name, num_classes=3, width=8, dtype="bfloat16"),
        jnp.zeros((4, 32, 32, 3)),
    )
    found = {path: output.dtype for path, output in output_shapes(model, x, train=True).items()}
    assert {path for path, dtype in found.items() if dtype == jnp.float32} == {"", "fc"}
    assert set(found.values()) == {jnp.dtype("float32"), jnp.dtype("bfloat16")}

    def run():
        variables = model.init(jax.random.key(0), x, train=False)
        return variables, model.apply(variables, x, train=True, mutable=["batch_stats"])[1]

    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(run))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("name", "scan"),
    [("resnet18", False), ("plain50", False), ("preact18", False), ("preact164", True)],
)
def test_segments_one_after_another_are_the_network(name, scan):
    model = small(name, scan=scan)
    x = images(2, 20, 17, 3)
    variables = random_variables(model, x)
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
    assert_close({"logits": x, "stats": stats}, {"logits": expected, "stats": moved["batch_stats"]})


@pytest.mark.parametrize("name", KINDS)
def test_without_norms_the_convolutions_and_the_head_are_left(name):
    with_norms, without = params(name), params(name, norms=False)
    assert set(without) == {path for path in with_norms if "bn" not in path.split("/")[-2]}


@pytest.mark.parametrize(
    ("name", "published"), [("resnet18", 64), ("preact34", 64), ("preact164", 16)]
)
def test_width_is_that_of_the_stem_and_by_default_the_published_one(name, published):
    for attributes, expected in (({}, published), ({"width": 24}, 24)):
        kernels = params(name, **attributes)
        assert kernels["conv1/kernel"].shape[-1] == expected
        assert kernels["layer2_0/conv1/kernel"].shape[-1] == 2 * expected


@pytest.mark.parametrize("name", ["resnet35", "plain200", "preact", "resnet018", "vgg16", "18", ""])
def test_message_of_an_unknown_name_lists_all(name):
    with pytest.raises(jaxcells.Error) as caught:
        create_model(name, num_classes=2)
    assert str(caught.value) == (
        f"model.name={name} is no network; choose one of resnet18, resnet34, resnet50, resnet101, "
        "resnet152, plain18, plain34, plain50, plain101, plain152, preact18, preact34, preact50, "
        "preact101, preact152, preact200, preact164, preact1001"
    )


@pytest.mark.parametrize("name", ["plain34", "preact50"])
def test_zero_init_residual_is_refused_where_it_cannot_be(name):
    with pytest.raises(jaxcells.Error, match=rf"not for {name}.*residual=False$") as caught:
        create_model(name, num_classes=2, zero_init_residual=True)
    assert "\n" not in str(caught.value)
