"""The pure functions that run on the device: one training step, one evaluation, one prediction.

Each is made by a function that takes what stays the same for a whole run, and is compiled by
`jaxcells.training.mesh`. A batch is

    {"image": [B, H, W, C] uint8 | uint16 | float32 as stored, "label": int32 [B],
     "mask": float32 [B], 1 for an example and 0 for a row that fills up the batch}

and `normalize` takes its images to float32 `[B, H, W, C']`, the same in all three.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcells.training.augment import augment
from jaxcells.training.freeze import frozen_norms, map_with_path, matches
from jaxcells.training.state import TrainState

Batch = dict[str, jax.Array]
Totals = dict[str, jax.Array]
Normalize = Callable[[Any], Any]
TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Totals]]
EvalStep = Callable[[TrainState, Batch], Totals]
PredictStep = Callable[[TrainState, Batch], dict[str, jax.Array]]


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> jax.Array:
    """The training objective, with the meaning of `torch.nn.CrossEntropyLoss`.

    With targets `q = (1 - label_smoothing) onehot(y) + label_smoothing / K` (Szegedy et al. 2016,
    section 7) and class weights `w`, example n costs `-sum_k w_k q_nk log p_nk`, and the mean is
    taken with weights `w_(y_n)`.

    Args:
      logits: `[B, K]`.
      labels: int32 `[B]`.
      mask: float32 `[B]`; at least one row must count.
      label_smoothing: share of the target that is spread over all classes.
      class_weights: `[K]`; None for all equal.

    Returns:
      float32 scalar.
    """
    num_classes = logits.shape[-1]
    weights = jnp.ones(num_classes) if class_weights is None else jnp.asarray(class_weights)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), weights * targets)
    counts = mask > 0
    return jnp.sum(losses, where=counts) / jnp.sum(weights[labels], where=counts)


def make_train_step(
    normalize: Normalize,
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] | None = None,
    augmentation: Mapping[str, Any] | None = None,
    freeze: tuple[str, ...] = (),
) -> TrainStep:
    """Makes `train_step(state, batch, rng) -> (state, totals)`: one update by gradient descent.

    `rng` is the key of the whole run: each step folds its number in, so that a resumed run draws
    what an uninterrupted one would have drawn. The totals are those of `make_eval_step` without the
    confusion matrix: *plain* cross entropy, whatever the objective, so that the curves of training
    and validation show the same quantity. They stay on the device until somebody reads them.

    Rows with mask 0 add nothing to the objective, but batch norm in training mode takes its
    statistics over all rows: fill up a training batch with images of the training split.

    Args:
      normalize: raw images to float32 images.
      label_smoothing: see `cross_entropy`.
      class_weights: see `cross_entropy`.
      augmentation: {name: strength}, see `augment`; None for none.
      freeze: regular expressions over parameter paths: these parameters stay bit for bit, and so
        do the running statistics of the norms among them (see `training.freeze`). The optimiser
        of the state must know of them too.
    """

    def updated(path: str, param: jax.Array, update: jax.Array) -> jax.Array:
        return param if matches(freeze, path) else param + update

    def train_step(state: TrainState, batch: Batch, rng: jax.Array) -> tuple[TrainState, Totals]:
        images = normalize(batch["image"])
        images = augment(images, jax.random.fold_in(rng, state.step), **(augmentation or {}))

        def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            variables = {**state.variables, "params": params}
            with frozen_norms(freeze):
                logits, moved = state.apply_fn(variables, images, train=True, mutable="batch_stats")
            labels, mask = batch["label"], batch["mask"]
            loss = cross_entropy(logits, labels, mask, label_smoothing, class_weights)
            return loss, (logits, moved.get("batch_stats", {}))

        grads, (logits, batch_stats) = jax.grad(objective, has_aux=True)(state.params)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
        state = state.replace(
            step=state.step + 1,
            params=map_with_path(updated, state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, _totals(logits, batch)

    return train_step


def make_eval_step(normalize: Normalize) -> EvalStep:
    """Makes `eval_step(state, batch) -> totals` over the rows with mask 1.

    The totals of all batches, added up, divided by the added-up count, are exact means over the
    split, however it was cut into batches:

        loss: float32, summed cross entropy (natural logarithm, no weights, no smoothing)
        correct, count: int32
        confusion: int32 `[K, K]`, row = true class, column = predicted class

    Only the parameters and statistics of the state are used.

    Args:
      normalize: raw images to float32 images.
    """

    def eval_step(state: TrainState, batch: Batch) -> Totals:
        logits = state.apply_fn(state.variables, normalize(batch["image"]), train=False)
        num_classes = logits.shape[-1]
        true = jax.nn.one_hot(batch["label"], num_classes, dtype=jnp.int32)
        predicted = jax.nn.one_hot(logits.argmax(-1), num_classes, dtype=jnp.int32)
        true = jnp.where(batch["mask"][:, None] > 0, true, 0)
        return {**_totals(logits, batch), "confusion": true.T @ predicted}

    return eval_step


def make_predict_step(normalize: Normalize, *, has_segments: bool = True) -> PredictStep:
    """Makes `predict_step(state, batch) -> {"logits": [B, K], "features": [B, D]}`, both float32.

    Every row is predicted, those with mask 0 too; `label` and `mask` may be left out of the batch.

    Args:
      normalize: raw images to float32 images.
      has_segments: whether the network can be run in parts (see `ResNet`). The features are then
        what its head sees, else the logits.
    """

    def predict_step(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        images = normalize(batch["image"])
        if has_segments:
            features = state.apply_fn(state.variables, images, train=False, last=-1)
            logits = state.apply_fn(state.variables, features, train=False, first=-1)
        else:
            features = logits = state.apply_fn(state.variables, images, train=False)
        return {"logits": logits.astype(jnp.float32), "features": features.astype(jnp.float32)}

    return predict_step


def _totals(logits: jax.Array, batch: Batch) -> Totals:
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), batch["label"]
    )
    counts = batch["mask"] > 0
    return {
        "loss": jnp.sum(losses, where=counts),
        "correct": jnp.sum(logits.argmax(-1) == batch["label"], where=counts, dtype=jnp.int32),
        "count": jnp.sum(counts, dtype=jnp.int32),
    }
