"""Several experiments on one crop set: trained, one chosen by validation, then tested.

The order is the evidence: every experiment is trained and predicts the validation split; the rule
chooses and compare/choice.json is written; only then is the test split opened, of any of them.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxcells.config import Experiment, data_seed, differences
from jaxcells.data.arrays import with_fraction
from jaxcells.evaluation import comparison_figures, comparison_table, predict
from jaxcells.evaluation.bootstrap import Split
from jaxcells.evaluation.comparison import Choice, choose, compare_with, estimate
from jaxcells.evaluation.comparison_table import Row, Table
from jaxcells.evaluation.figures import save_figure
from jaxcells.evaluation.prose import paragraphs
from jaxcells.files import Error, Workdir, from_record, logger, read_json, write_json
from jaxcells.models import create_model
from jaxcells.models.summary import summarize, totals
from jaxcells.training import mesh
from jaxcells.training.progress import Progress, read_metrics
from jaxcells.workflows import train
from jaxcells.workflows.prepare import PreparedData
from jaxcells.workflows.report import by_fraction, predictions_of, read_results, report


def compare(base: ConfigDict, experiments: Sequence[Experiment], workdir: Workdir) -> None:
    """Trains, chooses, tests, and writes compare/ in the workdir.

    The same call resumes a comparison that was stopped, at the experiment and step where it was;
    what is finished is not trained again. An experiment whose training fails is reported, and the
    others go on.

    Args:
      base: the config of the crops.
      experiments: what to train.
      workdir: the comparison's folder; every run gets one below it.

    Raises:
      Error: the workdir is of something else; an experiment cannot start; or, when all else is
        done, a training failed.
      Interrupted: SIGTERM or Ctrl-C during training, after saving.
    """
    runs = {e.label: Workdir(workdir.experiments / e.label) for e in experiments}
    with train.keep_workdir(workdir, "comparison"):
        for e in experiments:
            train.check_config(e.config, runs[e.label])
        starts = {e.label: train.find_start(e.config, runs[e.label]) for e in experiments}
        mesh.warn_of_cpu()
        data = train.prepare_together(base, workdir)

        predictions: dict[str, np.ndarray] = {}  # classes of the validation split, int [N]
        seconds: dict[str, float] = {}  # of training, see `Progress.typical_train_s`
        untested: dict[str, Progress] = {}
        failures: dict[str, str] = {}
        compiled: dict[str, Any] = {}  # the seeds of an experiment share their steps
        for number, e in enumerate(experiments, start=1):
            logger.info("experiment %d of %d: %s", number, len(experiments), e.label)
            run = runs[e.label]
            if mesh.is_primary():
                _share_crops(workdir, run)
            with train.failures_noted(e.label, failures):
                if run.results.exists():
                    seconds[e.label] = read_results(run).timing.typical_train_s
                else:
                    progress = train.train_run(e.config, run, data, starts[e.label], compiled)
                    seconds[e.label] = progress.typical_train_s(e.config.optim.freeze_epochs)
                    untested[e.label] = progress
                network = predict.load_network(run, "best", compiled)
                if network.meta.manifest_sha256 != data.crop_set.manifest_sha256:
                    raise Error(f"{run} was trained on other crops; delete it to train it again")
                validation, _, _ = predict.predict_split(network, data.arrays["val"])
                predictions[e.label] = validation.predicted

        done = [e for e in experiments if e.label in predictions]
        if done:
            means = {name: fmean(values) for name, values in _by_name(done, seconds).items()}
            choice = choose(_by_name(done, predictions), _split(data, "val", base.seed), means)
            choice = _keep(choice, workdir, [runs[e.label] for e in done])
            logger.info("chosen by validation: %s", choice.chosen)
            for e in done:
                if trained := untested.get(e.label):
                    train.open_test_split(e.config, runs[e.label], data, trained, compiled)
            if mesh.is_primary():
                write_comparison(base, done, workdir, data, choice, failures)
                report(workdir)
                logger.info("tables and figures are in %s", workdir.comparison)
        train.raise_failures(failures)


def _share_crops(workdir: Workdir, run: Workdir) -> None:
    """Lets a run's folder stand for itself, for `evaluate` and all else that reads one."""
    run.path.mkdir(parents=True, exist_ok=True)
    for folder, link in ((workdir.crops, run.crops), (workdir.arrays, run.arrays)):
        if not link.exists():  # copying a comparison may have put the folder there
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(folder, run.path), target_is_directory=True)


def _by_name(experiments: Sequence[Experiment], values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Values by label as a list of its seeds for each experiment that has any."""
    found: dict[str, list[Any]] = {}
    for e in experiments:
        if e.label in values:
            found.setdefault(e.name, []).append(values[e.label])
    return found


def _split(data: PreparedData, name: str, seed: int) -> Split:
    arrays = data.arrays[name]
    return Split(arrays.labels, arrays.groups, data.crop_set.class_names, seed=seed)


def _keep(choice: Choice, workdir: Workdir, runs: Sequence[Workdir]) -> Choice:
    """Writes choice.json, with those of the runs that have been tested before.

    The same choice that stands there already is returned as it was first made: with the trainings
    that had been tested then. There are some if experiments were added to a finished comparison.
    """
    path = workdir.comparison / "choice.json"
    if path.exists():
        first = from_record(Choice, read_json(path), path)
        if dataclasses.replace(first, tested_before_choice=()) == choice:
            return first
    tested = tuple(run.path.name for run in runs if predict.times_opened(run, "test"))
    choice = dataclasses.replace(choice, tested_before_choice=tested)
    if mesh.is_primary():
        path.parent.mkdir(exist_ok=True)
        write_json(path, dataclasses.asdict(choice))
    return choice


def write_comparison(
    base: ConfigDict,
    done: Sequence[Experiment],
    workdir: Workdir,
    data: PreparedData,
    choice: Choice,
    failures: Mapping[str, str],
) -> None:
    """Writes tables, figures and compare.json to compare/ in the workdir, and prints the table.

    Args:
      base: the config of the crops.
      done: those that were trained; what they found is read from their folders.
      workdir: the comparison's folder.
      data: the crops.
      choice: what was chosen, before any of these was tested.
      failures: why some were not trained, by label.
    """
    runs = {e.label: Workdir(workdir.experiments / e.label) for e in done}
    results = {label: read_results(run) for label, run in runs.items()}
    records = {label: read_metrics(run.metrics) for label, run in runs.items()}
    validated, predictions = (
        _by_name(done, {label: predictions_of(run, split).predicted for label, run in runs.items()})
        for split in ("val", "test")
    )
    validation, split = (_split(data, name, base.seed) for name in ("val", "test"))
    _, *shape, channels = data.arrays["train"].images.shape
    inputs = (*shape, 3 if channels == 1 else channels)  # grey is repeated
    rows: list[Row] = []
    for candidate in choice.candidates:
        name, train_s = candidate.name, candidate.seconds
        trainings = [e for e in done if e.name == name]
        found, own = [results[e.label] for e in trainings], trainings[0].config
        trained = with_fraction(data.arrays["train"], own.data.fraction, seed=data_seed(own))
        num_epochs = found[0].num_epochs
        parameters, multiply_adds = totals(summarize(create_model(**found[0].model), inputs))
        rows.append(
            Row(
                name=name,
                chosen=name == choice.chosen,
                seeds=tuple(e.seed for e in trainings),
                validation=candidate.estimate,
                test=estimate(predictions[name], split),
                parameters=parameters,
                multiply_adds=multiply_adds,
                train_s=train_s,
                epoch_s=train_s / num_epochs,
                train_images_per_second=num_epochs * len(trained.labels) / train_s,
                eval_images_per_second=fmean(r.timing.eval_images_per_second for r in found),
                step_memory_bytes=max(r.memory["train_step_bytes"] for r in found),
                training_images=len({record.source for record in trained.records}),
            )
        )
    comparisons = compare_with(choice.chosen, predictions, split)
    baselines = results[done[0].label].evidence.baselines
    notes = circumstances(base, done, rows, baselines["brightness"].accuracy)
    curves = by_fraction(rows)
    for name, points in curves.items():
        if len(points) > 1:
            notes += comparison_table.learning_curve(name, points, validated, validation)
    parts = comparison_table.paragraphs(rows, failures, choice, comparisons, notes)
    folder = workdir.comparison
    comparison_table.write_table(folder, rows, failures, parts)
    reached = baselines["brightness"].balanced_accuracy
    levels = {"chance": 1 / len(data.crop_set.class_names), "brightness": reached}
    pictures = {
        "accuracy_against_time": comparison_figures.draw_accuracy_against_time(rows, levels),
        "curves": comparison_figures.draw_curves_together(_by_name(done, records), levels),
    }
    if curves:
        pictures["learning_curve"] = comparison_figures.draw_learning_curves(curves)
    for name, picture in pictures.items():
        save_figure(picture, folder / f"{name}.png", dpi=300)
    everything = {
        "choice": dataclasses.asdict(choice),
        "experiments": [dataclasses.asdict(row) for row in rows],
        "test_comparisons": {name: dataclasses.asdict(c) for name, c in comparisons.items()},
        "failures": failures,
        "parts": parts,
        "trainings": {label: dataclasses.asdict(r) for label, r in results.items()},
        "manifest_sha256": data.crop_set.manifest_sha256,
        "config": base.to_dict(),
    }
    write_json(folder / "compare.json", everything)
    print(comparison_table.as_text(parts))


def circumstances(
    base: ConfigDict, done: Sequence[Experiment], rows: Sequence[Row], baseline: float
) -> list[str | Table]:
    """Returns what a reader must know to compare the figures.

    Args:
      base: the config of the crops.
      done: the trainings.
      rows: what they found.
      baseline: accuracy of brightness and contrast alone on the test split, which all share.
    """
    otherwise: dict[str, list[str]] = {}
    for name, config in {e.name: e.config for e in done}.items():
        own = ("seed ", "data.seed ", "data.fraction ", "model.name ")
        changed = [text for text in differences(base, config) if not text.startswith(own)]
        if changed:
            otherwise[name] = changed
    worse = [row.name for row in rows if row.test.accuracy <= baseline]
    return paragraphs("circumstances", otherwise=otherwise, baseline=baseline, worse=worse)
