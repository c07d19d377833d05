"""What a phase of training runs on: crops, or what a frozen start of the network makes of them."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxcells.data.arrays import SplitArrays
from jaxcells.data.loader import Batch, train_batches
from jaxcells.training.activations import keep_activations, symmetric_batches
from jaxcells.training.augment import draw_symmetries
from jaxcells.training.freeze import frozen_prefix
from jaxcells.training.state import TrainState
from jaxcells.training.steps import Normalize

logger = logging.getLogger("jaxcells")

_NUM_SYMMETRIES = 8  # of the square


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the steps of a phase are fed with.

    Attributes:
      batches: from a step to the batches of training from there on.
      validation: array [N, ...].
      normalize: what the steps apply to both first.
      dihedral: whether the training step is to draw flips and quarter turns.
      first_segment: of the network, to run.
      activations_s: seconds that computing the activations took, whenever that was.
      compile_s: seconds of compilation before.
    """

    batches: Callable[[int], Iterator[Batch]]
    validation: np.ndarray
    normalize: Normalize
    dihedral: bool
    first_segment: int = 0
    activations_s: float = 0.0
    compile_s: float = 0.0


def make_inputs(
    model: nn.Module,
    state: TrainState,
    freeze: Sequence[str],
    arrays: Mapping[str, SplitArrays],
    normalize: Normalize,
    *,
    dihedral: bool,
    intensity: float,
    batch_size: int,
    rows: slice,
    seed: int,
    step_key: jax.Array,
    num_epochs: int,
    directory: Path,
    fingerprint: str,
    check_stop: Callable[[], None],
) -> Inputs:
    """Chooses between crops and kept activations, computes the latter, and says so in a line.

    Activations are kept where the first segments of the network are frozen and their input does
    not change at random, or by flips and quarter turns alone.

    Args:
      model: the network.
      state: its parameters, on the devices.
      freeze: regular expressions over the paths of frozen parameters.
      arrays: "train" and "val".
      normalize: raw images to float32 images.
      dihedral: whether crops are flipped and turned at random.
      intensity: by how much their brightness changes at random.
      batch_size: B, over all devices.
      rows: the rows of every batch that this process holds.
      seed: of the order.
      step_key: the key of the whole run that training steps are given.
      num_epochs: how long the whole phase is, also for a run that resumes within it: what is
        chosen must not depend on where that was.
      directory: where activations are kept.
      fingerprint: stands for the crops.
      check_stop: called between batches of computing activations; may raise.
    """
    train_set, val_set = arrays["train"], arrays["val"]

    def batches(images: np.ndarray, first_step: int) -> Iterator[Batch]:
        return train_batches(
            images, train_set.labels, batch_size, seed=seed, first_step=first_step, rows=rows
        )

    crops = Inputs(
        functools.partial(batches, train_set.images), val_set.images, normalize, dihedral
    )
    num_segments = frozen_prefix(model.segments, state.params, freeze)
    if not num_segments:
        return crops
    names = [name for segment in model.segments[:num_segments] for name in segment]
    frozen = f"{names[0]} to {names[-1]} are frozen"
    num_symmetries = _NUM_SYMMETRIES if dihedral else 1
    if intensity:
        logger.info("%s, and computed in every step: brightness changes at random", frozen)
        return crops
    if num_epochs < num_symmetries:
        logger.info(
            "%s, and computed in every step: the %d symmetries of every crop would take longer "
            "than %d epochs",
            *(frozen, num_symmetries, num_epochs),
        )
        return crops
    kept = keep_activations(
        model,
        state.variables,
        num_segments,
        normalize,
        {"train": train_set.images, "val": val_set.images},
        directory,
        batch_size=batch_size,
        fingerprint=fingerprint,
        num_symmetries={"train": num_symmetries},
        check_stop=check_stop,
    )
    if kept is None:
        logger.info("%s, and computed in every step: the disk has no room", frozen)
        return crops
    size = sum(array.nbytes for array in kept.arrays.values()) / 1e6
    logger.info("%s: what they make of every crop is computed once (%.0f MB)", frozen, size)

    num_images, activations = len(train_set.labels), kept.arrays["train"]
    draw = jax.jit(lambda step: draw_symmetries(jax.random.fold_in(step_key, step), batch_size))

    def symmetric(first_step: int) -> Iterator[Batch]:
        return symmetric_batches(
            batches(np.arange(num_images), first_step),
            activations,
            num_images,
            lambda step: np.asarray(draw(step)),
            first_step=first_step,
            rows=rows,
        )

    return Inputs(
        symmetric if dihedral else functools.partial(batches, activations),
        kept.arrays["val"],
        _as_it_is,
        dihedral=False,
        first_segment=num_segments,
        activations_s=kept.seconds,
        compile_s=kept.compile_s,
    )


def _as_it_is(activations: Any) -> Any:
    return activations
