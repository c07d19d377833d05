"""Several experiments on one crop set: trained, one chosen by validation, then tested.

The order is the evidence: every experiment is trained and predicts the validation split; the rule
chooses and compare/choice.json is written; only then is the test split opened, of any of them.
"""

import contextlib
import gc
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcells.config import Experiment
from jaxcells.environment import describe_environment
from jaxcells.evaluation.comparison import Choice, choose
from jaxcells.evaluation.predict import (
    has_opened,
    load_network,
    predict_split,
    write_predictions,
)
from jaxcells.files import Error, lock_workdir, read_json, write_json
from jaxcells.training import mesh
from jaxcells.training.checkpoints import list_steps
from jaxcells.training.signals import Interrupted
from jaxcells.workflows.comparison_report import (
    Trained,
    by_name,
    experiment_names,
    mean_over_seeds,
    read_predictions,
    training_folder,
    write_report,
)
from jaxcells.workflows.prepare import PreparedData
from jaxcells.workflows.train import (
    Results,
    check_config,
    find_start,
    open_test_split,
    prepare_together,
    train_run,
)

logger = logging.getLogger("jaxcells")

Failures = dict[str, str]

_PREDICTIONS = "predictions_val.csv"


def compare(base: ConfigDict, experiments: Sequence[Experiment], workdir: Path) -> None:
    """Trains, chooses, tests, and writes compare/ in the workdir.

    The same call resumes a comparison that was stopped, at the experiment and step where it was;
    what is finished is not trained again. An experiment that fails is reported, and the others go
    on.

    Args:
      base: the config of the crops.
      experiments: what to train.
      workdir: the comparison's folder; every run gets one below it.

    Raises:
      Error: the workdir is of something else; nothing could be trained; or, when all else is
        done, an experiment failed.
      Interrupted: SIGTERM or Ctrl-C during training, after saving.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with lock_workdir(workdir) if _is_primary() else contextlib.nullcontext():
        if list_steps(workdir / "checkpoints") or (workdir / "results.json").exists():
            raise Error(f"{workdir} is the workdir of a single run; choose another --workdir")
        for experiment in experiments:
            check_config(experiment.config, training_folder(workdir, experiment))
        failures: Failures = {}
        starts = _for_each(
            experiments, failures, lambda e: find_start(e.config, training_folder(workdir, e))
        )
        if not starts:
            first = next(iter(failures.values()))
            raise Error(f"none of the {len(experiments)} trainings can start; the first: {first}")
        note = mesh.accelerator_note()
        if note:
            logger.warning("%s", note)
        data = prepare_together(base, workdir)
        data.audit.raise_errors()
        if _is_primary():
            write_json(workdir / "config.json", base.to_dict())
            environment = {**describe_environment(), "devices": mesh.describe_devices()}
            write_json(workdir / "environment.json", environment)

        def train(experiment: Experiment) -> Trained:
            number = experiments.index(experiment) + 1
            logger.info("experiment %d of %d: %s", number, len(experiments), experiment.label)
            folder, config = training_folder(workdir, experiment), experiment.config
            _share_crops(workdir, folder)
            was_tested = has_opened(folder, "test")
            if (folder / "results.json").exists():
                seconds = read_json(folder / "results.json")["timing"]["typical_train_s"]
                return Trained(None, _validation_predictions(folder, data), seconds, was_tested)
            if not list_steps(folder / "checkpoints"):
                (folder / _PREDICTIONS).unlink(missing_ok=True)
            with lock_workdir(folder) if _is_primary() else contextlib.nullcontext():
                progress = train_run(config, folder, data, starts[experiment.label])
            seconds = progress.typical_train_s(config.optim.freeze_epochs)
            return Trained(progress, _validation_predictions(folder, data), seconds, was_tested)

        trained = _for_each([e for e in experiments if e.label in starts], failures, train)
        if not trained:
            raise Error(_failed(failures))
        done = [e for e in experiments if e.label in trained]
        choice = _choose(done, trained, data, base.seed)
        before = _record_choice(
            workdir / "compare" / "choice.json",
            choice,
            [label for label in trained if trained[label].was_tested],
        )
        opened = (
            f"had been opened before, for {', '.join(before)}" if before else "was still sealed"
        )
        logger.info("chosen by validation: %s; then the test split %s", choice.chosen, opened)

        def test(experiment: Experiment) -> Results:
            folder, progress = (
                training_folder(workdir, experiment),
                trained[experiment.label].progress,
            )
            if progress is None:
                return read_json(folder / "results.json")
            return open_test_split(experiment.config, folder, data, progress)

        tested = _for_each(done, failures, test)
        if _is_primary():
            write_report(
                workdir, base, experiments, trained, tested, choice, before, failures, data
            )
            logger.info("tables and figures are in %s", workdir / "compare")
        if failures:
            raise Error(_failed(failures))


def _for_each(
    experiments: Sequence[Experiment],
    failures: Failures,
    do: Callable[[Experiment], Any],
) -> dict[str, Any]:
    """Returns what `do` gives, by label; what it raises becomes a failure, and the rest goes on."""
    done = {}
    for experiment in experiments:
        try:
            done[experiment.label] = do(experiment)
        except Interrupted:
            raise
        except Error as error:
            failures[experiment.label] = str(error)
            logger.warning("%s failed: %s", experiment.label, error)
        except Exception as error:  # one that runs out of memory must not cost the others
            failures[experiment.label] = f"{type(error).__name__}: {error}"
            logger.exception("%s failed", experiment.label)
        # Tracebacks keep arrays alive in circles.
        gc.collect()
    return done


def _share_crops(workdir: Path, folder: Path) -> None:
    """Lets a run's folder stand for itself, for `evaluate` and all else that reads one."""
    if not _is_primary():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("crops", "arrays"):
        link = folder / name
        if not link.exists():  # copying a comparison may have put the folder there
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(workdir / name, folder), target_is_directory=True)


def _validation_predictions(folder: Path, data: PreparedData) -> np.ndarray:
    """Returns the predicted classes, int [N], of the best checkpoint; kept as a table."""
    path, split = folder / _PREDICTIONS, data.arrays["val"]
    if not path.exists():
        network = load_network(folder, "best")
        probabilities, _ = predict_split(network, split, network.meta["batch_size"])
        if _is_primary():
            write_predictions(path, split.records, probabilities, network.class_names)
        return probabilities.argmax(axis=1)
    return read_predictions(path, split, data.crop_set.class_names)


def _record_choice(path: Path, choice: Choice, tested: Sequence[str]) -> Sequence[str]:
    """Writes the choice before any test split is opened for it, once.

    Args:
      path: choice.json.
      choice: what the rule chose now.
      tested: labels of the experiments whose test split has been opened before.

    Returns:
      The labels of those that had been tested when this choice was first made. There are some if
      experiments were added to a comparison that was finished.
    """
    record = choice.to_dict()
    if path.exists():
        kept = read_json(path)
        before: list[str] = kept.pop("tested_before_choice")
        if kept == json.loads(json.dumps(record)):
            return before
    if _is_primary():
        path.parent.mkdir(exist_ok=True)
        write_json(path, record | {"tested_before_choice": list(tested)})
    return tested


def _choose(
    done: Sequence[Experiment], trained: Mapping[str, Trained], data: PreparedData, seed: int
) -> Choice:
    split = data.arrays["val"]
    seconds = {
        name: mean_over_seeds(done, name, lambda e: trained[e.label].seconds)
        for name in experiment_names(done)
    }
    return choose(
        by_name(done, {label: t.predictions for label, t in trained.items()}),
        split.labels,
        split.groups,
        seconds,
        class_names=data.crop_set.class_names,
        seed=seed,
    )


def _failed(failures: Failures) -> str:
    listed = "; ".join(f"{label}: {' '.join(text.split())}" for label, text in failures.items())
    return f"{len(failures)} of the trainings failed ({listed}); the same command tries them again"


def _is_primary() -> bool:
    return jax.process_index() == 0
