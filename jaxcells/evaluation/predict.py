"""Figures of a trained run on one split: every crop once, intervals over fields."""

import csv
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
from jaxcells.data.loader import Batch, eval_batches, num_batches
from jaxcells.data.manifest import CropRecord
from jaxcells.data.normalization import Normalization
from jaxcells.evaluation.metrics import classification_metrics
from jaxcells.files import write_whole
from jaxcells.models import create_model
from jaxcells.training import mesh
from jaxcells.training.checkpoints import Which, restore_variables
from jaxcells.training.state import TrainState, inference_state
from jaxcells.training.steps import PredictStep, make_predict_step


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """A network from a checkpoint, with all that using it needs.

    Attributes:
      state: parameters and statistics on the devices.
      normalization: pixels to inputs, as in training.
      class_names: the position is the label.
      step: the checkpoint's.
      meta: what else was stored with it.
      predict_step: from state and batch to probabilities, jitted for the mesh.
      devices: the mesh.
    """

    state: TrainState
    normalization: Normalization
    class_names: tuple[str, ...]
    step: int
    meta: dict[str, Any]
    predict_step: PredictStep
    devices: jax.sharding.Mesh


def load_network(workdir: Path, which: Which = "best") -> TrainedNetwork:
    """Restores a network from a workdir, which is all that is needed.

    Args:
      workdir: the folder of a run.
      which: a step, "latest" or "best".

    Raises:
      Error: no such checkpoint, or it is damaged.
    """
    variables, meta = restore_variables(workdir / "checkpoints", which)
    model = create_model(**meta["model"])
    normalization = Normalization.from_dict(meta["normalization"])
    devices = mesh.make_mesh()
    return TrainedNetwork(
        state=mesh.replicate(inference_state(model, variables), devices),
        normalization=normalization,
        class_names=tuple(meta["class_names"]),
        step=meta["step"],
        meta=meta,
        predict_step=mesh.jit_predict_step(make_predict_step(normalization), devices),
        devices=devices,
    )


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


def split_metrics(
    probabilities: np.ndarray, split: SplitArrays, class_names: Sequence[str], *, seed: int
) -> dict[str, Any]:
    """Returns the figures of one split with 95 % intervals over its independent fields."""
    return classification_metrics(
        probabilities, split.labels, class_names=class_names, groups=split.groups, seed=seed
    )


def write_predictions(
    path: Path,
    records: Sequence[CropRecord],
    probabilities: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Writes a line per crop: path, label, prediction, source, group, one probability a class."""
    with write_whole(path) as file:
        writer = csv.writer(file)
        writer.writerow(
            ["path", "label", "prediction", "source", "group"]
            + [f"probability {name}" for name in class_names]
        )
        for record, row in zip(records, probabilities, strict=True):
            prediction = class_names[int(row.argmax())]
            writer.writerow(
                [record.crop, record.label, prediction, record.source, record.group]
                + [f"{value:.6g}" for value in row]
            )


def write_history(workdir: Path, verb: str, split: str, step: int) -> int:
    """Adds a line to history.jsonl that says that a split was opened.

    Returns:
      How often this split of the workdir has been opened, this time included.
    """
    path = workdir / "history.jsonl"
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "verb": verb,
        "split": split,
        "checkpoint": step,
    }
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    with open(path, "a", encoding="utf-8") as file:
        # A line that a crash cut off stays as it is, and counts.
        file.write("\n" * (before != "" and not before.endswith("\n")) + json.dumps(line) + "\n")
    return 1 + sum(_opens(text, split) for text in before.splitlines())


def has_opened(workdir: Path, split: str) -> bool:
    """Says whether history.jsonl knows of a time when a split of the workdir was opened."""
    path = workdir / "history.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return any(_opens(line, split) for line in lines)


def _opens(line: str, split: str) -> bool:
    try:
        return json.loads(line)["split"] == split
    except (ValueError, KeyError, TypeError):
        return True
