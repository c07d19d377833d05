"""The verb `report`: everything that a run, comparison or cross-validation found, on one page."""

import logging
import shlex
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxcells.config import default_config, flatten
from jaxcells.data.arrays import open_arrays
from jaxcells.data.audit import Audit
from jaxcells.data.crop_set import open_crop_set
from jaxcells.evaluation.checks import run_checks
from jaxcells.evaluation.comparison_figures import draw_accuracy_against_time, draw_curves_together
from jaxcells.evaluation.comparison_table import Row
from jaxcells.evaluation.predictions import read_predictions
from jaxcells.evaluation.report import Study, write_report
from jaxcells.evaluation.results import RunResults
from jaxcells.files import Workdir, from_record, read_json
from jaxcells.text import shortened
from jaxcells.training.progress import read_metrics

logger = logging.getLogger("jaxcells")


def report(workdir: Workdir) -> None:
    """Writes report.html of a finished run or comparison from the files in its workdir.

    Raises:
      Error: files are missing, damaged or of another version.
    """
    study = _of_comparison(workdir) if workdir.experiments.is_dir() else of_run(workdir)
    write_report(workdir.report, study)
    logger.info("the report is %s", workdir.report)


def of_run(workdir: Workdir, **others: Any) -> Study:
    """Gathers what a report of a run says.

    Args:
      workdir: of a finished run.
      **others: what to say otherwise or besides, see `Study`.
    """
    results = from_record(RunResults, read_json(workdir.results), workdir.results)
    config, crop_set = read_json(workdir.config), open_crop_set(workdir.crops)
    audit = from_record(Audit, results.data["audit"], workdir.results)
    curves = read_metrics(workdir.metrics)
    records, class_names = crop_set.split("test"), crop_set.class_names
    default, own = flatten(default_config()), flatten(ConfigDict(config))
    changes = {key: value for key, value in own.items() if value != default.get(key)}
    split_by = results.data["split_by"]
    found: dict[str, Any] = {
        "kind": "run",
        "title": shortened(", ".join(class_names), 90),
        "test": results.test,
        "evidence": results.evidence,
        "checks": run_checks(results.test, results.evidence, audit, curves, split_by),
        "predictions": read_predictions(workdir.predictions("test"), records, class_names),
        "images": open_arrays(crop_set, workdir.arrays)["test"].images,
        "crop_set": crop_set,
        "audit": audit,
        "curves": curves,
        "config": config,
        "changes": changes,
        "command": _command(changes),
        "environment": read_json(workdir.environment),
        "results": results,
    }
    return Study(**found | others)


def _of_comparison(workdir: Workdir) -> Study:
    path = workdir.comparison / "compare.json"
    found = read_json(path)
    rows = [from_record(Row, row, path) for row in found["experiments"]]
    runs = {row.name: [_experiment(workdir, row, seed) for seed in row.seeds] for row in rows}
    records = {name: [read_metrics(run.metrics) for run in of] for name, of in runs.items()}
    return of_run(
        runs[found["choice"]["chosen"]][0],
        kind="comparison",
        parts=found["parts"],
        pictures={
            "Accuracy against training time": draw_accuracy_against_time(rows),
            "Curves of all experiments": draw_curves_together(records),
        },
    )


def _experiment(workdir: Workdir, row: Row, seed: int) -> Workdir:
    return Workdir(workdir.experiments / f"{row.name}_seed{seed}")


def _command(changes: Mapping[str, Any]) -> str:
    """The command line that trains with keys that differ from the default, quoted for a shell."""
    flags = [shlex.quote(f"--config.{key}={value}") for key, value in changes.items()]
    return " \\\n  ".join(["python launch.py --config default", *flags])
