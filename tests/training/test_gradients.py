import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcells.models import create_model
from jaxcells.models.resnet import BasicBlock, ResNet
from jaxcells.training import optim
from jaxcells.training.gradients import depths, kernel_norms, measure_gradients, record_norms
from jaxcells.training.state import create_train_state
from jaxcells.training.steps import cross_entropy, make_train_step

LEARNING_RATE = 0.1


class Linear(nn.Module):
    """Softmax regression on the pixels: its gradient is known in closed form."""

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(3, name="fc")(x.reshape(len(x), -1))


def normalize(images):
    return images.astype(jnp.float32) / 255 - 0.5


def make_state(model, *, channels=1, size=4):
    tx = optim.make_optimizer(
        optim.make_schedule("constant", learning_rate=LEARNING_RATE, num_steps=1), momentum=0.9
    )
    return create_train_state(
        model,
        optax.chain(record_norms(), tx),
        sample_shape=(1, size, size, channels),
        key=jax.random.key(0),
    )


def make_batch(seed, *, channels=1, size=4):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 255, (6, size, size, channels), np.uint8),
        "label": rng.integers(0, 3, 6).astype(np.int32),
        "mask": np.array([1, 1, 1, 1, 1, 0], np.float32),
    }


def softmax_regression(kernel, bias, batch):
    """Loss and gradients of `Linear` in NumPy."""
    x = (batch["image"].reshape(6, -1) / 255 - 0.5)[:5]
    y = np.eye(3)[batch["label"][:5]]
    p = np.exp(x @ kernel + bias)
    p /= p.sum(axis=1, keepdims=True)
    return -np.log((p * y).sum(1)).mean(), x.T @ (p - y) / 5, (p - y).mean(axis=0)


def test_both_measurements_are_of_the_first_batch():
    state = make_state(Linear())
    kernel, bias = (np.array(state.params["fc"][name], float) for name in ("kernel", "bias"))
    batches = [make_batch(seed) for seed in range(3)]
    measured, losses = measure_gradients(
        state,
        jax.jit(make_train_step(normalize)),
        itertools.cycle(batches),
        num_steps=3,
        key=jax.random.key(1),
    )

    expected, trace, velocity = [], [], [0.0, 0.0]
    for batch in [*batches, batches[0]]:
        loss, *gradients = softmax_regression(kernel, bias, batch)
        trace.append(loss)
        expected.append((loss, np.linalg.norm(gradients[0]), np.linalg.norm(kernel)))
        velocity = [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
        kernel, bias = kernel - LEARNING_RATE * velocity[0], bias - LEARNING_RATE * velocity[1]

    assert [m.step for m in measured] == [0, 3]
    for measurement, (loss, gradient_norm, weight_norm) in zip(
        measured, [expected[0], expected[3]], strict=True
    ):
        assert measurement.loss == pytest.approx(loss, rel=1e-5)
        assert measurement.gradient_norms == {"fc": pytest.approx(gradient_norm, rel=1e-5)}
        assert measurement.weight_norms == {"fc": pytest.approx(weight_norm, rel=1e-5)}
    assert losses == pytest.approx(trace[:3], rel=1e-5)


def test_a_network_that_diverges_is_measured_all_the_same():
    batch = make_batch(0)
    huge = lambda images: normalize(images) * 1e30  # noqa: E731
    measured, losses = measure_gradients(
        make_state(Linear()),
        jax.jit(make_train_step(huge)),
        itertools.repeat(batch),
        num_steps=3,
        key=jax.random.key(1),
    )
    assert np.isfinite(losses[0])
    assert not np.isfinite(losses[-1])
    assert not np.isfinite(measured[1].loss)
    assert not np.isfinite(measured[1].gradient_norms["fc"])


def test_recorded_norms_are_those_of_the_gradient():
    model = ResNet((1,), BasicBlock, num_classes=3, width=2)
    state = make_state(model, channels=3, size=32)
    batch = make_batch(0, channels=3, size=32)

    def loss(params):
        logits, _ = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            normalize(batch["image"]),
            train=True,
            mutable=["batch_stats"],
        )
        return cross_entropy(logits, batch["label"], batch["mask"])

    gradients = jax.jit(jax.grad(loss))(state.params)
    after, _ = jax.jit(make_train_step(normalize))(state, batch, jax.random.key(1))
    recorded = after.opt_state[0]
    assert set(recorded.gradient) == {"conv1", "layer1_0/conv1", "layer1_0/conv2", "fc"}
    for layer, norm in recorded.gradient.items():
        kernel, gradient = state.params, gradients
        for name in (*layer.split("/"), "kernel"):
            kernel, gradient = kernel[name], gradient[name]
        assert norm == pytest.approx(np.sqrt(np.sum(np.square(gradient, dtype=float))), rel=1e-4)
        weight_norm = np.sqrt(np.sum(np.square(kernel, dtype=float)))
        assert recorded.weight[layer] == pytest.approx(weight_norm, rel=1e-5)


def test_gradients_pass_the_record_unchanged():
    params = {"fc": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    gradients = jax.tree.map(lambda p: 3 * p, params)
    tx = record_norms()
    updates, state = tx.update(gradients, tx.init(params), params)
    assert updates is gradients
    assert state.gradient == {"fc": 6}
    assert state.weight == {"fc": 2}


@pytest.mark.parametrize(
    ("name", "last_convolution", "projections"),
    [("plain34", "layer4_2/conv2", []), ("resnet50", "layer4_2/conv3", [1, 2, 3, 4])],
)
def test_depth_counts_layers_in_the_order_of_the_computation(name, last_convolution, projections):
    model = create_model(name, num_classes=3, width=2)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    numbers = depths(reversed(jax.eval_shape(kernel_norms, variables["params"])))
    path = {layer: depth for layer, depth in numbers.items() if depth is not None}
    assert list(path.values()) == list(range(1, int(name[-2:]) + 1))
    assert list(path)[:3] == ["conv1", "layer1_0/conv1", "layer1_0/conv2"]
    assert list(path)[-2:] == [last_convolution, "fc"]
    assert list(numbers)[len(path) :] == [f"layer{s}_0/downsample_conv" for s in projections]


def test_the_tenth_block_comes_after_the_second():
    assert list(depths(["layer3_10/conv1", "layer3_2/conv1", "fc", "conv1"])) == [
        *("conv1", "layer3_2/conv1", "layer3_10/conv1", "fc"),
    ]
