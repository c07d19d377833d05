"""Several experiments on one crop set: trained, one chosen by validation, then tested.

The order is the evidence: every experiment is trained and predicts the validation split; the rule
chooses and compare/choice.json is written; only then is the test split opened, of any of them.
"""

import contextlib
import csv
import dataclasses
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

from jaxcells.config import Experiment, differences
from jaxcells.data.arrays import SplitArrays
from jaxcells.environment import describe_environment
from jaxcells.errors import Error
from jaxcells.evaluation.comparison import Choice, choose, compare_with, split_figures
from jaxcells.evaluation.comparison_figures import (
    plot_accuracy_against_time,
    plot_curves_together,
)
from jaxcells.evaluation.comparison_table import (
    Row,
    table_markdown,
    table_text,
    write_table_csv,
)
from jaxcells.evaluation.evaluate import (
    has_opened,
    load_network,
    predict_split,
    write_predictions,
)
from jaxcells.experiment import (
    Results,
    check_config,
    find_start,
    open_test_split,
    prepare_together,
    train_run,
)
from jaxcells.files import write_whole
from jaxcells.logs import read_metrics
from jaxcells.models import create_model
from jaxcells.models.summary import summarize, totals
from jaxcells.prepare import PreparedData
from jaxcells.training import mesh
from jaxcells.training.checkpoints import list_steps
from jaxcells.training.meter import Progress
from jaxcells.training.signals import Interrupted
from jaxcells.workdir import lock_workdir, read_json, write_json

logger = logging.getLogger("jaxcells")

Failures = dict[str, str]

_PREDICTIONS = "predictions_val.csv"
_OF_RESULTS = (
    *("model", "init", "best_step", "num_epochs", "timing"),
    *("validation", "test", "baseline"),
)


@dataclasses.dataclass(frozen=True)
class _Trained:
    """An experiment before its test split is opened.

    Attributes:
      progress: what `train_run` returned; None if its results are written already.
      predictions: predicted classes of the validation split, int [N].
      seconds: of training, see `Progress.typical_train_s`.
      was_tested: whether its test split has been opened before, by an earlier call.
    """

    progress: Progress | None
    predictions: np.ndarray
    seconds: float
    was_tested: bool


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
            check_config(experiment.config, _folder(workdir, experiment))
        failures: Failures = {}
        starts = _for_each(
            experiments, failures, lambda e: find_start(e.config, _folder(workdir, e))
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

        def train(experiment: Experiment) -> _Trained:
            number = experiments.index(experiment) + 1
            logger.info("experiment %d of %d: %s", number, len(experiments), experiment.label)
            folder, config = _folder(workdir, experiment), experiment.config
            _share_crops(workdir, folder)
            was_tested = has_opened(folder, "test")
            if (folder / "results.json").exists():
                seconds = read_json(folder / "results.json")["timing"]["typical_train_s"]
                return _Trained(None, _validation_predictions(folder, data), seconds, was_tested)
            if not list_steps(folder / "checkpoints"):
                (folder / _PREDICTIONS).unlink(missing_ok=True)
            with lock_workdir(folder) if _is_primary() else contextlib.nullcontext():
                progress = train_run(config, folder, data, starts[experiment.label])
            seconds = progress.typical_train_s(config.optim.freeze_epochs)
            return _Trained(progress, _validation_predictions(folder, data), seconds, was_tested)

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
            folder, progress = _folder(workdir, experiment), trained[experiment.label].progress
            if progress is None:
                return read_json(folder / "results.json")
            return open_test_split(experiment.config, folder, data, progress)

        tested = _for_each(done, failures, test)
        if _is_primary():
            _report(workdir, base, experiments, trained, tested, choice, before, failures, data)
        if failures:
            raise Error(_failed(failures))


def _folder(workdir: Path, experiment: Experiment) -> Path:
    return workdir / "experiments" / experiment.label


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
    return _read_predictions(path, split, data.crop_set.class_names)


def _read_predictions(path: Path, split: SplitArrays, class_names: Sequence[str]) -> np.ndarray:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    if [row["path"] for row in rows] != [record.crop for record in split.records]:
        raise Error(f"{path}: of other crops, or damaged; delete it to predict again")
    label = {name: number for number, name in enumerate(class_names)}
    return np.array([label[row["prediction"]] for row in rows])


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
    done: Sequence[Experiment], trained: Mapping[str, _Trained], data: PreparedData, seed: int
) -> Choice:
    split = data.arrays["val"]
    return choose(
        _by_name(done, {label: t.predictions for label, t in trained.items()}),
        split.labels,
        split.groups,
        {name: _mean(done, name, lambda e: trained[e.label].seconds) for name in _names(done)},
        class_names=data.crop_set.class_names,
        seed=seed,
    )


def _names(experiments: Sequence[Experiment]) -> list[str]:
    return list(dict.fromkeys(experiment.name for experiment in experiments))


def _by_name(experiments: Sequence[Experiment], predictions: Mapping[str, Any]) -> dict[str, Any]:
    """Stacks predictions [N] of the seeds of every experiment that has any: int [S, N]."""
    stacked = {
        name: [
            predictions[e.label] for e in experiments if e.name == name and e.label in predictions
        ]
        for name in _names(experiments)
    }
    return {name: np.stack(rows) for name, rows in stacked.items() if rows}


def _mean(
    experiments: Sequence[Experiment], name: str, value: Callable[[Experiment], float]
) -> float:
    return float(np.mean([value(e) for e in experiments if e.name == name]))


def _report(
    workdir: Path,
    base: ConfigDict,
    experiments: Sequence[Experiment],
    trained: Mapping[str, _Trained],
    tested: Mapping[str, Results],
    choice: Choice,
    before: Sequence[str],
    failures: Failures,
    data: PreparedData,
) -> None:
    """Writes the table, the figures and compare.json, and prints the table."""
    directory, class_names = workdir / "compare", data.crop_set.class_names
    seed = base.seed
    done = [e for e in experiments if e.label in tested]
    predictions = {
        "validation": _by_name(done, {label: t.predictions for label, t in trained.items()}),
        "test": _by_name(
            done,
            {
                e.label: _read_predictions(
                    _folder(workdir, e) / "predictions_test.csv", data.arrays["test"], class_names
                )
                for e in done
            },
        ),
    }

    def figures(split: str, name: str) -> dict[str, Any]:
        arrays = data.arrays["val" if split == "validation" else split]
        return split_figures(
            predictions[split][name],
            arrays.labels,
            arrays.groups,
            class_names=class_names,
            seed=seed,
        )

    def row(name: str) -> Row:
        mine = [e for e in done if e.name == name]
        failed = [
            f"seed {e.seed}: {failures[e.label]}"
            for e in experiments
            if e.name == name and e.label in failures
        ]
        if not mine:
            return Row(name, failure="; ".join(failed))
        shape = data.arrays["train"].images.shape[1:]
        model = create_model(**tested[mine[0].label]["model"])
        channels = 3 if shape[-1] == 1 else shape[-1]
        parameters, multiply_adds = totals(summarize(model, (*shape[:2], channels)))

        train_s = _mean(mine, name, lambda e: trained[e.label].seconds)
        num_epochs = mine[0].config.train.num_epochs

        return Row(
            name,
            seeds=tuple(e.seed for e in mine),
            validation=figures("validation", name),
            test=figures("test", name),
            parameters=parameters,
            multiply_adds=multiply_adds,
            train_s=train_s,
            epoch_s=train_s / num_epochs,
            train_images_per_second=num_epochs * len(data.arrays["train"].labels) / train_s,
            eval_images_per_second=_mean(
                mine, name, lambda e: tested[e.label]["timing"]["eval_images_per_second"]
            ),
            step_memory_bytes=max(tested[e.label]["memory"]["train_step_bytes"] for e in mine),
            chosen=name == choice.chosen,
            failure="; ".join(failed) or None,
        )

    rows = [row(name) for name in _names(experiments)]
    comparisons = {}
    if choice.chosen in predictions["test"]:
        comparisons = compare_with(
            choice.chosen,
            predictions["test"],
            data.arrays["test"].labels,
            data.arrays["test"].groups,
            class_names=class_names,
            seed=seed,
        )
    write_table_csv(directory / "table.csv", rows)
    notes = _notes(base, done, tested, rows, before)
    markdown = table_markdown(rows, choice, comparisons, notes)
    with write_whole(directory / "table.md") as file:
        file.write(markdown)
    plot_accuracy_against_time(rows, directory / "accuracy_against_time.png")
    plot_curves_together(
        {
            name: [
                read_metrics(_folder(workdir, e) / "metrics.jsonl") for e in done if e.name == name
            ]
            for name in _names(done)
        },
        directory / "curves.png",
    )
    write_json(
        directory / "compare.json",
        {
            "choice": choice.to_dict(),
            "tested_before_choice": before,
            "experiments": [dataclasses.asdict(row) for row in rows],
            "test_comparisons": {"chosen": choice.chosen, "with": comparisons},
            "folders": {
                e.label: str(_folder(workdir, e).relative_to(workdir)) for e in experiments
            },
            "failures": failures,
            "trainings": {
                label: {key: results[key] for key in _OF_RESULTS}
                for label, results in tested.items()
            },
            "data": next((results["data"] for results in tested.values()), None),
            "manifest_sha256": data.crop_set.manifest_sha256,
            "config": base.to_dict(),
            "environment": read_json(workdir / "environment.json"),
        },
    )
    print(table_text(rows, choice, comparisons, notes))
    logger.info("tables and figures are in %s", directory)


def _notes(
    base: ConfigDict,
    done: Sequence[Experiment],
    tested: Mapping[str, Results],
    rows: Sequence[Row],
    before: Sequence[str],
) -> list[str]:
    """Returns what a reader must know to compare the figures."""
    notes = []
    for name in _names(done):
        config = next(e.config for e in done if e.name == name)
        changed = [
            text
            for text in differences(base, config)
            if not text.startswith(("seed ", "data.seed ", "model.name "))
        ]
        if changed:
            notes.append(
                f"Note: {name} is trained otherwise than the comparison says: in its own "
                f"config {'; '.join(changed)}."
            )
    for baseline in {tested[e.label]["baseline"]["test_accuracy"] for e in done}:
        notes.append(
            "Brightness and contrast of the crops alone, by a linear classifier: accuracy "
            f"{baseline:.3f} on the test split."
        )
        worse = [row.name for row in rows if row.test and row.test["accuracy"] <= baseline]
        if worse:
            notes.append(f"WARNING: no better than brightness and contrast: {', '.join(worse)}.")
    if before:
        notes.append(
            f"Note: the test split had been opened for {', '.join(before)} before this choice."
        )
    return notes


def _failed(failures: Failures) -> str:
    listed = "; ".join(f"{label}: {' '.join(text.split())}" for label, text in failures.items())
    return f"{len(failures)} of the trainings failed ({listed}); the same command tries them again"


def _is_primary() -> bool:
    return jax.process_index() == 0
