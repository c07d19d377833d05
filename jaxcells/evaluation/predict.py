"""Predictions of a trained network for one split, and the history of splits that were opened."""

import dataclasses
import datetime
import json
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxcells.data.arrays import SplitArrays
from jaxcells.data.loader import Batch, eval_batches, num_batches
from jaxcells.evaluation.calibration import Calibration, fit_calibration
from jaxcells.evaluation.predictions import Predictions
from jaxcells.files import Workdir, from_record, read_json
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
      predict_step: see `make_predict_step`, jitted for the mesh.
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
        model = create_model(**meta.model)
        step = make_predict_step(meta.normalization, has_segments=hasattr(model, "segments"))
        compiled[key] = model, mesh.jit_step(step, devices)
    model, predict_step = compiled[key]
    state = mesh.replicate(inference_state(model, variables), devices)
    return TrainedNetwork(state, meta, predict_step, devices)


def predict_split(network: TrainedNetwork, split: SplitArrays) -> tuple[Predictions, float, float]:
    """Predicts every crop of a split with one jitted step.

    Args:
      network: the network.
      split: its pixels; labels are not looked at.

    Returns:
      Predictions in the order of the split, not calibrated; seconds of compilation, for which a
      first batch is thrown away; and seconds of the whole split.
    """
    batch_size, meta = network.meta.batch_size, network.meta
    rows = mesh.local_rows(batch_size, network.devices)

    def predict(batch: Batch) -> dict[str, np.ndarray]:
        images = mesh.shard_batch({"image": batch["image"]}, network.devices)
        return jax.device_get(network.predict_step(network.state, images))

    start = time.monotonic()
    predict(next(eval_batches(split.images, split.labels, batch_size, rows)))
    compiled = time.monotonic()
    batches = eval_batches(split.images, split.labels, batch_size, rows)
    total = num_batches(len(split.labels), batch_size)
    bar = tqdm(batches, total=total, unit="batch", disable=None, leave=False)
    found = [predict(batch) for batch in bar]
    outputs = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
    number = len(split.labels)
    predictions = Predictions(
        records=split.records,
        class_names=meta.class_names,
        logits=outputs["logits"][:number],
        temperature=np.ones(number),
        unknown=np.zeros(number),
        features=outputs["features"][:number],
    )
    return predictions, compiled - start, time.monotonic() - compiled


def calibrate(network: TrainedNetwork, validation: Predictions, workdir: Workdir) -> Calibration:
    """Returns the calibration that is stored with a run, or fits that of another checkpoint.

    Args:
      network: the network.
      validation: what it predicts of the validation split.
      workdir: of the run.
    """
    step = network.meta.step
    if workdir.calibration.exists():
        stored = from_record(Calibration, read_json(workdir.calibration), workdir.calibration)
        if stored.checkpoint == step:
            return stored
    return fit_calibration(validation, step)


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
