"""Plain, residual and pre-activation networks of one depth: what gradient each layer receives."""

import csv
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxcells.data.arrays import SplitArrays
from jaxcells.data.loader import num_batches, train_batches
from jaxcells.data.normalization import Normalization, fit_normalization
from jaxcells.evaluation.gradient_figures import describe_gradients, plot_gradients
from jaxcells.files import Error, lock_workdir, write_whole
from jaxcells.models import MODEL_NAMES, create_model
from jaxcells.training import mesh, optim, steps
from jaxcells.training.gradients import depths, measure_gradients, record_norms
from jaxcells.training.state import create_train_state
from jaxcells.workflows.prepare import prepare_data

logger = logging.getLogger("jaxcells")

_KINDS = ("plain", "resnet", "preact")

Row = dict[str, Any]


def compare_gradients(config: ConfigDict, workdir: Path) -> None:
    """Measures the gradient of every layer in networks with and without shortcuts and norms.

    The plain, the residual and the pre-activation network of the depth of `model.name`, each with
    its norms and without, begin at random, kernels of one name with the same values, and train for
    `train.num_epochs` epochs on the same batches. `init` does not count, nor do augmentation, label
    smoothing, class weights and freezing: the loss is the plain cross entropy of the crops as they
    are.

    Leaves in `workdir/gradients`: gradients.png and its caption gradients.md; gradients.csv, a line
    per network, state and layer; losses.csv, a line per network and step.

    Args:
      config: a validated config.
      workdir: the run's folder, made if it is absent.

    Raises:
      Error: the depth does not exist in all three kinds, or anything about images and batch size
        that a user can mend.
    """
    names = _networks(config.model.name)
    devices = mesh.make_mesh()
    mesh.local_rows(config.train.batch_size, devices)
    note = mesh.accelerator_note()
    if note:
        logger.warning("%s", note)
    with lock_workdir(workdir):
        data = prepare_data(config, workdir)
        data.audit.raise_errors()
        train_set, num_classes = data.arrays["train"], len(data.crop_set.class_names)
        num_steps = config.train.num_epochs * num_batches(
            len(train_set.labels), config.train.batch_size
        )
        normalization = fit_normalization(train_set.images, config.data.normalize)
        logger.info(
            "%s, with norms and without, from random parameters: %d steps each",
            ", ".join(names),
            num_steps,
        )
        rows: list[Row] = []
        losses: list[Row] = []
        variants = [(name, norms) for norms in (True, False) for name in names]
        for name, norms in tqdm(variants, unit="network", dynamic_ncols=True):
            model_args = dict(config.model, name=name, norms=norms, num_classes=num_classes)
            if name.startswith("preact"):
                model_args["scan"] = False  # as the others run, with a name for every layer
            layers, trace = _measure(
                config, model_args, train_set, normalization, num_steps, devices
            )
            network = {"network": name, "norms": norms}
            rows += [network | row for row in layers]
            losses += [network | {"step": step, "loss": loss} for step, loss in enumerate(trace)]

        directory = workdir / "gradients"
        directory.mkdir(exist_ok=True)
        _write_csv(directory / "gradients.csv", rows)
        _write_csv(directory / "losses.csv", losses)
        plot_gradients(rows, losses, directory / "gradients.png")
        caption = describe_gradients(rows, losses, setting=_setting(config, train_set))
        with write_whole(directory / "gradients.md") as file:
            file.write(caption + "\n")
        print(caption)
        logger.info("figure, caption and numbers are in %s", directory)


def _networks(name: str) -> list[str]:
    """Returns the networks of the depth of `name`, one of each kind.

    Raises:
      Error: one of them does not exist.
    """
    depth = re.sub(r"\D", "", name)
    names = [kind + depth for kind in _KINDS]
    if not set(names) <= set(MODEL_NAMES):
        missing = [name for name in names if name not in MODEL_NAMES]
        common = [
            known
            for known in MODEL_NAMES
            if known.startswith("resnet")
            and all(kind + known.removeprefix("resnet") in MODEL_NAMES for kind in _KINDS)
        ]
        raise Error(
            f"model.name={name!r}: there is no {' and no '.join(missing)} to compare it with; set "
            f"--config.model.name to one of {', '.join(common)}"
        )
    return names


def _measure(
    config: ConfigDict,
    model_args: Mapping[str, Any],
    train_set: SplitArrays,
    normalization: Normalization,
    num_steps: int,
    devices: jax.sharding.Mesh,
) -> tuple[list[Row], list[float]]:
    """Returns the rows of one network, and its loss at every step."""
    schedule = optim.make_schedule(
        config.optim.schedule, learning_rate=config.optim.learning_rate, num_steps=num_steps
    )
    optimizer = optim.make_optimizer(
        schedule, momentum=config.optim.momentum, weight_decay=config.optim.weight_decay
    )
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    state = create_train_state(
        create_model(**model_args),
        optax.chain(record_norms(), optimizer),
        sample_shape=normalization(train_set.images[:1]).shape,
        key=init_key,
    )
    rows = mesh.local_rows(config.train.batch_size, devices)
    batches = train_batches(
        train_set.images, train_set.labels, config.train.batch_size, seed=config.seed, rows=rows
    )
    measured, losses = measure_gradients(
        mesh.replicate(state, devices),
        mesh.jit_train_step(steps.make_train_step(normalization), devices),
        (mesh.shard_batch(batch, devices) for batch in batches),
        num_steps=num_steps,
        key=step_key,
    )
    layers = [
        {
            "step": state.step,
            "loss": state.loss,
            "depth": depth,
            "layer": layer,
            "gradient_norm": state.gradient_norms[layer],
            "weight_norm": state.weight_norms[layer],
            "ratio": float(np.divide(state.gradient_norms[layer], state.weight_norms[layer])),
        }
        for state in measured
        for layer, depth in depths(state.gradient_norms).items()
    ]
    return layers, losses


def _setting(config: ConfigDict, train_set: SplitArrays) -> str:
    """Says in words what a reader must know of the training."""
    height, width = train_set.images.shape[1:3]
    optim = config.optim
    return (
        f"first stage of {config.model.width} channels, {height}x{width} crops, batches of "
        f"{config.train.batch_size}, SGD with learning rate {optim.learning_rate:g} "
        f"({optim.schedule}), momentum {optim.momentum:g} and weight decay "
        f"{optim.weight_decay:g}, seed {config.seed}"
    )


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows with the same keys; None as an empty cell, infinity and NaN as inf and nan."""
    with write_whole(path) as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
