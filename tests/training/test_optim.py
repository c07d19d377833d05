import jax
import numpy as np
import pytest

from jaxcells import Error
from jaxcells.training.optim import make_optimizer, make_schedule


def torch_sgd(params, grads, rates, *, momentum, weight_decay):
    """What torch.optim.SGD(dampening=0, nesterov=False) documents, in float64."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    velocity = None
    for step_grads, rate in zip(grads, rates, strict=True):
        decayed = {n: g + weight_decay[n] * params[n] for n, g in step_grads.items()}
        if velocity is None:
            velocity = decayed
        else:
            velocity = {n: momentum * velocity[n] + decayed[n] for n in decayed}
        params = {n: params[n] - rate * velocity[n] for n in params}
    return params


@pytest.mark.parametrize("schedule_name", ["constant", "cosine"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_those_of_torch(schedule_name, weight_decay):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,)}
    params = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    grads = [
        {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(6)
    ]
    rates = [0.05] * 6
    if schedule_name == "cosine":
        rates = [0.05 * 0.5 * (1 + np.cos(np.pi * t / 8)) for t in range(6)]
    expected = torch_sgd(
        params, grads, rates, momentum=0.9, weight_decay={"kernel": weight_decay, "bias": 0.0}
    )

    tx = make_optimizer(
        make_schedule(schedule_name, learning_rate=0.05, num_steps=8),
        momentum=0.9,
        weight_decay=weight_decay,
    )
    opt_state = tx.init(params)
    for step_grads in grads:
        updates, opt_state = tx.update(step_grads, opt_state, params)
        params = {n: params[n] + updates[n] for n in params}
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=2e-6, atol=1e-7)


def test_the_rate_is_not_part_of_the_state():
    params = {"kernel": np.ones((2, 2), np.float32)}
    grads = {"kernel": np.ones((2, 2), np.float32)}
    fast, slow = (
        make_optimizer(make_schedule("constant", learning_rate=rate, num_steps=1), momentum=0.9)
        for rate in (1.0, 0.25)
    )
    updates, _ = slow.update(grads, fast.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], -0.25)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(fast.init(params))]
    assert names == ["[1].trace['kernel']", "[2].count"]


def test_decay_reaches_kernels_and_no_stacked_norms():
    params = {
        "layer1_rest": {"bn1": {"scale": np.ones((3, 4), np.float32)}},
        "fc": {"kernel": np.ones((3, 4), np.float32), "bias": np.ones(4, np.float32)},
    }
    schedule = make_schedule("constant", learning_rate=1.0, num_steps=1)
    tx = make_optimizer(schedule, momentum=0.0, weight_decay=0.5)
    updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    np.testing.assert_array_equal(updates["fc"]["kernel"], -0.5)
    np.testing.assert_array_equal(updates["fc"]["bias"], 0)
    np.testing.assert_array_equal(updates["layer1_rest"]["bn1"]["scale"], 0)


def test_cosine_ends_at_zero():
    schedule = make_schedule("cosine", learning_rate=0.2, num_steps=10)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [0.2, 0.1, 0], atol=1e-7)


def test_an_unknown_schedule_is_refused_with_those_that_work():
    with pytest.raises(Error, match=r"'linear'.*optim.schedule=constant.*=cosine"):
        make_schedule("linear", learning_rate=0.1, num_steps=1)
