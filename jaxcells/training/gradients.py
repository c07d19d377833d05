"""How the gradient fares on its way back: its norm in every layer, before and after some training.

What is measured is the gradient that a training step makes its update from: a link in front of the
optimiser writes the norms into its state, so that the step of `training.steps` serves unchanged.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from jaxcells.training.state import TrainState
from jaxcells.training.steps import Batch, TrainStep


class RecordedNorms(NamedTuple):
    """What `record_norms` keeps: the L2 norm of every kernel's gradient, and of the kernel.

    Attributes:
      gradient: {layer: float32 scalar}.
      weight: {layer: float32 scalar}, before the update.
    """

    gradient: dict[str, jax.Array]
    weight: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One network in one state, on one batch.

    Attributes:
      step: number of updates made before.
      loss: mean cross entropy of the batch, natural logarithm.
      gradient_norms: L2 norm of the loss's gradient with respect to each layer's kernel, by layer.
      weight_norms: L2 norm of the kernel itself.
    """

    step: int
    loss: float
    gradient_norms: Mapping[str, float]
    weight_norms: Mapping[str, float]


def kernel_norms(tree: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns the L2 norm of every kernel, of convolutions and the head, by the layer's name.

    Args:
      tree: parameters, or gradients of the same form.
    """
    leaves = flatten_dict(tree, sep="/")
    return {
        path.removesuffix("/kernel"): jnp.linalg.norm(leaf.ravel())
        for path, leaf in leaves.items()
        if path.endswith("/kernel")
    }


def record_norms() -> optax.GradientTransformation:
    """Makes a first link for a chain of transformations, which passes gradients on as they are.

    Its state is the `RecordedNorms` of the last gradients that it saw.
    """

    def init(params: Any) -> RecordedNorms:
        zeros = jax.tree.map(jnp.zeros_like, kernel_norms(params))
        return RecordedNorms(zeros, zeros)

    def update(updates: Any, state: RecordedNorms, params: Any) -> tuple[Any, RecordedNorms]:
        return updates, RecordedNorms(kernel_norms(updates), kernel_norms(params))

    return optax.GradientTransformation(init, update)


def measure_gradients(
    state: TrainState,
    train_step: TrainStep,
    batches: Iterator[Batch],
    *,
    num_steps: int,
    key: jax.Array,
) -> tuple[list[Measurement], list[float]]:
    """Trains, and measures on the first batch before the first step and after the last.

    Values that are not finite are measured like any other: nothing stops when a network diverges.

    Args:
      state: at step 0, with an optimiser of `optax.chain(record_norms(), ...)`. Donated if
        `train_step` donates it.
      train_step: from `steps.make_train_step`.
      batches: endless.
      num_steps: number of updates, 1 or more.
      key: random key of `train_step`.

    Returns:
      Both measurements, and the loss of every step's batch before its update, `[num_steps]`.
    """
    first = next(batches)
    measured, losses = [], []
    schedule = itertools.chain([first], itertools.islice(batches, num_steps - 1), [first])
    for step, batch in enumerate(schedule):
        state, sums = train_step(state, batch, key)
        losses.append(float(sums["loss"] / sums["count"]))
        if step in (0, num_steps):
            norms = jax.device_get(state.opt_state[0])
            measured.append(
                Measurement(step, losses[-1], *({k: float(v) for k, v in d.items()} for d in norms))
            )
    return measured, losses[:-1]


def depths(layers: Iterable[str]) -> dict[str, int | None]:
    """Returns the place of every layer on the way from image to logits, 1 for the first.

    The layers come in that order. Projections lie on shortcuts, beside that way: they follow at
    the end, with None.

    Args:
      layers: names as torchvision has them: `conv1`, `layer1_0/conv1`, …, `fc`.
    """

    def place(layer: str) -> tuple[bool, list[str | int]]:
        parts = re.split(r"(\d+)", layer)
        return layer == "fc", [int(part) if part.isdigit() else part for part in parts]

    layers = sorted(layers, key=place)
    projections = [layer for layer in layers if "downsample" in layer]
    path = [layer for layer in layers if layer not in projections]
    numbers: dict[str, int | None] = {layer: depth for depth, layer in enumerate(path, start=1)}
    return numbers | dict.fromkeys(projections)
