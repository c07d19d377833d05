import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcells import Error
from jaxcells.training.freeze import (
    check_patterns,
    frozen_norms,
    frozen_prefix,
    map_with_path,
    matches,
)
from jaxcells.training.optim import make_optimizer, make_schedule
from jaxcells.training.state import create_train_state
from jaxcells.training.steps import make_train_step
from tests.training.conftest import create_small_model


@pytest.fixture(scope="module")
def model():
    return create_small_model(name="resnet18", num_classes=3, width=4)


@pytest.fixture(scope="module")
def params(model):
    return jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=False), jnp.zeros((1, 32, 32, 3))
    )["params"]


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("fc", "fc/kernel", True),
        ("conv1", "conv1/kernel", True),
        ("conv1", "layer1_0/conv1/kernel", False),  # from the start, not anywhere
        (".*conv1", "layer1_0/conv1/kernel", True),
        ("layer[12]", "layer2_1/bn1/scale", True),
        ("layer[12]", "layer3_0/bn1/scale", False),
        ("(?!fc)", "layer4_1/bn2/bias", True),
        ("(?!fc)", "fc/bias", False),
        (".*bn", "layer2_0/downsample_bn/scale", True),
    ],
)
def test_a_pattern_means_the_paths_that_begin_with_it(pattern, path, expected):
    assert matches([pattern], path) is expected
    assert matches(["nothing", pattern], path) is expected
    assert not matches([], path)


def test_paths_are_those_of_the_parameters(params):
    named = map_with_path(lambda path, leaf: path, params)
    assert {"/".join(path): name for path, name in flatten_dict(named).items()} == {
        name: name for name in flatten_dict(params, sep="/")
    }


@pytest.mark.parametrize(
    ("freeze", "multipliers", "text"),
    [
        (("conv1", "layr4"), (), r"optim\.freeze: 'layr4' matches no parameter"),
        (("conv1,bn1",), (), r"alternatives are separated by \|"),
        (
            (),
            (("head", 10.0),),
            r"optim\.multipliers: 'head' matches no parameter; .* fc, layer1_0, ",
        ),
        (("",), (), "nothing is left to train"),
        (("(?!fc)", "fc"), (), "nothing is left to train"),
    ],
)
def test_patterns_that_mean_nothing_or_everything_are_refused(params, freeze, multipliers, text):
    with pytest.raises(Error, match=text):
        check_patterns(freeze, multipliers, params)


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        ((), 0),
        (("fc",), 0),
        (("conv1",), 0),  # the norm of the stem still learns
        (("conv1", "bn1"), 1),
        (("conv1|bn1|layer1",), 2),
        (("(?!layer4|fc)",), 4),
        (("(?!fc)",), 6),  # pooling too, which has no parameters
        ((".*conv",), 0),
        (("layer1",), 0),  # frozen, but not from the start
    ],
)
def test_the_frozen_prefix_ends_at_the_first_parameter_that_learns(model, params, freeze, expected):
    assert len(model.segments) == 7
    assert frozen_prefix(model.segments, params, freeze) == expected


def normalize(images):
    return images.astype(jnp.float32) / 255 - 0.5


BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3)).astype(np.uint8),
    "label": np.arange(6, dtype=np.int32) % 3,
    "mask": np.ones(6, np.float32),
}


def bits(tree):
    return {path: leaf.tobytes() for path, leaf in flatten_dict(tree, sep="/").items()}


def test_frozen_parameters_and_statistics_stay_bit_for_bit_and_the_others_move(model):
    freeze = ("conv1", "bn1", "layer1", "layer2_0/downsample", "layer3_0/conv1")
    schedule = make_schedule("constant", learning_rate=0.1, num_steps=3)
    tx = make_optimizer(schedule, weight_decay=0.1, freeze=freeze)
    state = create_train_state(model, tx, sample_shape=(1, 32, 32, 3), key=jax.random.key(1))
    # A negative zero shows whether zero was added.
    params = flatten_dict(state.params)
    path = ("layer1_0", "conv1", "kernel")
    params[path] = params[path].at[0].set(-0.0)
    state = state.replace(params=unflatten_dict(params))
    step = jax.jit(make_train_step(normalize, freeze=freeze))
    before = jax.device_get(state.variables)
    for _ in range(3):
        state, _ = step(state, BATCH, jax.random.key(2))
    after = jax.device_get(state.variables)
    for kind in ("params", "batch_stats"):
        old, new = bits(before[kind]), bits(after[kind])
        assert old.keys() == new.keys()
        for path in old:
            frozen = matches(freeze, path)
            assert (old[path] == new[path]) is frozen, path
    # They gather no velocity, decay included: what is trained later starts from rest.
    trace = flatten_dict(state.opt_state[1].trace, sep="/")
    assert {path for path, v in trace.items() if not np.any(v)} == {
        path for path in trace if matches(freeze, path)
    }


def test_a_frozen_norm_uses_its_running_statistics():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.BatchNorm(name="first")(x, use_running_average=not train)
            return nn.BatchNorm(name="second")(x, use_running_average=not train)

    model, x = Network(), np.random.default_rng(0).normal(3, 2, (8, 4)).astype(np.float32)
    variables = model.init(jax.random.key(0), x, train=False)
    with frozen_norms(["first"]):
        y, moved = model.apply(variables, x, train=True, mutable=["batch_stats"])
    epsilon = 1e-5
    first = x / np.sqrt(1 + epsilon)  # statistics as initialised: mean 0, variance 1
    expected = (first - first.mean(0)) / np.sqrt(first.var(0) + epsilon)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(moved["batch_stats"]["first"]["mean"], 0)
    np.testing.assert_allclose(
        moved["batch_stats"]["second"]["mean"], 0.01 * first.mean(0), rtol=1e-4
    )
    # And nothing is left of it afterwards, nor where one of its parameters still learns.
    for patterns in ([], ["first/scale"]):
        with frozen_norms(patterns):
            y, moved = model.apply(variables, x, train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(np.mean(y, 0), 0, atol=1e-5)
        assert np.all(moved["batch_stats"]["first"]["mean"])


def test_multipliers_scale_the_update_and_the_first_match_counts(params):
    multipliers = (("fc", 10.0), ("layer4_0", 0.5), ("layer", 0.0), ("f", 99.0))
    schedule = make_schedule("constant", learning_rate=0.125, num_steps=1)
    tx = make_optimizer(schedule, multipliers=multipliers)
    ones = jax.tree.map(lambda leaf: np.ones(1, np.float32), params)
    updates, _ = tx.update(ones, tx.init(ones), ones)
    for path, update in flatten_dict(updates).items():
        expected = {"conv1": 1.0, "bn1": 1.0, "fc": 10.0, "layer4_0": 0.5}
        factor = expected.get(path[0], 0.0)
        np.testing.assert_array_equal(update, -0.125 * factor, err_msg="/".join(path))


def test_what_is_frozen_costs_no_gradient(model):
    model = model.clone(stage_sizes=(1,))

    def flops(freeze):
        schedule = make_schedule("constant", learning_rate=0.1, num_steps=1)
        tx = make_optimizer(schedule, freeze=freeze)
        state = create_train_state(model, tx, sample_shape=(1, 32, 32, 3), key=jax.random.key(0))
        step = jax.jit(make_train_step(normalize, freeze=freeze))
        return step.lower(state, BATCH, jax.random.key(0)).compile().cost_analysis()["flops"]

    assert flops(("(?!fc)",)) < 0.45 * flops(())  # forward alone is a third
