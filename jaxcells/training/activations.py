"""What the frozen start of a network makes of every crop: computed once, kept on disk.

Where the first segments of a network are frozen and nothing random touches their input, they give
the same output for a crop in every epoch. It is computed once for all crops and memory-mapped, and
the steps of training and validation then run the rest of the network on it alone. Random flips and
quarter turns are no obstacle: a crop has eight of them, and the output of each is kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from jaxcells.data.arrays import create_array
from jaxcells.data.loader import Batch, eval_batches
from jaxcells.files import file_sha256
from jaxcells.training import mesh
from jaxcells.training.augment import apply_symmetries
from jaxcells.training.state import apply_segments
from jaxcells.training.steps import Normalize

logger = logging.getLogger("jaxcells")

Images = Mapping[str, np.ndarray]

_RECORD = "record.json"


@dataclasses.dataclass(frozen=True)
class Kept:
    """Activations on disk.

    Attributes:
      arrays: memory-mapped [S * N, ...] by split, in the dtype of the computation; symmetry s of
        image i is row s * N + i.
      seconds: that computing them took, whenever that was.
      compile_s: seconds of compilation before.
    """

    arrays: Images
    seconds: float
    compile_s: float


def keep_activations(
    model: nn.Module,
    variables: Mapping[str, Any],
    num_segments: int,
    normalize: Normalize,
    images: Images,
    directory: Path,
    *,
    batch_size: int,
    fingerprint: str,
    num_symmetries: Mapping[str, int] | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Kept | None:
    """Computes the output of the first segments for every image, or finds it computed.

    Args:
      model: the network.
      variables: its parameters and statistics, on the devices.
      num_segments: how many segments to run, in evaluation mode.
      normalize: raw images to float32 images.
      images: arrays [N, H, W, C] by split.
      directory: where the activations are kept; emptied of others.
      batch_size: images at a time, over all devices.
      fingerprint: stands for the images.
      num_symmetries: for how many symmetries S of every image of a split, see
        `augment.apply_symmetries`; 1, the image as it is, by default.
      check_stop: called before every batch; may raise.

    Returns:
      The activations, or None where the disk has no room for them.
    """
    repeats = {side: (num_symmetries or {}).get(side, 1) for side in images}
    prefix = [name for names in model.segments[:num_segments] for name in names]
    key = _key(variables, prefix, num_segments, normalize, fingerprint)
    devices = mesh.make_mesh()
    run = apply_segments(model, 0, num_segments)

    def forward(variables: Any, batch: Any) -> jax.Array:
        inputs = apply_symmetries(normalize(batch["image"]), batch["symmetry"])
        return run(variables, inputs, train=False)

    # The rest of the parameters would only travel with it.
    own = {
        kind: {name: leaves[name] for name in prefix if name in leaves}
        for kind, leaves in variables.items()
    }
    shapes = {
        side: jax.eval_shape(
            forward,
            own,
            {
                "image": jax.ShapeDtypeStruct((repeats[side] * len(a), *a.shape[1:]), a.dtype),
                "symmetry": jax.ShapeDtypeStruct((repeats[side] * len(a),), np.int32),
            },
        )
        for side, a in images.items()
    }
    kept = _open(directory, shapes, key)
    if kept is not None:
        return kept
    size = sum(shape.size * shape.dtype.itemsize for shape in shapes.values())
    primary = jax.process_index() == 0
    fits = not primary or _make_room(directory, size)
    if jax.process_count() > 1:
        fits = bool(multihost_utils.broadcast_one_to_all(np.asarray(fits)))
    if not fits:
        return None

    began = time.monotonic()
    partial = directory.with_name(directory.name + ".partial")
    files: dict[str, np.memmap | None] = {}
    for side, shape in shapes.items():
        stored = _as_bits(np.empty(0, shape.dtype)).dtype
        files[side] = (
            create_array(partial / f"{side}.npy", shape.shape, stored) if primary else None
        )
    compile_s = _compute(
        mesh.jit_predict_step(forward, devices),
        own,
        images,
        repeats,
        files,
        batch_size=batch_size,
        devices=devices,
        check_stop=check_stop,
    )
    if primary:
        record = {
            "key": key,
            "sha256": {side: file_sha256(partial / f"{side}.npy") for side in images},
            "seconds": time.monotonic() - began - compile_s,
            "compile_s": compile_s,
        }
        (partial / _RECORD).write_text(json.dumps(record), encoding="utf-8")
        partial.rename(directory)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("activations kept")
    return _open(directory, shapes, key)


def _compute(
    step: Any,
    variables: Any,
    images: Images,
    repeats: Mapping[str, int],
    files: Mapping[str, np.memmap | None],
    *,
    batch_size: int,
    devices: jax.sharding.Mesh,
    check_stop: Callable[[], None],
) -> float:
    """Fills the files, in the process that has them, and returns the seconds of compilation."""
    compile_s = 0.0
    rows = mesh.local_rows(batch_size, devices)
    for side, array in images.items():
        labels, file = np.zeros(len(array), np.int32), files[side]
        for symmetry in range(repeats[side]):
            batches = eval_batches(array, labels, batch_size, rows)
            for first, batch in zip(itertools.count(0, batch_size), batches, strict=False):
                check_stop()
                symmetries = np.full(len(batch["image"]), symmetry, np.int32)
                inputs = mesh.shard_batch(
                    {"image": batch["image"], "symmetry": symmetries}, devices
                )
                if not compile_s:
                    began = time.monotonic()
                    step = step.lower(variables, inputs).compile()
                    compile_s = time.monotonic() - began
                output = _as_bits(np.asarray(step(variables, inputs)))
                if file is not None:
                    number = min(batch_size, len(array) - first)
                    row = symmetry * len(array) + first
                    file[row : row + number] = output[:number]
        if file is not None:
            file.flush()
    return compile_s


def symmetric_batches(
    batches: Iterator[Batch],
    activations: np.ndarray,
    num_images: int,
    draw: Callable[[int], np.ndarray],
    *,
    first_step: int,
    rows: slice,
) -> Iterator[Batch]:
    """Puts activations in the place of image numbers, each of the symmetry that its step draws.

    Args:
      batches: of `train_batches` over the numbers of the images.
      activations: [S * N, ...], see `keep_activations`.
      num_images: N.
      draw: from the step to the symmetries of its batch, int [B].
      first_step: step of the first batch.
      rows: the rows of every batch that this process holds.
    """
    for step, batch in enumerate(batches, first_step):
        yield {**batch, "image": activations[draw(step)[rows] * num_images + batch["image"]]}


def discard_activations(directory: Path) -> None:
    """Removes what `keep_activations` left, once it is of no more use."""
    for folder in (directory, directory.with_name(directory.name + ".partial")):
        shutil.rmtree(folder, ignore_errors=True)


def _key(
    variables: Mapping[str, Any],
    prefix: list[str],
    num_segments: int,
    normalize: Normalize,
    fingerprint: str,
) -> dict[str, Any]:
    """Returns all that the activations depend on, in short."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(dict(variables)).items()):
        if path[1] in prefix:
            digest.update("/".join(path).encode())
            digest.update(np.asarray(leaf).tobytes())
    return {
        "segments": num_segments,
        "variables": digest.hexdigest(),
        "normalize": repr(normalize),
        "images": fingerprint,
    }


def _open(
    directory: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], key: Mapping[str, Any]
) -> Kept | None:
    """Returns what is kept, or None if it is of other images or parameters, or damaged."""
    try:
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
        if record["key"] != key or any(
            record["sha256"][side] != file_sha256(directory / f"{side}.npy") for side in shapes
        ):
            return None
        arrays = {side: np.load(directory / f"{side}.npy", mmap_mode="r") for side in shapes}
        times = {name: float(record[name]) for name in ("seconds", "compile_s")}
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    views = {side: array.view(shapes[side].dtype) for side, array in arrays.items()}
    if any(views[side].shape != shapes[side].shape for side in shapes):
        return None
    return Kept(views, **times)


def _make_room(directory: Path, size: int) -> bool:
    discard_activations(directory)
    partial = directory.with_name(directory.name + ".partial")
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    logger.info("%.0f MB of activations for %.0f MB of free disk", size / 1e6, free / 1e6)
    # Checkpoints and figures need some of it, too.
    return size < 0.8 * free


def _as_bits(array: np.ndarray) -> np.ndarray:
    """Returns bfloat16 as uint16, since NumPy's file format knows no bfloat16."""
    return array if array.dtype.isbuiltin else array.view(np.uint16)
