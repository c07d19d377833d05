"""A whole run in one workdir: data, training, and the test split opened once at the end."""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxcells.config import data_source, differences, parse_multipliers
from jaxcells.data.arrays import open_arrays
from jaxcells.data.crop_set import open_crop_set, verify_pixels
from jaxcells.data.fields import SPLITS
from jaxcells.environment import describe_environment
from jaxcells.evaluation.baseline import mean_std_baseline
from jaxcells.evaluation.figures import plot_confusion, plot_curves, plot_examples
from jaxcells.evaluation.metrics import summary_table
from jaxcells.evaluation.predict import (
    load_network,
    predict_split,
    split_metrics,
    write_history,
    write_predictions,
)
from jaxcells.files import Error, lock_workdir, read_json, write_json
from jaxcells.models import create_model
from jaxcells.text import duration
from jaxcells.training import mesh
from jaxcells.training.checkpoints import Which, list_steps
from jaxcells.training.freeze import check_patterns
from jaxcells.training.initialization import (
    Initialization,
    check_no_leak,
    find_initialization,
)
from jaxcells.training.loop import check_crops, train
from jaxcells.training.progress import Progress, read_metrics
from jaxcells.workflows.prepare import PreparedData, prepare_crops, prepare_data

logger = logging.getLogger("jaxcells")

Results = dict[str, Any]


def train_and_evaluate(config: ConfigDict, workdir: Path) -> Results:
    """Makes crops, trains, and evaluates the best checkpoint on the test split, once.

    The same call resumes a run that was stopped, and returns the results of one that is finished.

    Args:
      config: a validated config.
      workdir: the run's folder, made if it is absent.

    Returns:
      What is in results.json.

    Raises:
      Error: anything a user can mend.
      Interrupted: SIGTERM or Ctrl-C during training, after saving.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    # Of several processes the first one keeps the workdir for all.
    with lock_workdir(workdir) if _is_primary() else contextlib.nullcontext():
        check_config(config, workdir)
        results_path = workdir / "results.json"
        if results_path.exists():
            results: Results = read_json(results_path)
            if config.data.root != read_json(workdir / "config.json")["data"]["root"]:
                prepare_crops(config, workdir)  # refuses other images than those of the run
            logger.info("this run is finished; its results are in %s", results_path)
            print(_summary(results))
            return results

        init = find_start(config, workdir)
        note = mesh.accelerator_note()
        if note:
            logger.warning("%s", note)
        data = prepare_together(config, workdir)
        data.audit.raise_errors()
        progress = train_run(config, workdir, data, init)
        results = open_test_split(config, workdir, data, progress)
        if _is_primary():
            print(_summary(results))
            logger.info("results, figures and predictions are in %s", workdir)
        return results


def find_start(config: ConfigDict, workdir: Path) -> Initialization:
    """Checks what the network and `init` of a config need, before anything expensive.

    Returns:
      Where the first parameters come from, fetched; of no meaning to a run that has checkpoints.

    Raises:
      Error: weights that cannot be had, or expressions that match no parameter.
    """
    model = create_model(**config.model, num_classes=2)
    inputs = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), inputs)
    check_patterns(
        config.optim.freeze, parse_multipliers(config.optim.multipliers), shapes["params"]
    )
    if list_steps(workdir / "checkpoints") or (workdir / "results.json").exists():
        return Initialization("random")
    init = find_initialization(
        config.init,
        config.model.name,
        random_if_missing=data_source(config) == "sample",
        conv1=config.init_conv1,
    )
    if init.kind == "random" and config.optim.freeze:
        logger.warning(
            "optim.freeze keeps layers that start at random, and have learnt nothing; start from "
            "ImageNet weights, a file or an earlier run (--config.init)"
        )
    return init


def train_run(
    config: ConfigDict, workdir: Path, data: PreparedData, init: Initialization
) -> Progress:
    """Trains a run to its last epoch, or finds it trained. The test split is not touched.

    Raises:
      Error: anything a user can mend.
      Interrupted: SIGTERM or Ctrl-C during training, after saving.
    """
    start = time.monotonic() - data.seconds
    check_no_leak(init, data.crop_set)
    if _is_primary():
        write_json(workdir / "config.json", config.to_dict())
        environment = {**describe_environment(), "devices": mesh.describe_devices()}
        write_json(workdir / "environment.json", environment)
    return train(config, workdir, data, init, start=start)


def evaluate(workdir: Path, *, split: str, which: Which) -> Results:
    """Evaluates a checkpoint of a workdir on one split; opening "test" is written to its history.

    Args:
      workdir: the folder of a run.
      split: "train", "val" or "test".
      which: a step, "latest" or "best".

    Returns:
      The split's figures, as in results.json.

    Raises:
      Error: not a workdir, no such checkpoint or split, or crops that changed.
    """
    if split not in SPLITS:
        raise Error(f"--split={split}: there is no such split; use one of {', '.join(SPLITS)}")
    network = load_network(workdir, which)
    crop_set = open_crop_set(workdir / "crops")
    check_crops(network.meta, crop_set, workdir)
    verify_pixels(crop_set)
    there = (workdir / "arrays").is_dir()
    # Reading is safe beside a training, writing is not.
    with contextlib.nullcontext() if there else lock_workdir(workdir):
        arrays = open_arrays(crop_set, workdir / "arrays")[split]
    opened = write_history(workdir, "evaluate", split, network.step)
    if split == "test":
        logger.info("the test split of this run has now been opened %d times", opened)
    probabilities, seconds = predict_split(network, arrays, network.meta["batch_size"])
    metrics = split_metrics(probabilities, arrays, network.class_names, seed=network.meta["seed"])
    metrics |= {"checkpoint": network.step, "evaluate_s": seconds["evaluate_s"]}
    name = f"{split}_step{network.step}"
    write_json(workdir / f"evaluation_{name}.json", metrics)
    write_predictions(
        workdir / f"predictions_{name}.csv", arrays.records, probabilities, network.class_names
    )
    print(summary_table(metrics, f"{split} split, checkpoint of step {network.step}"))
    logger.info("written to %s", workdir / f"evaluation_{name}.json")
    return metrics


def check_config(config: ConfigDict, workdir: Path) -> None:
    """Refuses to work in a trained workdir under another config.

    Raises:
      Error: names the keys that differ.
    """
    if (workdir / "experiments").is_dir():
        raise Error(f"{workdir} is the workdir of a comparison; choose another --workdir")
    if list_steps(workdir / "checkpoints") or (workdir / "results.json").exists():
        changed = differences(ConfigDict(read_json(workdir / "config.json")), config)
        if changed:
            raise Error(
                f"{workdir} was trained with another config: {'; '.join(changed)}; go back to it, "
                "or choose another --workdir"
            )


def prepare_together(config: ConfigDict, workdir: Path) -> PreparedData:
    """Lets one process write what all then read; the folder must be one that all see."""
    if jax.process_count() == 1:
        return prepare_data(config, workdir)
    data = prepare_data(config, workdir) if _is_primary() else None
    multihost_utils.sync_global_devices("data prepared")
    return data or prepare_data(config, workdir)


def open_test_split(
    config: ConfigDict, workdir: Path, data: PreparedData, progress: Progress
) -> Results:
    """Opens the test split for the best checkpoint of a trained run, once, and writes the results.

    Args:
      config: the run's.
      workdir: the run's folder.
      data: the crops that it was trained on.
      progress: what `train_run` returned.

    Returns:
      What is in results.json.
    """
    start = time.monotonic()
    network = load_network(workdir, "best")
    opened = write_history(workdir, "train", "test", network.step) if _is_primary() else 0
    class_names, arrays = network.class_names, data.arrays
    results: Results = {}
    seconds: dict[str, dict[str, float]] = {}
    probabilities: dict[str, np.ndarray] = {}
    for name, split in (("validation", arrays["val"]), ("test", arrays["test"])):
        probabilities[name], seconds[name] = predict_split(network, split, config.train.batch_size)
        results[name] = split_metrics(probabilities[name], split, class_names, seed=config.seed)
    if not _is_primary():
        return results

    train_set, test_set = arrays["train"], arrays["test"]
    results["test"]["opened"] = opened
    results["baseline"] = {
        "description": "linear classifier on each crop's mean and standard deviation per channel",
        "test_accuracy": mean_std_baseline(
            train_set.images, train_set.labels, test_set.images, test_set.labels
        ),
    }
    meta = network.meta
    num_evaluated = len(arrays["val"].labels) + len(test_set.labels)
    evaluate_s = sum(s["evaluate_s"] for s in seconds.values())
    crop_set = data.crop_set
    results |= {
        "init": meta["init"],
        "data": {
            "source": data_source(config),
            "root": config.data.root,
            "split_by": "as found" if crop_set.came_split else config.data.split_by,
            "classes": list(class_names),
            "crops_per_class": {
                side: {name: count["crops"] for name, count in counts.items()}
                for side, counts in data.audit.counts.items()
            },
            "fields_per_class": {
                side: {name: count["fields"] for name, count in counts.items()}
                for side, counts in data.audit.counts.items()
            },
            "image": {
                "shape": list(train_set.images.shape[1:]),
                "dtype": train_set.images.dtype.name,
            },
            "normalization": network.normalization.to_dict(),
            "notes": list(crop_set.notes),
            "audit": {
                "errors": list(data.audit.errors),
                "warnings": list(data.audit.warnings),
                "shared_pixels": dict(data.audit.shared_pixels),
            },
        },
        "timing": {
            "crop_s": progress.prepare_s,
            "compile_s": progress.compile_s + sum(s["compile_s"] for s in seconds.values()),
            "activations_s": progress.activations_s,
            "train_s": progress.train_s,
            "typical_train_s": progress.typical_train_s(config.optim.freeze_epochs),
            "validate_s": progress.validate_s,
            "checkpoint_s": progress.checkpoint_s,
            "evaluate_s": evaluate_s,
            "total_s": progress.total_s + time.monotonic() - start,
            "train_images_per_second": progress.images / progress.train_s,
            "eval_images_per_second": num_evaluated / evaluate_s,
        },
        "memory": {"train_step_bytes": progress.step_bytes},
        "best_step": network.step,
        "num_steps": meta["num_steps"],
        "num_epochs": config.train.num_epochs,
        "model": meta["model"],
        "environment": read_json(workdir / "environment.json"),
    }
    write_predictions(
        workdir / "predictions_test.csv", test_set.records, probabilities["test"], class_names
    )
    plot_curves(
        read_metrics(workdir / "metrics.jsonl"),
        workdir / "curves.png",
        best_step=network.step,
    )
    plot_confusion(
        results["test"]["confusion_matrix"],
        class_names,
        workdir / "confusion.png",
        title="test split",
    )
    plot_examples(train_set.images, train_set.labels, class_names, workdir / "crops.png")
    # Written last: its presence says that the run is finished.
    write_json(workdir / "results.json", results)
    return results


def _summary(results: Results) -> str:
    """Returns the table and the lines that the terminal shows at the end of a run."""
    timing, baseline = results["timing"], results["baseline"]["test_accuracy"]
    lines = [
        summary_table(
            results["test"], f"test split, best checkpoint (step {results['best_step']})"
        ),
        f"validation accuracy {results['validation']['accuracy']:.3f}; brightness and contrast of "
        f"the crops alone reach {baseline:.3f} on the test split",
        f"trained {results['num_epochs']} epochs in {duration(timing['train_s'])} at "
        f"{timing['train_images_per_second']:.1f} images/s; everything took "
        f"{duration(timing['total_s'])}",
    ]
    if results["test"]["accuracy"] <= baseline:
        lines.append(
            "WARNING: the network does no better than brightness and contrast of the crops alone"
        )
    if results["init"].get("warning"):
        lines.append(f"WARNING: {results['init']['warning']}")
    return "\n".join(lines)


def _is_primary() -> bool:
    return jax.process_index() == 0
