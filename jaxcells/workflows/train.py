"""A whole run in one workdir: data, training, and the test split opened once at the end."""

import contextlib
import dataclasses
import gc
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcells.config import data_seed, data_source, differences, parse_multipliers
from jaxcells.data.arrays import with_fraction
from jaxcells.data.audit import count_crops
from jaxcells.data.splits import find_groups
from jaxcells.environment import describe_environment
from jaxcells.evaluation import predict
from jaxcells.evaluation.baseline import baseline_predictions
from jaxcells.evaluation.evidence import gather_evidence
from jaxcells.evaluation.figures import draw_curves, plot_confusion, plot_examples, save_figure
from jaxcells.evaluation.metrics import split_metrics
from jaxcells.evaluation.predictions import write_predictions
from jaxcells.evaluation.results import RunResults, Timing
from jaxcells.files import Error, Workdir, lock_workdir, logger, read_json, write_json
from jaxcells.models import create_model
from jaxcells.text import one_line
from jaxcells.training import mesh
from jaxcells.training.checkpoints import CheckpointMeta, list_steps
from jaxcells.training.freeze import check_patterns
from jaxcells.training.initialization import Initialization, check_no_leak, find_initialization
from jaxcells.training.loop import train
from jaxcells.training.progress import Progress, read_metrics
from jaxcells.training.recipe import Recipe
from jaxcells.workflows.prepare import PreparedData, check_place, prepare_crops, prepare_data
from jaxcells.workflows.report import read_results, report


def train_and_evaluate(config: ConfigDict, workdir: Workdir) -> RunResults:
    """Makes crops, trains, and evaluates the best checkpoint on the test split, once.

    The same call resumes a run that was stopped, and returns the results of one that is finished.

    Args:
      config: a validated config.
      workdir: the run's, made if it is absent.

    Raises:
      Error: anything a user can mend.
      Interrupted: SIGTERM or Ctrl-C during training, after saving.
    """
    check_place(config, workdir)
    with keep_workdir(workdir, "run"):
        check_config(config, workdir)
        if workdir.results.exists():
            before = read_json(workdir.config)["data"]
            if (config.data.root, config.data.sheet) != (before["root"], before["sheet"]):
                prepare_crops(config, workdir)  # refuses other images than those of the run
            results = read_results(workdir)
            logger.info("this run is finished; its results are in %s", workdir.results)
        else:
            init = find_start(config, workdir)
            mesh.warn_of_cpu()
            data = prepare_together(config, workdir)
            progress = train_run(config, workdir, data, init)
            results = open_test_split(config, workdir, data, progress)
            logger.info("results, figures and predictions are in %s", workdir)
        if mesh.is_primary():
            if not workdir.report.exists():
                report(workdir)
            print(results.summary())
        return results


@contextlib.contextmanager
def keep_workdir(workdir: Workdir, kind: str) -> Iterator[None]:
    """Locks a workdir for something of a kind: the first of several processes does so for all.

    Raises:
      Error: another process holds it, or it is of something else.
    """
    kinds = {"comparison": workdir.experiments.is_dir(), "cross-validation": workdir.folds.is_dir()}
    with lock_workdir(workdir.path) if mesh.is_primary() else contextlib.nullcontext():
        for other, is_there in {"run": workdir.is_trained, **kinds}.items():
            if is_there and other != kind:
                raise Error(f"{workdir} is the workdir of a {other}; choose another workdir")
        yield


def check_config(config: ConfigDict, workdir: Workdir) -> None:
    """Refuses to work in a trained workdir under another config.

    Raises:
      Error: names the keys that differ.
    """
    if workdir.is_trained:
        changed = differences(ConfigDict(read_json(workdir.config)), config)
        if changed:
            raise Error(
                f"{workdir} was trained with another config: {'; '.join(changed)}; go back to it, "
                f"or choose another workdir, where init={workdir} starts from its best checkpoint"
            )


def find_start(config: ConfigDict, workdir: Workdir) -> Initialization:
    """Checks what the network and `init` of a config need, before anything expensive.

    Returns:
      Where the first parameters come from, fetched; of no meaning to a run that has checkpoints.

    Raises:
      Error: weights that cannot be had, or expressions that match no parameter.
    """
    recipe = make_recipe(config)
    model = create_model(**recipe.model, num_classes=2)
    inputs = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), inputs)
    check_patterns(recipe.freeze, recipe.multipliers, shapes["params"])
    if list_steps(workdir.checkpoints) or workdir.results.exists():
        return Initialization("random")
    name, conv1, is_sample = config.model.name, config.init_conv1, data_source(config) == "sample"
    init = find_initialization(config.init, name, conv1, random_if_missing=is_sample)
    if recipe.freeze and (init.kind == "random" or init.conv1 == "fresh"):
        logger.warning(
            "optim.freeze keeps layers that start at random, and have learnt nothing; start from "
            "ImageNet weights (init=imagenet), a file or an earlier run"
        )
    return init


def prepare_together(config: ConfigDict, workdir: Workdir) -> PreparedData:
    """Lets one process write what all then read; the folder must be one that all see.

    Raises:
      Error: anything wrong with the images or settings, errors of the audit included.
    """
    data = prepare_data(config, workdir) if mesh.is_primary() else None
    mesh.wait_for_all("data prepared")
    data = data or prepare_data(config, workdir)
    data.audit.raise_errors()
    return data


def make_recipe(config: ConfigDict) -> Recipe:
    """Returns what the keys of a config say about training."""
    sgd = config.optim.to_dict()
    sgd["multipliers"] = parse_multipliers(sgd["multipliers"])
    return Recipe(
        model=config.model.to_dict(),
        seed=config.seed,
        normalize=config.data.normalize,
        augmentation=config.data.augment.to_dict(),
        **sgd,
        **config.train,
        **config.checkpoint,
    )


def train_run(
    config: ConfigDict,
    workdir: Workdir,
    data: PreparedData,
    init: Initialization,
    compiled: dict[str, Any] | None = None,
) -> Progress:
    """Trains a run to its last epoch, or finds it trained. The test split is not touched.

    Args:
      config: the run's.
      workdir: the run's.
      data: the crops.
      init: what `find_start` returned.
      compiled: see `loop.train`.

    Raises:
      Error: anything a user can mend.
      Interrupted: SIGTERM or Ctrl-C during training, after saving.
    """
    check_no_leak(init, data.crop_set)
    if mesh.is_primary():
        write_json(workdir.config, config.to_dict())
        environment = {**describe_environment(), "devices": mesh.describe_devices()}
        write_json(workdir.environment, environment)
    recipe, arrays = make_recipe(config), _trained_on(config, data).arrays
    return train(recipe, data.crop_set, arrays, init, workdir, data.seconds, compiled)


def _trained_on(config: ConfigDict, data: PreparedData) -> PreparedData:
    """Keeps the share `data.fraction` of the training images, and counts these alone."""
    kept = with_fraction(data.arrays["train"], config.data.fraction, seed=data_seed(config))
    counts = {**data.audit.counts, "train": count_crops(kept.records, data.crop_set.class_names)}
    return dataclasses.replace(
        data,
        arrays={**data.arrays, "train": kept},
        audit=dataclasses.replace(data.audit, counts=counts),
    )


def open_test_split(
    config: ConfigDict,
    workdir: Workdir,
    data: PreparedData,
    progress: Progress,
    compiled: dict[str, Any] | None = None,
) -> RunResults:
    """Opens the test split for the best checkpoint of a trained run, once, and writes the results.

    Args:
      config: the run's.
      workdir: the run's.
      data: the crops that it was trained on.
      progress: what `train_run` returned.
      compiled: see `loop.train`.
    """
    start, data = time.monotonic(), _trained_on(config, data)
    network = predict.load_network(workdir, "best", compiled)
    meta, arrays = network.meta, data.arrays
    train = arrays["train"]
    validation, val_compile_s, val_s = predict.predict_split(network, arrays["val"])
    calibration = predict.calibrate(network, validation, workdir)
    if mesh.is_primary():
        write_json(workdir.calibration, dataclasses.asdict(calibration))
    opened = predict.write_history(workdir, "train", "test", meta.step) if mesh.is_primary() else 0
    tested, test_compile_s, test_s = predict.predict_split(network, arrays["test"])
    validation, tested = map(calibration.apply, (validation, tested))
    baselines = baseline_predictions(train.images, train.labels, arrays["test"].images)
    tested = dataclasses.replace(tested, baselines=baselines)
    batches = find_groups(tested.sources.tolist(), config.data.batch_by, "data.batch_by")
    test_metrics = split_metrics(tested, seed=meta.seed)
    results = RunResults(
        validation=split_metrics(validation, seed=meta.seed),
        test=test_metrics,
        test_opened=opened,
        evidence=gather_evidence(tested, seed=meta.seed, batches=batches),
        # The bank is large, and stands in calibration.json.
        calibration=dataclasses.replace(calibration, unknown_bank=""),
        init=meta.init,
        data=_describe_data(config, data, meta),
        timing=Timing(
            crop_s=progress.prepare_s,
            compile_s=progress.compile_s + val_compile_s + test_compile_s,
            features_s=progress.features_s,
            train_s=progress.train_s,
            typical_train_s=progress.typical_train_s(config.optim.freeze_epochs),
            evaluate_s=val_s + test_s,
            total_s=progress.total_s + time.monotonic() - start,
            train_images_per_second=progress.images / progress.train_s,
            eval_images_per_second=(len(validation.labels) + len(tested.labels)) / (val_s + test_s),
        ),
        memory={"train_step_bytes": progress.step_bytes},
        best_step=meta.step,
        num_steps=meta.num_steps,
        num_epochs=config.train.num_epochs,
        model=meta.model,
        environment=read_json(workdir.environment),
    )
    if mesh.is_primary():
        write_predictions(workdir.predictions("val"), validation)
        write_predictions(workdir.predictions("test"), tested)
        names, brightness = meta.class_names, results.evidence.baselines["brightness"].accuracy
        levels = {"chance": 1 / len(names), "brightness": brightness}
        curves = draw_curves(read_metrics(workdir.metrics), levels, best_step=meta.step)
        save_figure(curves, workdir.figure("curves"))
        number, fields = test_metrics.num_crops, test_metrics.num_fields
        footer = [f"accuracy {test_metrics.scores['accuracy']}"]
        footer += [test_metrics.interval_note] if test_metrics.interval_note else []
        if shared := data.audit.shared_pixels["test"]:
            footer.append(f"training shows {shared:.1%} of these pixels")
        plot_confusion(
            *(test_metrics.confusion_matrix, names, workdir.figure("confusion")),
            title=f"test split: {number} crops of {fields} independent fields (groups)",
            footer="; ".join(footer),
        )
        plot_examples(train.images, train.labels, names, workdir.figure("crops"))
        # Written last: its presence says that the run is finished.
        write_json(workdir.results, dataclasses.asdict(results))
    return results


@contextlib.contextmanager
def failures_noted(label: str, failures: dict[str, str]) -> Iterator[None]:
    """Notes why one of several trainings failed, for the others to go on; a bug stops them all."""
    try:
        yield
    except (Error, MemoryError, jax.errors.JaxRuntimeError) as error:
        failures[label] = one_line(error)
        logger.warning("%s failed: %s", label, error)
    gc.collect()  # tracebacks keep arrays alive in circles


def raise_failures(failures: Mapping[str, str]) -> None:
    """Raises an Error that lists the trainings which failed, if there are any."""
    if failures:
        listed = "; ".join(f"{label}: {text}" for label, text in failures.items())
        found = f"{len(failures)} of the trainings failed ({listed})"
        raise Error(f"{found}; the same command tries them again")


def _describe_data(config: ConfigDict, data: PreparedData, meta: CheckpointMeta) -> dict[str, Any]:
    crop_set, images = data.crop_set, data.arrays["train"].images
    return {
        "source": data_source(config),
        "root": config.data.root or config.data.sheet,
        "split_by": "as found" if crop_set.came_split else crop_set.split_by,
        "classes": list(crop_set.class_names),
        "crops_per_class": {
            split: {name: count["crops"] for name, count in counts.items()}
            for split, counts in data.audit.counts.items()
        },
        "image": {"shape": list(images.shape[1:]), "dtype": images.dtype.name},
        "normalization": dataclasses.asdict(meta.normalization),
        "notes": list(crop_set.notes),
        "audit": dataclasses.asdict(data.audit),
    }
