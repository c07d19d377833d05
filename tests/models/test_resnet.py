from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxcells
from jaxcells.models import MODEL_NAMES, create_model
from jaxcells.models.resnet import BasicBlock, Bottleneck

BLOCKS = [BasicBlock, Bottleneck]
DEPTHS = [18, 34, 50, 101, 152]


def _images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _random_variables(module, x, seed=0):
    """Values under which nothing cancels: no norm's scale is one, no bias or mean is zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if leaf.ndim > 1:
            return rng.normal(scale=np.prod(leaf.shape[:-1]) ** -0.5, size=leaf.shape)
        positive = path[-1] in ("scale", "var")
        return rng.uniform(0.5 if positive else -0.5, 1.5 if positive else 0.5, leaf.shape)

    shapes = flatten_dict(jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False)))
    return unflatten_dict(
        {path: draw(path, leaf).astype(np.float32) for path, leaf in shapes.items()}
    )


def _outputs(module, x):
    """Shapes and dtypes of all layers' outputs, by path, and of the module's own, under ""."""

    def run():
        variables = module.init(jax.random.key(0), x, train=False)
        _, captured = module.apply(
            variables, x, train=False, mutable=["intermediates"], capture_intermediates=True
        )
        return captured["intermediates"]

    outputs = flatten_dict(jax.eval_shape(run))
    return {"/".join(path[:-1]): output for path, (output,) in outputs.items()}


def _params(module, x):
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))
    return flatten_dict(variables["params"])


# Blocks


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_identity_block_with_last_scale_zero_is_relu(block, train):
    module = block(4, zero_init_residual=True)
    x = _images(2, 5, 6, 4 * block.expansion)
    variables = module.init(jax.random.key(0), x, train=False)
    y, _ = module.apply(variables, x, train=train, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, np.maximum(x, 0))


@pytest.mark.parametrize("block", BLOCKS)
def test_only_the_last_scale_starts_at_zero(block):
    module = block(4, stride=2, zero_init_residual=True)
    params = module.init(jax.random.key(0), _images(1, 4, 4, 3), train=False)["params"]
    last = "bn2" if block is BasicBlock else "bn3"
    for name, layer in params.items():
        if "scale" in layer:
            np.testing.assert_array_equal(layer["scale"], 0 if name == last else 1)


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 1)])
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
def test_shape_and_stride(block, stride, expected, size):
    def shape(step, channels):
        return (2, -(-size[0] // step), -(-size[1] // step), channels)

    outputs = _outputs(block(4, stride=stride), _images(2, *size, 3))
    for name, (step, channels) in expected.items():
        assert outputs[name].shape == shape(step, channels)
    assert outputs["downsample_conv"].shape == shape(stride, 4 * block.expansion)
    assert outputs[""].shape == shape(stride, 4 * block.expansion)


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_block_has_a_projection_exactly_where_the_shape_changes(block, shortcut):
    for channels in (4, 16):
        for stride in (1, 2):
            module = block(4, stride=stride, shortcut=shortcut)
            names = {path[0] for path in _params(module, _images(1, 8, 8, channels))}
            changes = stride != 1 or channels != 4 * block.expansion
            projection = {"downsample_conv", "downsample_bn"}
            assert names & projection == (projection if changes and shortcut else set())


@pytest.mark.parametrize("block", BLOCKS)
def test_projection_is_added_to_the_branch(block):
    module, plain = block(4, stride=2), block(4, stride=2, shortcut=False)
    x = _images(2, 6, 6, 3)
    variables = _random_variables(module, x)
    last = "bn2" if block is BasicBlock else "bn3"
    variables["params"][last]["bias"] += 100  # no ReLU at the end: the parts can be told apart

    shortcut = module.apply(variables, x, train=False) - plain.apply(variables, x, train=False)

    kernel = variables["params"]["downsample_conv"]["kernel"][0, 0]
    norm, stats = variables["params"]["downsample_bn"], variables["batch_stats"]["downsample_bn"]
    projected = (x[:, ::2, ::2] @ kernel - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(shortcut, projected * norm["scale"] + norm["bias"], atol=1e-4)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_input_gradient_is_the_incoming_one_plus_the_branch_s(block, train):
    module, plain = block(4), block(4, shortcut=False)
    x = _images(2, 5, 6, 4 * block.expansion)
    variables = _random_variables(module, x)
    last = "bn2" if block is BasicBlock else "bn3"
    variables["params"][last]["bias"] += 100  # no ReLU at the end: the plain block is the branch

    def pull_back(network, cotangent):
        def run(x):
            return network.apply(variables, x, train=train, mutable=["batch_stats"])[0]

        return jax.vjp(run, x)[1](cotangent)[0]

    incoming = _images(*x.shape, seed=1)
    branch = pull_back(plain, incoming)
    assert np.abs(branch).min() > 0
    np.testing.assert_array_equal(pull_back(module, incoming), incoming + branch)


# Networks


@pytest.mark.parametrize(
    ("depth", "count"),
    [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_number_of_parameters_at_1000_classes(depth, count):
    model = create_model(f"resnet{depth}", num_classes=1000)
    params = _params(model, jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in params.values()) == count


@pytest.mark.parametrize("depth", DEPTHS)
def test_networks_project_at_the_first_block_of_a_stage_and_nowhere_else(depth):
    params = _params(create_model(f"resnet{depth}", num_classes=2), jnp.zeros((1, 64, 64, 3)))
    projecting = {path[0] for path in params if path[1].startswith("downsample")}
    # Basic blocks of the first stage keep the 64 channels of the stem; bottlenecks make them 256.
    first = set() if depth < 50 else {"layer1_0"}
    assert projecting == first | {"layer2_0", "layer3_0", "layer4_0"}


@pytest.mark.parametrize("depth", DEPTHS)
def test_plain_network_is_the_residual_one_without_shortcut_parameters(depth):
    x = jnp.zeros((1, 64, 64, 3))
    residual = _params(create_model(f"resnet{depth}", num_classes=2), x)
    plain = _params(create_model(f"plain{depth}", num_classes=2), x)
    shortcuts = {path for path in residual if "downsample" in path[1]}
    assert {p: leaf.shape for p, leaf in plain.items()} == {
        p: leaf.shape for p, leaf in residual.items() if p not in shortcuts
    }
    assert len(shortcuts) == (9 if depth < 50 else 12)


@pytest.mark.parametrize(("size", "sides"), [(200, [50, 25, 13, 7]), (224, [56, 28, 14, 7])])
@pytest.mark.parametrize(("name", "expansion"), [("resnet34", 1), ("resnet50", 4)])
def test_stages_halve_the_image_and_double_the_width(name, expansion, size, sides):
    outputs = _outputs(create_model(name, num_classes=3), jnp.zeros((2, size, size, 3)))
    assert outputs["conv1"].shape == (2, size // 2, size // 2, 64)
    for stage, (side, last) in enumerate(zip(sides, [2, 3, 5, 2], strict=True)):
        expected = (2, side, side, 64 * 2**stage * expansion)
        assert outputs[f"layer{stage + 1}_0"].shape == expected
        assert outputs[f"layer{stage + 1}_{last}"].shape == expected
    assert outputs[""].shape == (2, 3)


def test_training_moves_the_running_statistics_by_the_momentum_rule():
    model = create_model("resnet18", num_classes=3, width=4)
    x = _images(4, 32, 32, 1)
    variables = _random_variables(model, x)
    _, updated = model.apply(
        variables,
        x,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )
    before = flatten_dict(variables["batch_stats"])
    after = flatten_dict(updated["batch_stats"])
    outputs = flatten_dict(updated["intermediates"])
    assert len(after) == 2 * (1 + 8 * 2 + 3)
    for *module, norm, statistic in after:
        # Each norm follows the convolution of the same name.
        (inputs,) = outputs[*module, norm.replace("bn", "conv"), "__call__"]
        inputs = np.asarray(inputs, np.float64)
        batch = inputs.mean((0, 1, 2)) if statistic == "mean" else inputs.var((0, 1, 2))
        path = (*module, norm, statistic)
        np.testing.assert_allclose(
            after[path], 0.9 * before[path] + 0.1 * batch, rtol=1e-5, atol=1e-6
        )


def test_evaluation_leaves_the_running_statistics_and_does_not_mix_the_batch():
    model = create_model("resnet18", num_classes=3, width=4)
    x = _images(4, 32, 32, 1)
    variables = _random_variables(model, x)
    logits, updated = model.apply(variables, x, train=False, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])
    alone = model.apply(variables, x[:1], train=False)
    np.testing.assert_allclose(logits[:1], alone, rtol=1e-5, atol=1e-5)


def test_zero_init_residual_reaches_every_block():
    model = create_model("resnet18", num_classes=3, width=4, zero_init_residual=True)

    @jax.jit
    def scales():  # compiled, so that the rest of the initialisation is not even computed
        variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
        params = flatten_dict(variables["params"])
        return {"/".join(path): leaf for path, leaf in params.items() if path[-1] == "scale"}

    for path, scale in scales().items():
        np.testing.assert_array_equal(scale, 0 if path.endswith("bn2/scale") else 1)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "plain18"])
@pytest.mark.parametrize("shape", [(17, 40, 1), (33, 9, 5)])
def test_any_size_and_number_of_channels(name, shape):
    model = create_model(name, num_classes=3, width=4)
    logits = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False)[0],
        jax.ShapeDtypeStruct((2, *shape), jnp.float32),
    )
    assert logits.shape == (2, 3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16"])
def test_bfloat16_network_keeps_parameters_statistics_and_logits_in_float32(dtype):
    x = jnp.zeros((4, 32, 32, 3))
    model = create_model("resnet18", num_classes=3, width=8, dtype=dtype)
    dtypes = {path: output.dtype for path, output in _outputs(model, x).items()}
    assert {path for path, dtype in dtypes.items() if dtype == jnp.float32} == {"", "fc"}
    assert set(dtypes.values()) == {jnp.dtype("float32"), jnp.dtype("bfloat16")}

    def run():
        variables = model.init(jax.random.key(0), x, train=False)
        return variables, model.apply(variables, x, train=True, mutable=["batch_stats"])[1]

    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(run))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("block", BLOCKS)
def test_bfloat16_block_is_near_the_float32_one(block):
    x = _images(4, 8, 8, 3) + 1
    variables = _random_variables(block(8, stride=2), x)
    (exact, exact_stats), (rounded, rounded_stats) = (
        block(8, stride=2, dtype=dtype).apply(variables, x, train=True, mutable=["batch_stats"])
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=0.01), rounded_stats, exact_stats
    )


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "plain18"])
def test_segments_one_after_another_are_the_network(name):
    model = create_model(name, num_classes=3, width=4)
    x = _images(2, 40, 40, 3)
    variables = _random_variables(model, x)
    names = [name for segment in model.segments for name in segment]
    assert set(names) == set(variables["params"])
    assert len(names) == len(set(names))
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
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), stats, moved["batch_stats"])


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "plain18"])
def test_without_norms_the_convolutions_and_the_head_are_left(name):
    x = jnp.zeros((1, 32, 32, 3))
    with_norms, without = (_params(create_model(name, num_classes=2, norms=n), x) for n in (1, 0))
    assert set(without) == {path for path in with_norms if "bn" not in path[-2]}


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(jaxcells.Error, match="resnet35") as caught:
        create_model("resnet35", num_classes=2)
    assert all(name in str(caught.value) for name in MODEL_NAMES)
    assert "\n" not in str(caught.value)


def test_plain_network_that_could_never_leave_zero_is_refused():
    with pytest.raises(jaxcells.Error, match=r"--config\.model\.zero_init_residual=False"):
        create_model("plain34", num_classes=2, zero_init_residual=True)
