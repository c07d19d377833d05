import numpy as np
import pytest

from jaxcells.training.optim import make_optimizer, make_schedule

# Of a norm stacked by a scan over layers, the scale has two axes as well.
SHAPES = {"kernel": (3, 4), "bias": (4,), "scale": (3, 4)}


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


@pytest.mark.parametrize(
    ("schedule", "momentum", "decay"),
    [("constant", 0.9, 0.0), ("constant", 0.0, 0.1), ("cosine", 0.9, 0.1)],
)
def test_updates_are_those_of_torch_with_decay_of_kernels_alone(schedule, momentum, decay):
    rng = np.random.default_rng(0)
    params, *grads = (
        {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()} for _ in range(9)
    )
    rates = [0.05] * 8
    if schedule == "cosine":
        rates = [0.05 * 0.5 * (1 + np.cos(np.pi * t / 8)) for t in range(8)]
    weight_decay = {"kernel": decay, "bias": 0.0, "scale": 0.0}
    expected = torch_sgd(params, grads, rates, momentum=momentum, weight_decay=weight_decay)

    rate = make_schedule(schedule, 0.05, 8)
    tx = make_optimizer(rate, momentum=momentum, weight_decay=decay)
    opt_state = tx.init({"bn1": params})
    for step_grads in grads:
        updates, opt_state = tx.update({"bn1": step_grads}, opt_state, {"bn1": params})
        params = {n: params[n] + updates["bn1"][n] for n in params}
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=2e-6, atol=2e-7)


def test_multipliers_scale_the_update_and_the_first_match_counts():
    factors = {"conv1": 1.0, "layer3_0": 0.0, "layer4_0": 0.5, "fc": 10.0}
    ones = {layer: {"kernel": np.ones(1, np.float32)} for layer in factors}
    multipliers = (("fc", 10.0), ("layer4_0", 0.5), ("layer", 0.0), ("f", 99.0))
    schedule = make_schedule("constant", 0.125, 1)
    tx = make_optimizer(schedule, multipliers=multipliers)
    updates, _ = tx.update(ones, tx.init(ones), ones)
    assert {layer: float(u["kernel"][0]) / -0.125 for layer, u in updates.items()} == factors
