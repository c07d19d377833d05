"""What training runs on: crops, or what a frozen start of the network makes of them.

Where the first segments of a network are frozen and nothing random touches their input, they give
the same features for a crop in every epoch. These are computed once for all crops and
memory-mapped, and the steps of training and validation then run the rest of the network on them
alone. Random flips and quarter turns are no obstacle: a crop has eight of them, and the features of
each are kept.

Features live as long as the process: a run that goes on computes them again.
"""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxcells.data.arrays import create_array
from jaxcells.files import logger
from jaxcells.training import mesh
from jaxcells.training.augment import NUM_SYMMETRIES, apply_symmetries
from jaxcells.training.freeze import frozen_prefix
from jaxcells.training.recipe import Recipe
from jaxcells.training.steps import Normalize


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the steps of a phase run on: crops, or features of them on disk.

    Attributes:
      train: [N, ...]; with symmetries [8 N, ...], where symmetry s of image i is row s * N + i.
      val: [N, ...].
      normalize: what the steps apply to both first.
      first_segment: of the network, to run.
      has_symmetries: whether the rows are drawn, instead of flips and turns in the step.
      features_s: seconds that computing the features took.
      compile_s: seconds of compilation before.
    """

    train: np.ndarray
    val: np.ndarray
    normalize: Normalize
    first_segment: int = 0
    has_symmetries: bool = False
    features_s: float = 0.0
    compile_s: float = 0.0


def make_inputs(
    model: nn.Module,
    variables: Mapping[str, Any],
    crops: Inputs,
    recipe: Recipe,
    num_epochs: int,
    directory: Path,
    *,
    before: bool | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Inputs:
    """Chooses between crops and features, computes the latter, and says so in a line.

    Features are kept where the first segments of the network are frozen and their input does not
    change at random, or by flips and quarter turns alone. The two differ in the last bits, so the
    choice is the same for a run that goes on as for one that was never stopped.

    Args:
      model: the network.
      variables: its parameters and statistics, on the devices.
      crops: what to run on otherwise.
      recipe: of the run.
      num_epochs: for how many epochs `recipe.freeze` is frozen, those before a resumed run was
        stopped included.
      directory: where features are kept, memory-mapped, in the dtype of the computation.
      before: whether a resumed run had features; None if it begins.
      check_stop: called before every batch of computing features; may raise.

    Raises:
      OSError: a resumed run had features, and the disk has no room for them now.
    """
    if not hasattr(model, "segments"):
        logger.info("what is frozen is computed in every step: the network has no segments")
        return crops
    num_segments = frozen_prefix(model.segments, variables["params"], recipe.freeze)
    if not num_segments:
        return crops
    names = [name for segment in model.segments[:num_segments] for name in segment]
    frozen = f"{names[0]} to {names[-1]} are frozen"

    def keep_crops(why: str) -> Inputs:
        logger.info("%s, and computed in every step: %s", frozen, why)
        return crops

    # Any augmentation but the one whose results are few enough to be kept.
    active = {name for name, strength in recipe.augmentation.items() if strength}
    if others := active - {"dihedral"}:
        return keep_crops(f"{', '.join(sorted(others))} changes crops at random")
    if active and num_epochs < NUM_SYMMETRIES:
        return keep_crops(
            f"the {NUM_SYMMETRIES} symmetries of every crop would take longer than "
            f"{num_epochs} epochs"
        )
    devices = mesh.make_mesh()
    batch_size, rows = recipe.batch_size, mesh.local_rows(recipe.batch_size, devices)

    def forward(variables: Any, batch: Any) -> Any:
        inputs = apply_symmetries(crops.normalize(batch["image"]), batch["symmetry"])
        return model.apply(variables, inputs, train=False, last=num_segments)

    def make_batch(images: np.ndarray, first: int) -> dict[str, jax.Array]:
        # Rows past the end hold anything.
        symmetry, image = np.divmod(np.arange(first, first + batch_size)[rows], len(images))
        batch = {"image": images[image], "symmetry": symmetry.astype(np.int32)}
        return mesh.shard_batch(batch, devices)

    example = make_batch(crops.train, 0)
    feature = jax.eval_shape(forward, variables, example)
    repeats = NUM_SYMMETRIES if active else 1
    num_rows = repeats * len(crops.train) + len(crops.val)
    size = num_rows * math.prod(feature.shape[1:]) * feature.dtype.itemsize
    has_room = mesh.of_primary(not mesh.is_primary() or _make_room(directory, size))
    if not (has_room if before is None else before):
        return keep_crops("the disk has no room, or had none when this run began")
    logger.info("%s: what they make of every crop is computed once (%.0f MB)", frozen, size / 1e6)
    began = time.monotonic()
    step = mesh.jit_step(forward, devices).lower(variables, example).compile()
    compiled = time.monotonic()
    # NumPy's file format knows no bfloat16.
    bits = np.dtype(f"u{feature.dtype.itemsize}")

    def compute(path: Path, images: np.ndarray, repeats: int) -> np.ndarray:
        num_rows = repeats * len(images)
        if mesh.is_primary():
            file = create_array(path, (num_rows, *feature.shape[1:]), bits)
        for first in range(0, num_rows, batch_size):
            check_stop()
            output = np.asarray(step(variables, make_batch(images, first))).view(bits)
            if mesh.is_primary():
                file[first : first + batch_size] = output[: num_rows - first]
        if mesh.is_primary():
            file.flush()
        mesh.wait_for_all("features computed")
        return np.load(path, mmap_mode="r").view(feature.dtype)

    train = compute(directory / "train.npy", crops.train, repeats)
    val = compute(directory / "val.npy", crops.val, 1)
    seconds = time.monotonic() - compiled, compiled - began
    return Inputs(train, val, lambda features: features, num_segments, bool(active), *seconds)


@contextlib.contextmanager
def discarded_at_the_end(directory: Path) -> Iterator[None]:
    """Removes the features when a training ends, in whatever way."""
    try:
        yield
    finally:
        if mesh.is_primary():
            shutil.rmtree(directory, ignore_errors=True)


def _make_room(directory: Path, size: int) -> bool:
    shutil.rmtree(directory, ignore_errors=True)  # of a killed run
    directory.mkdir(parents=True)
    # Checkpoints and figures need some of it, too.
    return size < 0.8 * shutil.disk_usage(directory).free
