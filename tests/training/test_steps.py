import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcells.models import create_model
from jaxcells.training import optim
from jaxcells.training.state import create_train_state, inference_state, state_of
from jaxcells.training.steps import (
    cross_entropy,
    make_eval_step,
    make_predict_step,
    make_train_step,
)


class Tiny(nn.Module):
    """Convolution, batch norm, relu, mean over pixels, linear classifier."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(momentum=0.9, name="bn")(x, use_running_average=not train)
        return nn.Dense(3, name="fc")(nn.relu(x).mean((1, 2)))


class Linear(nn.Module):
    """Softmax regression on the pixels: its gradient is known in closed form."""

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(3, use_bias=False, name="fc")(x.reshape(len(x), -1))


def normalize(images):
    return images.astype(jnp.float32) / 255 - 0.5


train_step = jax.jit(make_train_step(normalize))
eval_step = jax.jit(make_eval_step(normalize))
predict_step = jax.jit(make_predict_step(normalize, has_segments=False))


@functools.cache
def tiny_state(model=None, *, momentum=0.9):
    schedule = optim.make_schedule("constant", 0.1, 1)
    tx = optim.make_optimizer(schedule, momentum=momentum)
    return create_train_state(model or Tiny(), tx, sample_shape=(1, 8, 8, 1), key=jax.random.key(0))


def make_batch(num=8, *, seed=0, dtype=np.uint8):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, np.iinfo(dtype).max, (num, 8, 8, 1), dtype, endpoint=True),
        "label": rng.integers(0, 3, num).astype(np.int32),
        "mask": np.ones(num, np.float32),
    }


def padded(batch, num):
    """Adds `num` rows with other images and labels and mask 0."""
    other = make_batch(num, seed=99)
    other["mask"][:] = 0
    return {name: np.concatenate([batch[name], other[name]]) for name in batch}


def assert_trees_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


def assert_trees_close(actual, expected):
    """For what two programs computed, which round differently."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, 1e-5, 1e-6)


# State


def test_other_variables_come_with_a_new_optimiser_state():
    new = tiny_state()
    trained, _ = train_step(new, make_batch(), jax.random.key(0))
    ported = jax.tree.map(lambda x: x + 1, trained.variables)
    fresh = state_of(new.apply_fn, new.tx, ported)
    assert_trees_equal(fresh.variables, ported)
    assert_trees_equal(fresh.opt_state, new.tx.init(ported["params"]))
    for step in (new.step, fresh.step):  # an array, or the step is compiled twice
        assert (step.dtype, step.weak_type, int(step)) == (jnp.int32, False, 0)


# Objective


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, [0.5, 1.0, 4.0]])
def test_cross_entropy_is_that_of_torch(label_smoothing, class_weights):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((6, 3)), rng.integers(0, 3, 6)
    mask = np.array([1, 1, 1, 1, 0, 0], np.float32)
    w = np.ones(3) if class_weights is None else np.array(class_weights)

    # The sum as the documentation of torch.nn.CrossEntropyLoss has it, example by example.
    numerator = denominator = 0.0
    for n in range(4):
        log_p = logits[n] - np.log(np.exp(logits[n]).sum())
        y = labels[n]
        numerator += (1 - label_smoothing) * -w[y] * log_p[y]
        numerator += label_smoothing / 3 * -(w * log_p).sum()
        denominator += w[y]

    settings = {"label_smoothing": label_smoothing, "class_weights": class_weights}
    actual = cross_entropy(jnp.asarray(logits, jnp.float32), labels, mask, **settings)
    np.testing.assert_allclose(actual, numerator / denominator, rtol=1e-6)


# Training


def test_one_update_is_gradient_descent_on_the_rows_that_count():
    state = tiny_state(Linear(), momentum=0.0)
    batch = padded(make_batch(5), 3)
    updated, sums = train_step(state, batch, jax.random.key(0))

    kernel = np.asarray(state.params["fc"]["kernel"], np.float64)
    x = batch["image"][:5].reshape(5, -1) / 255 - 0.5
    y = np.eye(3)[batch["label"][:5]]
    p = np.exp(x @ kernel) / np.exp(x @ kernel).sum(1, keepdims=True)
    expected = kernel - 0.1 * x.T @ (p - y) / 5
    np.testing.assert_allclose(updated.params["fc"]["kernel"], expected, atol=1e-6)
    assert int(updated.step) == 1
    np.testing.assert_allclose(sums["loss"], -(y * np.log(p)).sum(), rtol=1e-5)
    assert int(sums["correct"]) == (p.argmax(1) == batch["label"][:5]).sum()
    assert int(sums["count"]) == 5


def test_reported_loss_is_plain_cross_entropy_whatever_the_objective():
    state, batch, key = tiny_state(), make_batch(), jax.random.key(0)
    plain, plain_sums = train_step(state, batch, key)
    weighted_step = make_train_step(normalize, label_smoothing=0.2, class_weights=(1, 2, 3))
    other, other_sums = jax.jit(weighted_step)(state, batch, key)
    assert_trees_close(other_sums, plain_sums)
    assert not np.array_equal(other.params["fc"]["bias"], plain.params["fc"]["bias"])


def test_training_updates_the_running_statistics_by_the_momentum_rule():
    state, batch = tiny_state(), make_batch()
    updated, _ = train_step(state, batch, jax.random.key(0))
    features = nn.Conv(4, (3, 3)).apply({"params": state.params["conv"]}, normalize(batch["image"]))
    expected = 0.9 * 0 + 0.1 * features.mean((0, 1, 2))
    np.testing.assert_allclose(updated.batch_stats["bn"]["mean"], expected, atol=1e-6)


def test_augmentation_is_drawn_from_the_key_and_the_step():
    state, batch, key = tiny_state(), make_batch(), jax.random.key(0)
    step = jax.jit(make_train_step(normalize, augmentation={"dihedral": True, "intensity": 0.5}))
    first, again = step(state, batch, key)[0], step(state, batch, key)[0]
    assert_trees_equal(first, again)
    later = step(state.replace(step=jnp.int32(1)), batch, key)[0]
    assert not np.array_equal(first.params["conv"]["kernel"], later.params["conv"]["kernel"])


# Evaluation


def test_eval_totals_do_not_depend_on_how_the_split_is_cut_nor_on_what_fills_it_up():
    state, split = tiny_state(), make_batch(10)
    whole = eval_step(state, split)
    rest = padded({name: rows[6:] for name, rows in split.items()}, 2)
    rest["image"] = rest["image"].astype(np.float32)
    rest["image"][4:] = np.nan
    first = {name: rows[:6] for name, rows in split.items()}
    total = jax.tree.map(jnp.add, eval_step(state, first), eval_step(state, rest))
    np.testing.assert_allclose(total.pop("loss"), whole.pop("loss"), rtol=1e-6)
    assert_trees_equal(total, whole)
    assert int(whole["count"]) == 10


def test_confusion_has_a_row_for_each_true_class():
    state = tiny_state()
    always_1 = {**state.params["fc"], "bias": jnp.array([-100.0, 100.0, -100.0])}
    state = state.replace(params={**state.params, "fc": always_1})
    batch = padded(make_batch(6), 2)
    batch["label"][:6] = [0, 0, 0, 1, 2, 2]
    sums = eval_step(state, batch)
    np.testing.assert_array_equal(sums["confusion"], [[0, 3, 0], [0, 1, 0], [0, 2, 0]])
    assert (int(sums["correct"]), int(sums["count"])) == (1, 6)
    assert sums["confusion"].dtype == jnp.int32


def test_prediction_and_evaluation_need_no_optimiser():
    state, batch = tiny_state(), make_batch(4, dtype=np.uint16)
    bare = inference_state(Tiny(), state.variables)
    assert not jax.tree.leaves(bare.opt_state)
    logits = state.apply_fn(state.variables, normalize(batch["image"]), train=False)
    outputs = predict_step(bare, {"image": batch["image"]})
    np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-5)
    assert outputs["logits"].dtype == jnp.float32
    assert_trees_equal(eval_step(bare, batch), eval_step(state, batch))


def test_features_are_what_the_head_of_the_network_sees():
    model, images = create_model("resnet18", num_classes=3, width=4), np.full((2, 32, 32, 3), 0.5)
    variables = model.init(jax.random.key(0), images, train=False)
    step = make_predict_step(lambda images: images)
    outputs = step(inference_state(model, variables), {"image": images})
    head = variables["params"]["fc"]
    assert outputs["features"].shape == (2, 32)
    expected = outputs["features"] @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-5)
    whole = model.apply(variables, images, train=False)
    np.testing.assert_allclose(outputs["logits"], whole, rtol=1e-5)
