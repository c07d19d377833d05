"""Predictions of a trained network for one split, and the history of splits that were opened."""

import dataclasses
import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxcells.data.arrays import SplitArrays
from jaxcells.data.crop_set import CropRecord
from jaxcells.data.loader import Batch, eval_batches, num_batches
from jaxcells.evaluation.metrics import SplitMetrics, classification_metrics
from jaxcells.files import Workdir, write_csv
from jaxcells.models import create_model
from jaxcells.training import mesh
from jaxcells.training.checkpoints import CheckpointMeta, Which, restore_variables
from jaxcells.training.state import TrainState, inference_state
from jaxcells.training.steps import PredictStep, make_predict_step


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """A network from a checkpoint, with all that using it needs.

    Attributes:
      state: parameters and statistics on the devices.
      meta: what was stored with them.
      predict_step: from state and batch to probabilities, jitted for the mesh.
      devices: the mesh.
    """

    state: TrainState
    meta: CheckpointMeta
    predict_step: PredictStep
    devices: jax.sharding.Mesh


def load_network(
    workdir: Workdir, which: Which = "best", compiled: dict[str, Any] | None = None
) -> TrainedNetwork:
    """Restores a network from a workdir, which is all that is needed.

    Args:
      workdir: of a run.
      which: a step, "latest" or "best".
      compiled: see `loop.train`.

    Raises:
      Error: no such checkpoint, or it is damaged.
    """
    compiled = {} if compiled is None else compiled
    variables, meta = restore_variables(workdir.checkpoints, which)
    devices = mesh.make_mesh()
    key = repr(("predict", meta.model, meta.normalization))
    if key not in compiled:
        step = mesh.jit_step(make_predict_step(meta.normalization), devices)
        compiled[key] = create_model(**meta.model), step
    model, predict_step = compiled[key]
    state = mesh.replicate(inference_state(model, variables), devices)
    return TrainedNetwork(state, meta, predict_step, devices)


def predict_split(
    network: TrainedNetwork, split: SplitArrays, batch_size: int
) -> tuple[np.ndarray, dict[str, float]]:
    """Predicts every crop of a split with one jitted step.

    Args:
      network: the network.
      split: its pixels; labels are not looked at.
      batch_size: B, over all devices.

    Returns:
      Probabilities float32 [N, K] in the order of the split; and seconds: "compile_s", of a first
      batch that is thrown away, and "evaluate_s", of the whole split.
    """
    rows = mesh.local_rows(batch_size, network.devices)

    def predict(batch: Batch) -> np.ndarray:
        images = mesh.shard_batch({"image": batch["image"]}, network.devices)
        return jax.device_get(network.predict_step(network.state, images))

    start = time.monotonic()
    predict(next(eval_batches(split.images, split.labels, batch_size, rows)))
    compiled = time.monotonic()
    batches = eval_batches(split.images, split.labels, batch_size, rows)
    total = num_batches(len(split.labels), batch_size)
    bar = tqdm(batches, total=total, unit="batch", disable=None, leave=False)
    probabilities = np.concatenate([predict(batch) for batch in bar])[: len(split.labels)]
    seconds = {"compile_s": compiled - start, "evaluate_s": time.monotonic() - compiled}
    return probabilities, seconds


def evaluate_split(
    network: TrainedNetwork, split: SplitArrays, path: Path
) -> tuple[SplitMetrics, dict[str, float]]:
    """Predicts a split, writes its predictions, and compares them with the labels.

    Args:
      network: the network.
      split: its pixels and labels.
      path: of the predictions.

    Returns:
      The figures, with intervals over independent fields; and seconds as of `predict_split`.
    """
    meta = network.meta
    probabilities, seconds = predict_split(network, split, meta.batch_size)
    if mesh.is_primary():
        write_predictions(path, split.records, probabilities, meta.class_names)
    metrics = classification_metrics(
        probabilities,
        split.labels,
        class_names=meta.class_names,
        groups=split.groups,
        seed=meta.seed,
    )
    return metrics, seconds


def write_predictions(
    path: Path,
    records: Sequence[CropRecord],
    probabilities: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Writes a line per crop: path, label, prediction, source, group, one probability a class."""
    header = ["path", "label", "prediction", "source", "group"]
    rows = [
        [r.crop, r.label, class_names[row.argmax()], r.source, r.group, *(f"{p:.6g}" for p in row)]
        for r, row in zip(records, probabilities, strict=True)
    ]
    write_csv(path, header + [f"probability {name}" for name in class_names], rows)


def write_history(workdir: Workdir, verb: str, split: str, step: int) -> int:
    """Adds a line to history.jsonl that says that a split was opened.

    Returns:
      How often this split of the workdir has been opened, this time included.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = {"time": now, "verb": verb, "split": split, "checkpoint": step}
    with open(workdir.history, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return times_opened(workdir, split)


def times_opened(workdir: Workdir, split: str) -> int:
    """Returns how often a split of the workdir has been opened, by its history.jsonl."""
    if not workdir.history.exists():
        return 0
    # As text: a line that a crash cut off, and what stands behind it, is no JSON.
    return workdir.history.read_text(encoding="utf-8").count(f'"split": "{split}"')
