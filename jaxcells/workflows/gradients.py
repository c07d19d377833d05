"""Plain, residual and pre-activation networks of one depth: what gradient each layer receives.

What is measured is the gradient that a training step makes its update from: a link in front of the
optimiser keeps it in its state, so that the step of `training.steps` serves unchanged.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxcells.data.loader import num_batches, train_batches
from jaxcells.data.normalization import fit_normalization
from jaxcells.evaluation.gradient_figures import Measurement, describe_gradients, plot_gradients
from jaxcells.files import Error, Workdir, lock_workdir, logger, write_csv, write_whole
from jaxcells.models import MODEL_NAMES, create_model
from jaxcells.models.summary import summarize
from jaxcells.text import by
from jaxcells.training import mesh, optim, steps
from jaxcells.training.state import create_train_state
from jaxcells.workflows.prepare import PreparedData, prepare_data


def compare_gradients(config: ConfigDict, workdir: Workdir) -> None:
    """Measures the gradient of every layer in networks with and without shortcuts and norms.

    The plain, the residual and the pre-activation network of the depth of `model.name`, each with
    its norms and without, begin at random, kernels of one name with the same values, and train for
    `train.num_epochs` epochs on the same batches. `init` does not count, nor do augmentation, label
    smoothing, class weights and freezing: the loss is the plain cross entropy of the crops as they
    are.

    Leaves in `workdir/gradients`: gradients.png and its caption gradients.md; gradients.csv, a line
    per network, state and layer (projections on shortcuts left out); losses.csv, a line per network
    and step.

    Args:
      config: a validated config.
      workdir: the run's folder, made if it is absent.

    Raises:
      Error: the depth does not exist in all three kinds, or anything about images and batch size
        that a user can mend.
    """
    depth = re.sub(r"\D", "", config.model.name)
    names = [f"{kind}{depth}" for kind in ("plain", "resnet", "preact")]
    if missing := [name for name in names if name not in MODEL_NAMES]:
        raise Error(
            f"model.name={config.model.name!r}: there is no {' and no '.join(missing)} to compare "
            "it with; choose a depth that plain has too, such as model.name=resnet18"
        )
    mesh.local_rows(config.train.batch_size, mesh.make_mesh())
    mesh.warn_of_cpu()
    with lock_workdir(workdir.path):
        data = prepare_data(config, workdir)
        data.audit.raise_errors()
        logger.info("%s, with norms and without, from random parameters", ", ".join(names))
        measured: list[Measurement] = []
        variants = [*itertools.product((True, False), names)]
        for norms, name in tqdm(variants, unit="network", dynamic_ncols=True):
            measured += measure_gradients(config, data, name, norms=norms)
        _write(measured, workdir.path / "gradients", _setting(config, data))


def measure_gradients(
    config: ConfigDict, data: PreparedData, name: str, *, norms: bool
) -> list[Measurement]:
    """Trains a network; measures on the first batch, before the first step and after the last.

    Values that are not finite are measured like any other: nothing stops when a network diverges.

    Args:
      config: a validated config.
      data: it is trained on the training split.
      name: of the network, in place of the config's.
      norms: whether it has its batch norms.
    """
    images, labels = data.arrays["train"].images, data.arrays["train"].labels
    batch_size, sgd = config.train.batch_size, config.optim
    num_steps = config.train.num_epochs * num_batches(len(labels), batch_size)
    rate = optim.make_schedule(sgd.schedule, sgd.learning_rate, num_steps)
    optimizer = optim.make_optimizer(rate, momentum=sgd.momentum, weight_decay=sgd.weight_decay)
    tx = optax.chain(record_gradients(), optimizer)
    args = dict(config.model, name=name, norms=norms, num_classes=len(data.crop_set.class_names))
    model = create_model(**args, scan=False)  # each layer has a name of its own
    normalization = fit_normalization(images, config.data.normalize)
    shape = normalization(images[:1]).shape
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    state = create_train_state(model, tx, sample_shape=shape, key=init_key)
    # Projections lie on shortcuts, beside the way from image to logits.
    kernels = (layer for layer in summarize(model, shape[1:]) if layer.kind in ("conv", "dense"))
    layers = [layer.name for layer in kernels if not layer.in_shortcut]

    devices = mesh.make_mesh()
    state = mesh.replicate(state, devices)
    train_step = mesh.jit_train_step(steps.make_train_step(normalization), devices)
    rows = mesh.local_rows(batch_size, devices)
    batches = train_batches(images, labels, batch_size, seed=config.seed, rows=rows)
    first = next(batches)
    batches = itertools.chain([first], itertools.islice(batches, num_steps - 1), [first])
    measured, losses = [], []
    for step, batch in enumerate(batches):
        state, totals = train_step(state, mesh.shard_batch(batch, devices), step_key)
        losses.append(float(totals["loss"] / totals["count"]))
        if step in (0, num_steps):
            grads = flatten_dict(jax.device_get(state.opt_state[0]), sep="/")
            l2 = np.array([np.linalg.norm(grads[f"{layer}/kernel"]) for layer in layers], float)
            measured.append(Measurement(name, norms, step, tuple(losses), layers, l2))
    return measured


def record_gradients() -> optax.GradientTransformation:
    """Makes a first link for a chain, whose state is the gradients that it last passed on."""
    return optax.GradientTransformation(
        init=lambda params: params, update=lambda grads, state, params=None: (grads, grads)
    )


def _setting(config: ConfigDict, data: PreparedData) -> str:
    """Says in words what a reader must know of the training."""
    crops = by(data.arrays["train"].images.shape[1:3])
    return (
        f"first stage of {config.model.width} channels, {crops} crops, batches of "
        f"{config.train.batch_size}, SGD with learning rate {config.optim.learning_rate:g} "
        f"({config.optim.schedule}), momentum {config.optim.momentum:g} and weight decay "
        f"{config.optim.weight_decay:g}, seed {config.seed}"
    )


def _write(measured: Sequence[Measurement], folder: Path, setting: str) -> None:
    """Leaves figure, caption and numbers in a folder, and prints the caption."""
    folder.mkdir(exist_ok=True)
    header = ("network", "norms", "step", "loss")
    layers = [
        (m.network, m.norms, m.step, m.losses[-1], *layer)
        for m in measured
        for layer in zip(itertools.count(1), m.layers, m.gradient_norms, strict=False)
    ]
    write_csv(folder / "gradients.csv", (*header, "depth", "layer", "gradient_norm"), layers)
    losses = [(m.network, m.norms, *loss) for m in measured for loss in enumerate(m.losses[:-1])]
    write_csv(folder / "losses.csv", header, losses)
    plot_gradients(measured, folder / "gradients.png")
    caption = describe_gradients(measured, setting=setting)
    with write_whole(folder / "gradients.md") as file:
        file.write(caption + "\n")
    print(caption)
    logger.info("figure, caption and numbers are in %s", folder)
