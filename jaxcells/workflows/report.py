"""The verb `report`: what a run, a comparison or a cross-validation found, on one page."""

import logging
import re
from typing import Any

from ml_collections import ConfigDict

from jaxcells.config import default_config, flatten
from jaxcells.data.arrays import open_arrays
from jaxcells.data.audit import Audit
from jaxcells.data.crop_set import open_crop_set
from jaxcells.evaluation.checks import run_checks
from jaxcells.evaluation.comparison_figures import draw_accuracy_against_time, draw_curves_together
from jaxcells.evaluation.comparison_table import Row
from jaxcells.evaluation.evidence import gather_evidence
from jaxcells.evaluation.metrics import split_metrics
from jaxcells.evaluation.predictions import read_predictions
from jaxcells.evaluation.report import Study, write_report
from jaxcells.evaluation.results import RunResults
from jaxcells.files import Workdir, from_record, read_json
from jaxcells.text import natural
from jaxcells.training.progress import read_metrics

logger = logging.getLogger("jaxcells")


def report(workdir: Workdir) -> None:
    """Writes report.html of a finished run, comparison or cross-validation from its files.

    Raises:
      Error: files are missing, damaged or of another version.
    """
    if workdir.experiments.is_dir():
        study = _study_of_comparison(workdir)
    elif workdir.folds.is_dir():
        study = _study_of_folds(workdir)
    else:
        study = _study_of_run(workdir)
    write_report(workdir.report, study)
    logger.info("the report is %s", workdir.report)


def _study_of_run(workdir: Workdir, **others: Any) -> Study:
    """Gathers what a run left; `others` is what to say otherwise or besides, see `Study`."""
    results = from_record(RunResults, read_json(workdir.results), workdir.results)
    config, crop_set = read_json(workdir.config), open_crop_set(workdir.crops)
    records, names = crop_set.split("test"), crop_set.class_names
    default, own = flatten(default_config()), flatten(ConfigDict(config))
    found: dict[str, Any] = {
        "kind": "run",
        "test": results.test,
        "evidence": results.evidence,
        "predictions": read_predictions(workdir.predictions("test"), records, names),
        "images": open_arrays(crop_set, workdir.arrays)["test"].images,
        "audit": from_record(Audit, results.data["audit"], workdir.results),
        "curves": read_metrics(workdir.metrics),
        "changes": {key: value for key, value in own.items() if value != default.get(key)},
        **others,
    }
    seen = {key: found[key] for key in ("test", "evidence", "audit", "curves")}
    checks = run_checks(split_by=results.data["split_by"], **seen)
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
    chosen = runs[found["choice"]["chosen"]][0]
    return _study_of_run(chosen, kind="comparison", parts=found["parts"], pictures=pictures)


def _study_of_folds(workdir: Workdir) -> Study:
    found = read_json(workdir.cross_validation / "results.json")
    folders = sorted(workdir.folds.glob("fold*"), key=lambda folder: natural(folder.name))
    runs = [run for run in map(Workdir, folders) if run.results.exists()]
    sets = [open_crop_set(run.crops) for run in runs]
    arrays = [open_arrays(own, run.arrays)["test"] for own, run in zip(sets, runs, strict=True)]
    path = workdir.cross_validation / "predictions.csv"
    records = [record for part in arrays for record in part.records]
    pooled, seed = read_predictions(path, records, sets[0].class_names), found["config"]["seed"]
    batch_by = found["config"]["data"]["batch_by"]
    matches = [re.search(batch_by, record.source) for record in records]
    batches = [match[1] if match else "" for match in matches] if batch_by else None
    return _study_of_run(
        runs[0],
        kind="cross_validation",
        test=split_metrics(pooled, seed=seed),
        evidence=gather_evidence(pooled, seed=seed, batches=batches),
        predictions=pooled,
        images=[image for part in arrays for image in part.images],
        curves=(),
        parts=found["parts"],
    )
