import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxcells import Error
from jaxcells.training.freeze import check_patterns, frozen_norms, frozen_prefix, matches
from jaxcells.training.optim import make_optimizer, make_schedule
from jaxcells.training.state import create_train_state
from jaxcells.training.steps import make_train_step
from tests.training.conftest import create_small_model, create_small_state
from tests.training.test_steps import Tiny, make_batch, normalize


@pytest.fixture(scope="module")
def params():
    return jax.eval_shape(create_small_state).params


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("conv1", "conv1/kernel", True),
        ("conv1", "layer1_0/conv1/kernel", False),  # from the start, not anywhere
        (".*conv1", "layer1_0/conv1/kernel", True),
        ("layer[12]", "layer2_1/bn1/scale", True),
        ("(?!fc)", "layer4_1/bn2/bias", True),
        ("(?!fc)", "fc/bias", False),
    ],
)
def test_a_pattern_means_the_paths_that_begin_with_it(pattern, path, expected):
    assert matches(["nothing", pattern], path) is expected


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
        (("conv1",), 0),  # the norm of the stem still learns
        (("conv1", "bn1"), 1),
        (("conv1|bn1|layer1",), 2),
        (("(?!fc)",), 4),  # pooling too, which has no parameters
        (("layer1",), 0),  # frozen, but not from the start
    ],
)
def test_the_frozen_prefix_ends_at_the_first_parameter_that_learns(params, freeze, expected):
    segments = create_small_model(name="resnet18", num_classes=2).segments
    assert len(segments) == 5
    assert frozen_prefix(segments, params, freeze) == expected


def start(freeze, **settings):
    """A state and a compiled step of training."""
    schedule = make_schedule("constant", 0.1, 1)
    tx = make_optimizer(schedule, freeze=freeze, **settings)
    state = create_train_state(Tiny(), tx, sample_shape=(1, 8, 8, 1), key=jax.random.key(1))
    return state, jax.jit(make_train_step(normalize, freeze=freeze))


def bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten_dict(tree, sep="/").items()}


@pytest.mark.parametrize("freeze", [("conv", "bn"), ("bn/scale", "fc/bias")])
def test_frozen_parameters_and_statistics_stay_bit_for_bit_and_the_others_move(freeze):
    state, step = start(freeze, weight_decay=0.1)
    # A negative zero shows whether zero was added.
    kernel = state.params["conv"]["kernel"].at[0].set(-0.0)
    bias = state.params["fc"]["bias"].at[0].set(-0.0)
    params = state.params | {"conv": state.params["conv"] | {"kernel": kernel}}
    state = state.replace(params=params | {"fc": params["fc"] | {"bias": bias}})
    before = state.variables
    for seed in range(3):
        state, _ = step(state, make_batch(seed=seed), jax.random.key(2))
    for kind in ("params", "batch_stats"):
        old, new = bits(before[kind]), bits(state.variables[kind])
        assert {path: old[path] == new[path] for path in old} == {
            path: matches(freeze, path) for path in new
        }
    # They gather no velocity, decay included: what is trained later starts from rest.
    trace = flatten_dict(state.opt_state[1].trace, sep="/")
    assert {path: not np.any(v) for path, v in trace.items()} == {
        path: matches(freeze, path) for path in trace
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
    second = moved["batch_stats"]["second"]["mean"]
    np.testing.assert_allclose(second, 0.01 * first.mean(0), rtol=1e-4)
    # And nothing is left of it afterwards.
    y, moved = model.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(np.mean(y, 0), 0, atol=1e-5)
    assert np.all(moved["batch_stats"]["first"]["mean"])


def test_what_is_frozen_costs_no_gradient():
    def flops(freeze):
        state, step = start(freeze)
        compiled = step.lower(state, make_batch(), jax.random.key(0)).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(("(?!fc)",)) < 0.45 * flops(())  # forward alone is a third
