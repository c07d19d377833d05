"""The training loop: one jitted step after another, resumable at any of them, bit for bit."""

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxcells.data.arrays import SplitArrays
from jaxcells.data.crop_set import CropSet
from jaxcells.data.loader import eval_batches, num_batches, train_batches
from jaxcells.data.normalization import Normalization, fit_normalization
from jaxcells.errors import Error
from jaxcells.logs import duration, open_metrics
from jaxcells.models import create_model
from jaxcells.prepare import PreparedData
from jaxcells.training import checkpoints, mesh, optim, steps
from jaxcells.training.initialization import Initialization, initialize
from jaxcells.training.meter import Meter, Progress, check_finite
from jaxcells.training.signals import Interrupted, StopRequest
from jaxcells.training.state import TrainState, create_train_state

logger = logging.getLogger("jaxcells")

_ESTIMATE_AFTER = 5  # steps


def train(
    config: ConfigDict, workdir: Path, data: PreparedData, init: Initialization, *, start: float
) -> Progress:
    """Trains to the last epoch, from the newest checkpoint if there is one.

    Leaves checkpoints, metrics.jsonl and TensorBoard files in the workdir. The test split is not
    touched.

    Args:
      config: a validated config.
      workdir: the run's folder.
      data: crops and their arrays.
      init: where the first parameters come from.
      start: `time.monotonic()` when this process began, for the total.

    Returns:
      The timings of the whole run, resumed or not.

    Raises:
      Error: the loss is not finite, the batch does not fit the devices, or a checkpoint is damaged.
      Interrupted: SIGTERM or Ctrl-C, after saving.
    """
    train_set, val_set = data.arrays["train"], data.arrays["val"]
    class_names = data.crop_set.class_names
    batch_size, num_epochs = config.train.batch_size, config.train.num_epochs
    steps_per_epoch = num_batches(len(train_set.labels), batch_size)
    num_steps = steps_per_epoch * num_epochs
    devices = mesh.make_mesh()
    rows = mesh.local_rows(batch_size, devices)

    model_args = dict(config.model, num_classes=len(class_names))
    schedule = optim.make_schedule(
        config.optim.schedule, learning_rate=config.optim.learning_rate, num_steps=num_steps
    )
    tx = optim.make_optimizer(
        schedule, momentum=config.optim.momentum, weight_decay=config.optim.weight_decay
    )
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    channels = train_set.images.shape[-1]
    sample_shape = (1, *train_set.images.shape[1:3], 3 if channels == 1 else channels)

    def create(key: jax.Array) -> TrainState:
        model = create_model(**model_args)
        return create_train_state(model, tx, sample_shape=sample_shape, key=key)

    directory = workdir / "checkpoints"
    if checkpoints.list_steps(directory):
        state, meta = checkpoints.restore(directory, jax.eval_shape(create, init_key))
        check_crops(meta, data.crop_set, workdir)
        progress = Progress(**meta["progress"])
        normalization = Normalization.from_dict(meta["normalization"])
        init_record = meta["init"]
        logger.info("resuming at step %d of %d", int(state.step), num_steps)
    else:
        state, init_record = initialize(create(init_key), init)
        progress = Progress(prepare_s=data.seconds)
        normalization = fit_normalization(train_set.images, config.data.normalize)
    first_step, seconds_before = int(state.step), progress.total_s
    state = mesh.replicate(state, devices)

    train_step: Any = mesh.jit_train_step(
        steps.make_train_step(
            normalization,
            label_smoothing=config.optim.label_smoothing,
            class_weights=_class_weights(config.optim.class_weights, train_set.labels),
            dihedral=config.data.augment.dihedral,
            intensity=config.data.augment.intensity,
        ),
        devices,
    )
    eval_step = mesh.jit_eval_step(steps.make_eval_step(normalization), devices)
    batches = train_batches(
        train_set.images,
        train_set.labels,
        batch_size,
        seed=config.seed,
        first_step=first_step,
        rows=rows,
    )
    primary = jax.process_index() == 0
    # On the CPU host and device share the cores: running ahead gains nothing there.
    meter = Meter(progress, window=1 if jax.default_backend() == "cpu" else 32)

    with (
        open_metrics(workdir, first_step=first_step, primary=primary) as writer,
        StopRequest() as stop,
        tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            disable=None if primary else True,
            dynamic_ncols=True,
        ) as bar,
    ):

        def save(state: TrainState, metrics: Mapping[str, float] | None) -> None:
            began = time.monotonic()
            progress.total_s = seconds_before + began - start
            meta = {
                "step": int(state.step),
                "num_steps": num_steps,
                "progress": dataclasses.asdict(progress),
                "normalization": normalization.to_dict(),
                "seed": config.seed,
                "batch_size": batch_size,
                "class_names": list(class_names),
                "manifest_sha256": data.crop_set.manifest_sha256,
                "model": model_args,
                "init": init_record,
            }
            checkpoints.save(directory, state, meta=meta, metrics=metrics)
            progress.checkpoint_s += time.monotonic() - began

        last_saved = first_step
        first_trained = time.monotonic()
        for step in range(first_step + 1, num_steps + 1):
            if stop.requested(step):
                meter.read()
                if last_saved < step - 1:
                    save(state, None)
                raise Interrupted(
                    f"stopped at step {step - 1} of {num_steps}; the same command resumes there",
                    stop.signal,
                )
            batch = mesh.shard_batch(next(batches), devices)
            if step == first_step + 1:
                began = time.monotonic()
                train_step = train_step.lower(state, batch, step_key).compile()
                first_trained = time.monotonic()
                progress.compile_s += first_trained - began
                meter.restart()
            state, sums = train_step(state, batch, step_key)
            meter.add(step, sums)
            bar.update()

            if step == first_step + _ESTIMATE_AFTER:
                meter.read()
                seconds = (time.monotonic() - first_trained) / _ESTIMATE_AFTER
                logger.info(
                    "%.1f images/s: about %s for the %d steps left, validation apart",
                    batch_size / seconds,
                    duration(seconds * (num_steps - step)),
                    num_steps - step,
                )
            every_steps = config.checkpoint.every_steps
            if every_steps and step % every_steps == 0 and step % steps_per_epoch:
                meter.read()
                save(state, None)
                last_saved = step
                meter.restart()
            if step % steps_per_epoch:
                continue

            meter.read()
            epoch = step // steps_per_epoch
            trained = progress.finish_epoch()
            trained["learning_rate"] = float(schedule(step - 1))
            began = time.monotonic()
            validated = _validate(eval_step, state, val_set, batch_size, rows, devices)
            progress.validate_s += time.monotonic() - began
            check_finite(validated["loss"], step)
            if writer:
                writer.write({"step": step, "epoch": epoch, "split": "train", **trained})
                writer.write({"step": step, "epoch": epoch, "split": "val", **validated})
            save(state, validated)
            last_saved = step
            per_step = (time.monotonic() - first_trained) / (step - first_step)
            logger.info(
                "epoch %d/%d  train loss %.4f accuracy %.3f  val loss %.4f accuracy %.3f balanced "
                "%.3f  %.1f images/s  %s left",
                epoch,
                num_epochs,
                trained["loss"],
                trained["accuracy"],
                validated["loss"],
                validated["accuracy"],
                validated["balanced_accuracy"],
                trained["images_per_second"],
                duration(per_step * (num_steps - step)),
            )
            meter.restart()
    progress.total_s = seconds_before + time.monotonic() - start
    return progress


def check_crops(meta: Mapping[str, Any], crop_set: CropSet, workdir: Path) -> None:
    """Refuses to go on, or to evaluate, with other crops than a checkpoint was trained on.

    Raises:
      Error: the crops differ, and images may have changed sides.
    """
    if meta["manifest_sha256"] != crop_set.manifest_sha256:
        raise Error(
            f"{workdir}: the checkpoints were trained on other crops than those in "
            f"{crop_set.directory}; choose another --workdir for these"
        )


def _validate(
    eval_step: steps.EvalStep,
    state: TrainState,
    split: SplitArrays,
    batch_size: int,
    rows: slice,
    devices: jax.sharding.Mesh,
) -> dict[str, float]:
    """Returns exact means over a split: every example once, padding never."""
    loss, confusion = 0.0, np.zeros(())
    for batch in eval_batches(split.images, split.labels, batch_size, rows):
        sums = jax.device_get(eval_step(state, mesh.shard_batch(batch, devices)))
        loss += float(sums["loss"])
        confusion = confusion + sums["confusion"]
    recall = np.diag(confusion) / confusion.sum(axis=1)
    return {
        "loss": float(loss / confusion.sum()),
        "accuracy": float(np.trace(confusion) / confusion.sum()),
        "balanced_accuracy": float(recall.mean()),
    }


def _class_weights(kind: str, labels: np.ndarray) -> list[float] | None:
    """Returns N / (K n_k) for every class k, or None for equal weights."""
    if kind == "none":
        return None
    counts = np.bincount(labels)
    return [float(weight) for weight in counts.sum() / (len(counts) * counts)]
