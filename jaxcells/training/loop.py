"""The training loop: one jitted step after another, resumable at any of them, bit for bit."""

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxcells.data.arrays import SplitArrays
from jaxcells.data.crop_set import CropSet
from jaxcells.data.loader import eval_batches, num_batches, train_batches
from jaxcells.data.normalization import fit_normalization
from jaxcells.files import Error, Workdir, logger
from jaxcells.models import create_model
from jaxcells.text import duration
from jaxcells.training import checkpoints, mesh, optim, steps
from jaxcells.training.augment import draw_symmetries, own_key
from jaxcells.training.checkpoints import CheckpointMeta
from jaxcells.training.features import Inputs, discarded_at_the_end, make_inputs
from jaxcells.training.initialization import Initialization, images_by_split, initialize
from jaxcells.training.progress import Progress, check_finite, open_metrics
from jaxcells.training.recipe import Recipe
from jaxcells.training.signals import Interrupted, StopRequest
from jaxcells.training.state import TrainState, create_train_state

_ESTIMATE_AFTER = 5  # steps


def train(
    recipe: Recipe,
    crop_set: CropSet,
    arrays: Mapping[str, SplitArrays],
    init: Initialization,
    workdir: Workdir,
    prepare_s: float = 0.0,
    compiled: dict[str, Any] | None = None,
) -> Progress:
    """Trains to the last epoch, from the newest checkpoint if there is one.

    Leaves checkpoints, metrics.jsonl and TensorBoard files in the workdir. The test split is not
    touched.

    Args:
      recipe: how to train.
      crop_set: the crops.
      arrays: their pixels and labels, "train" and "val".
      init: where the first parameters come from.
      workdir: the run's.
      prepare_s: seconds that the crops took in this process, for the total.
      compiled: steps that other trainings compiled, by all that they depend on; this one uses what
        fits and adds its own.

    Returns:
      The timings of the whole run, resumed or not.

    Raises:
      Error: the loss is not finite, the batch does not fit the devices, or a checkpoint is damaged.
      Interrupted: SIGTERM or Ctrl-C, after saving.
    """
    start = time.monotonic() - prepare_s
    compiled = {} if compiled is None else compiled
    labels, class_names = arrays["train"].labels, crop_set.class_names
    if recipe.batch_size > len(labels):
        text = "train.batch_size=%d is more than the %d training crops: steps see some twice"
        logger.warning(text, recipe.batch_size, len(labels))
    steps_per_epoch = num_batches(len(labels), recipe.batch_size)
    num_steps = steps_per_epoch * recipe.num_epochs
    phases = [(recipe.num_epochs, recipe.freeze)]  # last epoch, what is frozen until then
    if recipe.freeze_epochs:
        phases = [(recipe.freeze_epochs, recipe.freeze), (recipe.num_epochs, ())]
    devices = mesh.make_mesh()
    rows = mesh.local_rows(recipe.batch_size, devices)
    model_args = {**recipe.model, "num_classes": len(class_names)}
    model = create_model(**model_args)
    schedule = optim.make_schedule(recipe.schedule, recipe.learning_rate, num_steps)
    make_optimizer = functools.partial(
        optim.make_optimizer, schedule, recipe.momentum, recipe.weight_decay, recipe.multipliers
    )
    init_key, step_key = jax.random.split(jax.random.key(recipe.seed))

    def create(key: jax.Array) -> TrainState:
        # What is frozen makes no difference to the form of the optimiser's state.
        channels = arrays["train"].images.shape[-1]
        shape = (1, 32, 32, 3 if channels == 1 else channels)
        return create_train_state(model, make_optimizer(), sample_shape=shape, key=key)

    if checkpoints.list_steps(workdir.checkpoints):
        state, meta = checkpoints.restore(workdir.checkpoints, jax.eval_shape(create, init_key))
        check_crops(meta, crop_set, workdir)
        logger.info("resuming at step %d of %d", meta.step, num_steps)
    else:
        state, init_record = initialize(create(init_key), init, class_names=class_names)
        meta = CheckpointMeta(
            step=0,
            num_steps=num_steps,
            progress=Progress(prepare_s=prepare_s),
            normalization=fit_normalization(arrays["train"].images, recipe.normalize),
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            class_names=tuple(class_names),
            manifest_sha256=crop_set.manifest_sha256,
            model=model_args,
            init=init_record,
            images_by_split=images_by_split(crop_set, init),
        )
    crops = Inputs(arrays["train"].images, arrays["val"].images, meta.normalization)
    state, step, progress = mesh.replicate(state, devices), meta.step, meta.progress
    began = start - progress.total_s
    class_weights = _class_weights(recipe.class_weights, labels)
    pending: dict[str, jax.Array] = {}  # what training to `step` returned, still being computed
    clock = start  # of training, validation and saving apart

    @jax.jit
    def draw(step: int) -> jax.Array:
        key = own_key(jax.random.fold_in(step_key, step), "dihedral")
        return draw_symmetries(key, recipe.batch_size)

    def make_batches(inputs: Inputs) -> Iterator[dict[str, jax.Array]]:
        numbers, size, seed = np.arange(len(labels)), recipe.batch_size, recipe.seed
        batches = train_batches(numbers, labels, size, seed=seed, first_step=step, rows=rows)
        for number, batch in enumerate(batches, step):
            # The symmetries that the step itself would draw.
            symmetry = np.asarray(draw(number))[rows] if inputs.has_symmetries else 0
            row = symmetry * len(labels) + batch["image"]
            yield mesh.shard_batch({**batch, "image": inputs.train[row]}, devices)

    def compile_steps(freeze: tuple[str, ...], inputs: Inputs) -> tuple[TrainState, Any, Any]:
        """Returns the state for a phase, and its steps of training and of evaluation."""
        batch = next(make_batches(inputs))
        what = dataclasses.replace(recipe, seed=0), freeze, inputs.first_segment, meta.normalization
        key = repr((*what, num_steps, class_weights, jax.tree.map(jax.typeof, batch)))
        if key not in compiled:
            clock = time.monotonic()
            first = inputs.first_segment
            apply_fn = functools.partial(model.apply, first=first) if first else model.apply
            tx = make_optimizer(freeze=freeze)
            augmentation = {} if first else recipe.augmentation
            train_step: Any = steps.make_train_step(
                inputs.normalize, recipe.label_smoothing, class_weights, augmentation, freeze
            )
            arguments = state.replace(apply_fn=apply_fn, tx=tx), batch, step_key
            train_step = mesh.jit_train_step(train_step, devices).lower(*arguments).compile()
            eval_step = mesh.jit_step(steps.make_eval_step(inputs.normalize), devices)
            compiled[key] = apply_fn, tx, train_step, eval_step
            progress.compile_s += time.monotonic() - clock
        apply_fn, tx, train_step, eval_step = compiled[key]
        progress.step_bytes = max(progress.step_bytes, mesh.bytes_of(train_step))
        return state.replace(apply_fn=apply_fn, tx=tx), train_step, eval_step

    def read() -> None:
        """Waits for the step under way, if there is one, and adds it to the progress."""
        nonlocal pending, clock
        if pending:
            values = jax.device_get(pending)
            check_finite(step, {"loss": values["loss"]})
            for name in progress.totals:
                progress.totals[name] += values[name].item()
            pending, before, clock = {}, clock, time.monotonic()
            progress.epoch_s += clock - before

    def save(metrics: Mapping[str, float] | None = None) -> None:
        read()
        progress.total_s = time.monotonic() - began
        checkpoints.save(workdir.checkpoints, state, dataclasses.replace(meta, step=step), metrics)

    def check_stop() -> None:
        if stop.signal:
            text = f"stopped at step {step} of {num_steps}; the same command resumes there"
            raise Interrupted(text, stop.signal)

    def finish_epoch(eval_step: Any, images: np.ndarray) -> str:
        """Validates, writes both records, saves, and returns a line."""
        read()
        trained = progress.finish_epoch() | {"learning_rate": float(schedule(step - 1))}
        batches = eval_batches(images, arrays["val"].labels, recipe.batch_size, rows)
        val = _means(eval_step(state, mesh.shard_batch(batch, devices)) for batch in batches)
        check_finite(step, {"validation": val})
        epoch = step // steps_per_epoch
        write({"step": step, "epoch": epoch, "split": "train", **trained})
        write({"step": step, "epoch": epoch, "split": "val", **val})
        save(val)
        return (
            f"epoch {epoch}/{recipe.num_epochs}  train loss {trained['loss']:.4f} accuracy "
            f"{trained['accuracy']:.3f}  val loss {val['loss']:.4f} accuracy {val['accuracy']:.3f} "
            f"balanced {val['balanced_accuracy']:.3f}  {trained['images_per_second']:.1f} images/s"
        )

    def remaining() -> str:
        read()
        seconds = (time.monotonic() - phase_began) / (step - first_step) * (last_step - step)
        return f"about {duration(seconds)} for the next {last_step - step} steps"

    with (
        discarded_at_the_end(workdir.features),
        open_metrics(workdir, first_step=step) as write,
        StopRequest() as stop,
        tqdm(total=num_steps, initial=step, unit="step", disable=None, dynamic_ncols=True) as bar,
    ):
        for last_epoch, freeze in phases:
            first_step, last_step = step, last_epoch * steps_per_epoch
            if step >= last_step:
                continue
            inputs = crops
            if freeze:
                inputs = make_inputs(
                    *(model, state.variables, crops, recipe, last_epoch, workdir.features),
                    before=progress.features_s > 0 if step else None,
                    check_stop=check_stop,
                )
            if not progress.features_s:  # a resumed run counts them once
                progress.features_s = inputs.features_s
                progress.compile_s += inputs.compile_s
            state, train_step, eval_step = compile_steps(freeze, inputs)
            batches, saved = make_batches(inputs), step
            clock = phase_began = time.monotonic()
            while step < last_step:
                if stop.requested(step + 1):
                    if saved < step:
                        save()
                    check_stop()
                state, totals = train_step(state, next(batches), step_key)
                read()  # the step before: the device never waits for this process
                pending, step = totals, step + 1
                bar.update()
                if step == first_step + _ESTIMATE_AFTER < last_step:
                    logger.info("%s, validation apart", remaining())
                if step % steps_per_epoch == 0:
                    line = finish_epoch(eval_step, inputs.val)
                    logger.info("%s%s", line, f"; {remaining()}" if step < last_step else "")
                elif recipe.every_steps and step % recipe.every_steps == 0:
                    save()
                else:
                    continue
                saved, clock = step, time.monotonic()
        check_stop()  # during the last step, or what came after it
    progress.total_s = time.monotonic() - began
    return progress


def check_crops(meta: CheckpointMeta, crop_set: CropSet, workdir: Workdir) -> None:
    """Refuses to go on, or to evaluate, with other crops than a checkpoint was trained on.

    Raises:
      Error: the crops differ, and images may have changed sides.
    """
    if meta.manifest_sha256 != crop_set.manifest_sha256:
        raise Error(
            f"{workdir}: the checkpoints were trained on other crops than those in "
            f"{crop_set.directory}; choose another workdir for these"
        )


def _means(batches: Iterable[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Returns exact means over a split from the totals of its batches, see `make_eval_step`."""
    loss, confusion = 0.0, np.zeros(())
    for totals in map(jax.device_get, batches):
        loss, confusion = loss + float(totals["loss"]), confusion + totals["confusion"]
    return {
        "loss": loss / float(confusion.sum()),
        "accuracy": float(np.trace(confusion) / confusion.sum()),
        "balanced_accuracy": float(np.mean(np.diag(confusion) / confusion.sum(axis=1))),
    }


def _class_weights(kind: str, labels: np.ndarray) -> tuple[float, ...] | None:
    """Returns N / (K n_k) for every class k, or None for equal weights."""
    if kind == "none":
        return None
    counts = np.bincount(labels)
    return tuple(float(weight) for weight in counts.sum() / (len(counts) * counts))
