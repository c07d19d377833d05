"""The verb `report`: what a run, a comparison or a cross-validation found, on one page."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxcells.config import changed_keys
from jaxcells.data.arrays import open_arrays
from jaxcells.data.audit import Audit
from jaxcells.data.crop_set import open_crop_set
from jaxcells.evaluation.checks import run_checks
from jaxcells.evaluation.comparison_figures import (
    draw_accuracy_against_time,
    draw_curves_together,
    draw_learning_curves,
)
from jaxcells.evaluation.comparison_table import Row
from jaxcells.evaluation.evidence import Evidence
from jaxcells.evaluation.metrics import SplitMetrics
from jaxcells.evaluation.predict import times_opened
from jaxcells.evaluation.predictions import Predictions, read_predictions
from jaxcells.evaluation.report import Study, write_report
from jaxcells.evaluation.results import RunResults
from jaxcells.files import Error, Workdir, from_record, logger, read_json
from jaxcells.training.progress import read_metrics


def report(workdir: Workdir) -> None:
    """Writes report.html of a finished run, comparison or cross-validation from its files.

    Raises:
      Error: files are missing, damaged or of another version.
    """
    if workdir.experiments.is_dir():
        gather, last = _study_of_comparison, workdir.comparison / "compare.json"
    elif workdir.folds.is_dir():
        gather, last = _study_of_folds, workdir.cross_validation / "results.json"
    else:
        gather, last = _study_of_run, workdir.results
    if not last.exists() and (gather is not _study_of_run or workdir.config.exists()):
        raise Error(f"{workdir}: not finished; give the command that began it again, to go on")
    write_report(workdir.report, gather(workdir))
    logger.info("the report is %s", workdir.report)


def _study_of_run(workdir: Workdir, **others: Any) -> Study:
    """Gathers what a run left; `others` is what to say otherwise or besides, see `Study`."""
    config, crop_set = read_json(workdir.config), open_crop_set(workdir.crops)
    results = read_results(workdir)
    found: dict[str, Any] = {
        "kind": "run",
        "test": results.test,
        "evidence": results.evidence,
        "predictions": predictions_of(workdir, "test"),
        "images": open_arrays(crop_set, workdir.arrays)["test"].images,
        "audit": from_record(Audit, results.data["audit"], workdir.results),
        "curves": read_metrics(workdir.metrics),
        "opened": times_opened(workdir, "test"),
        "changes": changed_keys(ConfigDict(config)),
        **others,
    }
    seen = {key: found[key] for key in ("test", "evidence", "audit", "curves")}
    hottest = float(found["predictions"].temperature.max())
    checks = run_checks(split_by=results.data["split_by"], temperature=hottest, **seen)
    return Study(checks=checks, crop_set=crop_set, config=config, results=results, **found)


def _study_of_comparison(workdir: Workdir) -> Study:
    path = workdir.comparison / "compare.json"
    found = read_json(path)
    rows = [from_record(Row, row, path) for row in found["experiments"]]
    runs = {
        row.name: [Workdir(workdir.experiments / f"{row.name}_seed{seed}") for seed in row.seeds]
        for row in rows
    }
    records = {
        name: [read_metrics(run.metrics) for run in of_name] for name, of_name in runs.items()
    }
    trained = next(iter(found["trainings"].values()))["evidence"]
    reached = trained["baselines"]["brightness"]["balanced_accuracy"]
    levels = {"chance": 1 / len(trained["units"]), "brightness": reached}
    pictures = {
        "Accuracy against training time": draw_accuracy_against_time(rows, levels),
        "Curves of all experiments": draw_curves_together(records, levels),
    }
    if curves := by_fraction(rows):
        pictures["Accuracy against the number of training images"] = draw_learning_curves(curves)
    chosen = runs[found["choice"]["chosen"]][0]
    own = {"parts": found["parts"], "tested_before_choice": found["choice"]["tested_before_choice"]}
    return _study_of_run(chosen, kind="comparison", pictures=pictures, **own)


def _study_of_folds(workdir: Workdir) -> Study:
    path = workdir.cross_validation / "results.json"
    found = read_json(path)
    kind, test = next(iter(found["pooled"].items()))
    rows = [row for row in found["folds"] if row["folds"] == kind and row["best_epoch"]]
    runs = [Workdir(workdir.folds / row["fold"]) for row in rows]
    arrays = [open_arrays(open_crop_set(run.crops), run.arrays)["test"] for run in runs]
    return _study_of_run(
        runs[0],
        kind="cross_validation",
        test=from_record(SplitMetrics, test, path),
        evidence=from_record(Evidence, found["evidence"][kind], path),
        predictions=pool_folds(runs),
        images=[image for part in arrays for image in part.images],
        curves=(),
        parts=found["parts"],
    )


def by_fraction(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that were trained on fractions of the images, fewest first, by what was trained."""
    curves: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.training_images):
        name, has_fraction, _ = row.name.partition("_fraction")
        if has_fraction:
            curves.setdefault(name, []).append(row)
    return curves


def read_results(run: Workdir) -> RunResults:
    """Reads the figures of a finished run."""
    return from_record(RunResults, read_json(run.results), run.results)


def predictions_of(run: Workdir, split: str) -> Predictions:
    """Reads what a finished run predicted of one of its splits."""
    crop_set = open_crop_set(run.crops)
    return read_predictions(run.predictions(split), crop_set.split(split), crop_set.class_names)


def pool_folds(runs: Sequence[Workdir]) -> Predictions:
    """Reads what each of several folds predicted of the crops that it tested, one after another."""
    parts = [predictions_of(run, "test") for run in runs]
    numbers = [int(re.sub(r"\D", "", run.path.name)) for run in runs]
    names = ("logits", "temperature", "unknown")
    pooled: dict[str, Any] = {
        "records": tuple(record for part in parts for record in part.records),
        "baselines": {
            n: np.concatenate([p.baselines[n] for p in parts]) for n in parts[0].baselines
        },
        "features": None,
        "folds": np.repeat(numbers, [len(part.records) for part in parts]),
    }
    pooled |= {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return dataclasses.replace(parts[0], **pooled)
