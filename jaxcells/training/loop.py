"""The training loop: one jitted step after another, resumable at any of them, bit for bit."""

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxcells.config import parse_multipliers
from jaxcells.data.crop_set import CropSet
from jaxcells.data.loader import eval_batches, num_batches
from jaxcells.data.normalization import Normalization, fit_normalization
from jaxcells.files import Error
from jaxcells.models import create_model
from jaxcells.text import duration
from jaxcells.training import checkpoints, mesh, optim, steps
from jaxcells.training.activations import discard_activations
from jaxcells.training.freeze import Phase, make_phases
from jaxcells.training.initialization import Initialization, initialize, seen_images
from jaxcells.training.inputs import make_inputs
from jaxcells.training.progress import (
    Meter,
    MetricWriter,
    Progress,
    check_finite,
    open_metrics,
)
from jaxcells.training.signals import Interrupted, StopRequest
from jaxcells.training.state import TrainState, apply_segments, create_train_state
from jaxcells.workflows.prepare import PreparedData

logger = logging.getLogger("jaxcells")

_ESTIMATE_AFTER = 5  # steps


@dataclasses.dataclass(frozen=True)
class _Run:
    """What stays the same from the first step of a run to its last, and where it writes."""

    config: ConfigDict
    workdir: Path
    data: PreparedData
    model: nn.Module
    model_args: dict[str, Any]
    schedule: optax.Schedule
    normalization: Normalization
    init_record: dict[str, Any]
    seen: dict[str, list[str]]
    step_key: jax.Array
    num_steps: int
    steps_per_epoch: int
    devices: jax.sharding.Mesh
    rows: slice
    progress: Progress
    meter: Meter
    began: float  # such that the clock's time since then is that of the whole run
    writer: MetricWriter | None
    stop: StopRequest
    bar: tqdm

    def until(self, phase: Phase) -> str:
        """Says that an estimate is not of the whole run, where it is not."""
        return "" if phase.last_step == self.num_steps else " until all is trained"


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
    train_set = data.arrays["train"]
    class_names = data.crop_set.class_names
    batch_size, num_epochs = config.train.batch_size, config.train.num_epochs
    steps_per_epoch = num_batches(len(train_set.labels), batch_size)
    num_steps = steps_per_epoch * num_epochs
    devices = mesh.make_mesh()
    rows = mesh.local_rows(batch_size, devices)
    phases = make_phases(
        config.optim.freeze,
        config.optim.freeze_epochs,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
    )

    model_args = dict(config.model, num_classes=len(class_names))
    model = create_model(**model_args)
    schedule = optim.make_schedule(
        config.optim.schedule, learning_rate=config.optim.learning_rate, num_steps=num_steps
    )
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    channels = train_set.images.shape[-1]
    sample_shape = (1, *train_set.images.shape[1:3], 3 if channels == 1 else channels)

    def create(key: jax.Array) -> TrainState:
        # What is frozen makes no difference to the form of the optimiser's state.
        tx = _optimizer(config, schedule, phases[0])
        return create_train_state(model, tx, sample_shape=sample_shape, key=key)

    directory = workdir / "checkpoints"
    if checkpoints.list_steps(directory):
        state, meta = checkpoints.restore(directory, jax.eval_shape(create, init_key))
        check_crops(meta, data.crop_set, workdir)
        progress = Progress(**meta["progress"])
        normalization = Normalization.from_dict(meta["normalization"])
        init_record, seen = meta["init"], meta["seen"]
        if state.step < num_steps:
            logger.info("resuming at step %d of %d", int(state.step), num_steps)
        else:
            logger.info("all %d steps are trained", num_steps)
    else:
        state, init_record = initialize(create(init_key), init, class_names=class_names)
        seen = seen_images(data.crop_set, init)
        progress = Progress(prepare_s=data.seconds)
        normalization = fit_normalization(train_set.images, config.data.normalize)
    first_step = int(state.step)
    began = start - progress.total_s
    state = mesh.replicate(state, devices)
    primary = jax.process_index() == 0
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
        run = _Run(
            config=config,
            workdir=workdir,
            data=data,
            model=model,
            model_args=model_args,
            schedule=schedule,
            normalization=normalization,
            init_record=init_record,
            seen=seen,
            step_key=step_key,
            num_steps=num_steps,
            steps_per_epoch=steps_per_epoch,
            devices=devices,
            rows=rows,
            progress=progress,
            # On the CPU host and device share the cores: running ahead gains nothing there.
            meter=Meter(progress, window=1 if jax.default_backend() == "cpu" else 32),
            began=began,
            writer=writer,
            stop=stop,
            bar=bar,
        )
        for phase in phases:
            if int(state.step) < phase.last_step:
                state = _train_phase(run, phase, state)
        if stop.signal:  # during the last step, or what came after it
            raise _interrupted(run, num_steps)
    if primary:
        discard_activations(workdir / "activations")
    progress.total_s = time.monotonic() - began
    return progress


def _train_phase(run: _Run, phase: Phase, state: TrainState) -> TrainState:
    """Trains to the end of a phase and returns the state there."""
    config, progress, meter = run.config, run.progress, run.meter
    batch_size, steps_per_epoch = config.train.batch_size, run.steps_per_epoch
    first_step = int(state.step)

    def check_stop() -> None:
        if run.stop.signal:
            raise _interrupted(run, first_step)

    inputs = make_inputs(
        run.model,
        state,
        phase.freeze,
        run.data.arrays,
        run.normalization,
        dihedral=config.data.augment.dihedral,
        intensity=config.data.augment.intensity,
        batch_size=batch_size,
        rows=run.rows,
        seed=config.seed,
        step_key=run.step_key,
        num_epochs=(phase.last_step - phase.before) // steps_per_epoch,
        directory=run.workdir / "activations",
        fingerprint=run.data.crop_set.manifest_sha256,
        check_stop=check_stop,
    )
    if not progress.activations_s:  # a resumed run counts them once
        progress.activations_s = inputs.activations_s
        progress.compile_s += inputs.compile_s
    state = state.replace(
        apply_fn=apply_segments(run.model, inputs.first_segment),
        tx=_optimizer(config, run.schedule, phase),
    )
    labels = run.data.arrays["train"].labels
    train_step: Any = mesh.jit_train_step(
        steps.make_train_step(
            inputs.normalize,
            label_smoothing=config.optim.label_smoothing,
            class_weights=_class_weights(config.optim.class_weights, labels),
            dihedral=inputs.dihedral,
            intensity=config.data.augment.intensity,
            freeze=phase.freeze,
        ),
        run.devices,
    )
    eval_step = mesh.jit_eval_step(steps.make_eval_step(inputs.normalize), run.devices)
    batches = inputs.batches(first_step)

    last_saved = first_step
    first_trained = time.monotonic()
    for step in range(first_step + 1, phase.last_step + 1):
        if run.stop.requested(step):
            meter.read()
            if last_saved < step - 1:
                _save(run, state, None)
            raise _interrupted(run, step - 1)
        batch = mesh.shard_batch(next(batches), run.devices)
        if step == first_step + 1:
            began = time.monotonic()
            train_step = train_step.lower(state, batch, run.step_key).compile()
            first_trained = time.monotonic()
            progress.compile_s += first_trained - began
            progress.step_bytes = max(progress.step_bytes, mesh.bytes_of(train_step))
            meter.restart()
        state, sums = train_step(state, batch, run.step_key)
        meter.add(step, sums)
        run.bar.update()

        if step == first_step + _ESTIMATE_AFTER:
            meter.read()
            seconds = (time.monotonic() - first_trained) / _ESTIMATE_AFTER
            logger.info(
                "%.1f images/s: about %s for the %d steps left%s, validation apart",
                batch_size / seconds,
                duration(seconds * (phase.last_step - step)),
                phase.last_step - step,
                run.until(phase),
            )
        every_steps = config.checkpoint.every_steps
        if every_steps and step % every_steps == 0 and step % steps_per_epoch:
            meter.read()
            _save(run, state, None)
            last_saved = step
            meter.restart()
        if step % steps_per_epoch:
            continue

        meter.read()
        epoch = step // steps_per_epoch
        trained = progress.finish_epoch()
        trained["learning_rate"] = float(run.schedule(step - 1))
        began = time.monotonic()
        validated = _validate(run, eval_step, state, inputs.validation)
        progress.validate_s += time.monotonic() - began
        check_finite(validated["loss"], step)
        if run.writer:
            run.writer.write({"step": step, "epoch": epoch, "split": "train", **trained})
            run.writer.write({"step": step, "epoch": epoch, "split": "val", **validated})
        _save(run, state, validated)
        last_saved = step
        per_step = (time.monotonic() - first_trained) / (step - first_step)
        logger.info(
            "epoch %d/%d  train loss %.4f accuracy %.3f  val loss %.4f accuracy %.3f balanced "
            "%.3f  %.1f images/s  %s left%s",
            epoch,
            config.train.num_epochs,
            trained["loss"],
            trained["accuracy"],
            validated["loss"],
            validated["accuracy"],
            validated["balanced_accuracy"],
            trained["images_per_second"],
            duration(per_step * (phase.last_step - step)),
            run.until(phase),
        )
        meter.restart()
    return state


def _interrupted(run: _Run, step: int) -> Interrupted:
    return Interrupted(
        f"stopped at step {step} of {run.num_steps}; the same command resumes there",
        run.stop.signal,
    )


def _optimizer(
    config: ConfigDict, schedule: optax.Schedule, phase: Phase
) -> optax.GradientTransformation:
    return optim.make_optimizer(
        schedule,
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        freeze=phase.freeze,
        multipliers=parse_multipliers(config.optim.multipliers),
    )


def _save(run: _Run, state: TrainState, metrics: Mapping[str, float] | None) -> None:
    began = time.monotonic()
    run.progress.total_s = began - run.began
    meta = {
        "step": int(state.step),
        "num_steps": run.num_steps,
        "progress": dataclasses.asdict(run.progress),
        "normalization": run.normalization.to_dict(),
        "seed": run.config.seed,
        "batch_size": run.config.train.batch_size,
        "class_names": list(run.data.crop_set.class_names),
        "manifest_sha256": run.data.crop_set.manifest_sha256,
        "model": run.model_args,
        "init": run.init_record,
        "seen": run.seen,
    }
    checkpoints.save(run.workdir / "checkpoints", state, meta=meta, metrics=metrics)
    run.progress.checkpoint_s += time.monotonic() - began


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
    run: _Run, eval_step: steps.EvalStep, state: TrainState, images: np.ndarray
) -> dict[str, float]:
    """Returns exact means over the validation split: every example once, padding never."""
    loss, confusion = 0.0, np.zeros(())
    labels = run.data.arrays["val"].labels
    for batch in eval_batches(images, labels, run.config.train.batch_size, run.rows):
        sums = jax.device_get(eval_step(state, mesh.shard_batch(batch, run.devices)))
        loss += float(sums["loss"])
        confusion = confusion + sums["confusion"]
    recall = np.diag(confusion) / confusion.sum(axis=1)
    return {
        "loss": float(loss / confusion.sum()),
        "accuracy": float(np.trace(confusion) / confusion.sum()),
        "balanced_accuracy": float(recall.mean()),
    }


def _class_weights(kind: str, labels: np.ndarray) -> tuple[float, ...] | None:
    """Returns N / (K n_k) for every class k, or None for equal weights."""
    if kind == "none":
        return None
    counts = np.bincount(labels)
    return tuple(float(weight) for weight in counts.sum() / (len(counts) * counts))
