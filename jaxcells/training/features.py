"""What training runs on: crops, or what a frozen start of the network makes of them.

Where the first segments of a network are frozen and nothing random touches their input, they give
the same features for a crop in every epoch. These are computed once for all crops and
memory-mapped, and the steps of training and validation then run the rest of the network on them
alone. Random flips and quarter turns are no obstacle: a crop has eight of them, and the features of
each are kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxcells.data.arrays import create_array
from jaxcells.files import Error, file_sha256, from_record, read_json, write_json
from jaxcells.training import mesh
from jaxcells.training.augment import NUM_SYMMETRIES, apply_symmetries
from jaxcells.training.freeze import frozen_prefix
from jaxcells.training.recipe import Phase, Recipe
from jaxcells.training.steps import Normalize

logger = logging.getLogger("jaxcells")

_RECORD = "record.json"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the steps of a phase run on: crops, or features of them on disk.

    Attributes:
      train: [N, ...]; with symmetries [8 N, ...], where symmetry s of image i is row s * N + i.
      val: [N, ...].
      normalize: what the steps apply to both first.
      first_segment: of the network, to run.
      has_symmetries: whether the rows are drawn, instead of flips and turns in the step.
      features_s: seconds that computing the features took, whenever that was.
      compile_s: seconds of compilation before.
    """

    train: np.ndarray
    val: np.ndarray
    normalize: Normalize
    first_segment: int = 0
    has_symmetries: bool = False
    features_s: float = 0.0
    compile_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Record:
    """What lies beside the features: all that they depend on, hashes of the files, and times."""

    key: str
    sha256: Mapping[str, str]
    features_s: float
    compile_s: float


def make_inputs(
    model: nn.Module,
    variables: Mapping[str, Any],
    crops: Inputs,
    recipe: Recipe,
    phase: Phase,
    directory: Path,
    *,
    fingerprint: str,
    check_stop: Callable[[], None],
) -> Inputs:
    """Chooses between crops and features, computes the latter, and says so in a line.

    Features are kept where the first segments of the network are frozen and their input does not
    change at random, or by flips and quarter turns alone.

    Args:
      model: the network.
      variables: its parameters and statistics, on the devices.
      crops: what to run on otherwise.
      recipe: of the run.
      phase: the steps to feed. Its whole length counts, also for a run that resumes within it:
        what is chosen must not depend on where that was.
      directory: where features are kept.
      fingerprint: stands for the crops.
      check_stop: called between batches of computing features; may raise.
    """
    num_segments = frozen_prefix(model.segments, variables["params"], phase.freeze)
    if not num_segments:
        return crops
    names = [name for segment in model.segments[:num_segments] for name in segment]
    frozen = f"{names[0]} to {names[-1]} are frozen"
    features = None
    if recipe.intensity:
        why_not = "brightness changes at random"
    elif recipe.dihedral and phase.num_epochs < NUM_SYMMETRIES:
        why_not = (
            f"the {NUM_SYMMETRIES} symmetries of every crop would take longer than "
            f"{phase.num_epochs} epochs"
        )
    else:
        why_not = "the disk has no room"
        features = compute_features(
            *(model, variables, num_segments, crops, directory),
            symmetries=recipe.dihedral,
            batch_size=recipe.batch_size,
            fingerprint=fingerprint,
            check_stop=check_stop,
        )
    if features is None:
        logger.info("%s, and computed in every step: %s", frozen, why_not)
        return crops
    size = (features.train.nbytes + features.val.nbytes) / 1e6
    logger.info("%s: what they make of every crop is computed once (%.0f MB)", frozen, size)
    return features


def compute_features(
    model: nn.Module,
    variables: Mapping[str, Any],
    num_segments: int,
    crops: Inputs,
    directory: Path,
    *,
    symmetries: bool,
    batch_size: int,
    fingerprint: str,
    check_stop: Callable[[], None] = lambda: None,
) -> Inputs | None:
    """Computes the output of the first segments for every image, or finds it computed.

    Args:
      model: the network.
      variables: its parameters and statistics, on the devices.
      num_segments: how many segments to run, in evaluation mode.
      crops: the images.
      directory: where the features are kept; emptied of others.
      symmetries: whether to run all eight symmetries of every training image, see
        `augment.apply_symmetries`.
      batch_size: images at a time, over all devices.
      fingerprint: stands for the images.
      check_stop: called before every batch; may raise.

    Returns:
      The features, memory-mapped, in the dtype of the computation. None where the disk has no room.
    """
    devices = mesh.make_mesh()
    rows = mesh.local_rows(batch_size, devices)
    prefix = {name for names in model.segments[:num_segments] for name in names}
    # The rest of the parameters would only travel with it.
    own = {
        kind: {name: leaves[name] for name in leaves.keys() & prefix}
        for kind, leaves in variables.items()
    }

    def forward(variables: Any, batch: Any) -> Any:
        inputs = apply_symmetries(crops.normalize(batch["image"]), batch["symmetry"])
        return model.apply(variables, inputs, train=False, last=num_segments)

    def make_batch(images: np.ndarray, first: int) -> dict[str, jax.Array]:
        # Rows past the end hold anything.
        symmetry, image = np.divmod(np.arange(first, first + batch_size)[rows], len(images))
        batch = {"image": images[image], "symmetry": symmetry.astype(np.int32)}
        return mesh.shard_batch(batch, devices)

    settings = repr((model, num_segments, crops.normalize, symmetries, fingerprint))
    digest = hashlib.sha256(settings.encode())
    for leaf in jax.tree.leaves(own):
        digest.update(np.asarray(leaf).tobytes())
    key = digest.hexdigest()
    example = make_batch(crops.train, 0)
    feature = jax.eval_shape(forward, own, example)

    def find() -> Inputs | None:
        """Returns what is kept, or None if it is of other images or parameters, or damaged."""
        try:
            record = from_record(_Record, read_json(directory / _RECORD), directory)
            if record.key != key:
                return None
            paths = {split: directory / f"{split}.npy" for split in ("train", "val")}
            if any(file_sha256(path) != record.sha256[split] for split, path in paths.items()):
                return None
        except (Error, OSError):
            return None
        train, val = (np.load(p, mmap_mode="r").view(feature.dtype) for p in paths.values())
        times = record.features_s, record.compile_s
        return Inputs(train, val, _as_they_are, num_segments, symmetries, *times)

    if (found := find()) is not None:
        return found
    repeats = NUM_SYMMETRIES if symmetries else 1
    shapes = {
        "train": (repeats * len(crops.train), *feature.shape[1:]),
        "val": (len(crops.val), *feature.shape[1:]),
    }
    size = feature.dtype.itemsize * sum(math.prod(shape) for shape in shapes.values())
    partial = directory.with_name(directory.name + ".partial")
    fits = not mesh.is_primary() or _make_room(directory, partial, size)
    if not mesh.of_primary(fits):
        return None
    began = time.monotonic()
    step = mesh.jit_step(forward, devices).lower(own, example).compile()
    compile_s = time.monotonic() - began
    # NumPy's file format knows no bfloat16.
    bits = np.dtype(f"u{feature.dtype.itemsize}")
    for split, shape in shapes.items():
        images = crops.train if split == "train" else crops.val
        if mesh.is_primary():
            file = create_array(partial / f"{split}.npy", shape, bits)
        for first in range(0, shape[0], batch_size):
            check_stop()
            output = np.asarray(step(own, make_batch(images, first))).view(bits)
            if mesh.is_primary():
                file[first : first + batch_size] = output[: shape[0] - first]
        if mesh.is_primary():
            file.flush()
    if mesh.is_primary():
        sha256 = {split: file_sha256(partial / f"{split}.npy") for split in shapes}
        record = _Record(key, sha256, time.monotonic() - began - compile_s, compile_s)
        write_json(partial / _RECORD, dataclasses.asdict(record))
        partial.rename(directory)
    mesh.wait_for_all("features computed")
    return find()


def discard_features(directory: Path) -> None:
    """Removes what `compute_features` left, once it is of no more use."""
    for folder in (directory, directory.with_name(directory.name + ".partial")):
        shutil.rmtree(folder, ignore_errors=True)


def _as_they_are(features: Any) -> Any:
    return features


def _make_room(directory: Path, partial: Path, size: int) -> bool:
    discard_features(directory)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    logger.info("%.0f MB of features for %.0f MB of free disk", size / 1e6, free / 1e6)
    # Checkpoints and figures need some of it, too.
    return size < 0.8 * free
