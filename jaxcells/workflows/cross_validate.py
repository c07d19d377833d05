"""Cross-validation: every fold an ordinary run, each field tested by one that never saw it.

All folds are prepared and audited before the first is trained. With `data.batch_by`, folds that
leave out a batch each follow those that leave out groups: figures across batches beside those
within.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxcells.data.splits import find_groups
from jaxcells.evaluation.comparison_table import Table, as_markdown, as_text
from jaxcells.evaluation.evidence import Evidence, gather_evidence
from jaxcells.evaluation.metrics import SplitMetrics, split_metrics
from jaxcells.evaluation.predictions import write_predictions
from jaxcells.evaluation.prose import paragraphs
from jaxcells.evaluation.report import figure
from jaxcells.files import Workdir, logger, write_csv, write_json, write_whole
from jaxcells.training import mesh
from jaxcells.training.initialization import Initialization, check_no_leak
from jaxcells.workflows import train
from jaxcells.workflows.prepare import PreparedData
from jaxcells.workflows.report import pool_folds, read_results, report

Fold = tuple[ConfigDict, Workdir, PreparedData, Initialization]

_KEYS = ("balanced_accuracy", "accuracy")
_HEADER = ("fold", "crops", "fields\n(groups)", "balanced accuracy", "accuracy", "best epoch")


def cross_validate(config: ConfigDict, folds: int, keep_test: bool, workdir: Workdir) -> None:
    """Trains and tests every fold, and writes cross_validation/ in the workdir.

    The same call resumes where it was stopped, at the fold and the step; nothing is trained twice.
    A fold whose training fails is reported, and the others go on.

    Args:
      config: of a run, validated; every fold is one, with another `data.fold`.
      folds: how many; 0 leaves out one group after another.
      keep_test: whether the test split of a plain run is left out, else every field is tested.
      workdir: the cross-validation's; every fold gets one below it.

    Raises:
      Error: the workdir is of something else, a fold cannot start, or, when all else is done, a
        training failed.
      Interrupted: SIGTERM or Ctrl-C during training, after saving.
    """
    with train.keep_workdir(workdir, "cross-validation"):
        mesh.warn_of_cpu()
        kinds = {"all folds": _prepare(config, str(folds), keep_test, workdir)}
        if config.data.batch_by:
            across = _prepare(config, "batch", keep_test, workdir)
            kinds = {"within batches": kinds["all folds"], "across batches": across}
        failures: dict[str, str] = {}
        compiled: dict[str, Any] = {}  # folds of one size share their steps
        prepared = [fold for of_kind in kinds.values() for fold in of_kind]
        for number, (own, run, data, init) in enumerate(prepared, start=1):
            logger.info("fold %d of %d: %s", number, len(prepared), run)
            with train.failures_noted(run.path.name, failures):
                if not run.results.exists():
                    progress = train.train_run(own, run, data, init, compiled)
                    train.open_test_split(own, run, data, progress, compiled)
        if mesh.is_primary() and len(failures) < len(prepared):
            _write(config, keep_test, kinds, failures, workdir)
            report(workdir)
            logger.info("tables and predictions are in %s", workdir.cross_validation)
        train.raise_failures(failures)


def _prepare(config: ConfigDict, of: str, keep_test: bool, workdir: Workdir) -> list[Fold]:
    """Makes the crops of all folds, and checks what can be checked before training."""
    prepared: list[Fold] = []
    while not prepared or len(prepared) < prepared[0][2].crop_set.num_folds:
        number, own = len(prepared) + 1, config.copy_and_resolve_references()
        own.data.fold = f"{number}/{of}{'' if keep_test else ' all'}"
        run = Workdir(workdir.folds / f"{'batch' if of == 'batch' else 'fold'}{number}")
        train.check_config(own, run)
        init = train.find_start(own, run)
        data = train.prepare_together(own, run)
        check_no_leak(init, data.crop_set)
        prepared.append((own, run, data, init))
    return prepared


def _write(
    config: ConfigDict,
    keep_test: bool,
    kinds: Mapping[str, list[Fold]],
    failures: Mapping[str, str],
    workdir: Workdir,
) -> None:
    """Writes tables, predictions and results.json to cross_validation/, and prints the table."""
    folder = workdir.cross_validation
    folder.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = []
    pooled: dict[str, SplitMetrics] = {}
    evidence: dict[str, Evidence] = {}
    tables: dict[str, list[Table]] = {}
    for kind, prepared in kinds.items():
        runs = [run for _, run, *_ in prepared if run.results.exists()]
        if not runs:
            continue
        tested, ending = pool_folds(runs), ""
        batches = find_groups(tested.sources.tolist(), config.data.batch_by, "data.batch_by")
        if kind == "across batches":
            pairs = zip(tested.records, batches, strict=True)
            records = tuple(dataclasses.replace(record, group=batch) for record, batch in pairs)
            tested, ending = dataclasses.replace(tested, records=records), "_across_batches"
        write_predictions(folder / f"predictions{ending}.csv", tested)
        pooled[kind] = split_metrics(tested, seed=config.seed)
        evidence[kind] = gather_evidence(tested, seed=config.seed, batches=batches)
        rows = []
        for run, number in zip(runs, np.unique(np.asarray(tested.folds)), strict=True):
            groups = set(tested.groups[tested.folds == number].tolist())
            results = read_results(run)
            epoch = results.best_step * results.num_epochs // results.num_steps
            tests = groups.pop() if len(groups) == 1 else ""
            rows.append(_line(kind, run.path.name, tests, results.test, epoch))
        rows.append(_line(kind, f"{len(runs)} of {len(prepared)} pooled", "", pooled[kind]))
        lines += rows
        tables[f"[{kind}]"] = [(_HEADER, [_cells(row) for row in rows])]
    found: dict[str, Any] = {"pooled": pooled, "evidence": evidence, "failures": failures}
    parts = paragraphs("cross_validation", tables, keep_test=keep_test, **found)
    write_csv(folder / "table.csv", list(lines[0]), [list(line.values()) for line in lines])
    with write_whole(folder / "table.md") as file:
        file.write(as_markdown(parts) + "\n")
    everything = {
        "pooled": {kind: dataclasses.asdict(figures) for kind, figures in pooled.items()},
        "evidence": {kind: dataclasses.asdict(beside) for kind, beside in evidence.items()},
        "folds": lines,
        "failures": failures,
        "keep_test": keep_test,
        "parts": parts,
        "config": config.to_dict(),
    }
    write_json(folder / "results.json", everything)
    print(as_text(parts))


def _line(
    kind: str, fold: str, tests: str, test: SplitMetrics, best_epoch: int | None = None
) -> dict[str, Any]:
    """A line of table.csv, from the figures of what was tested; without an epoch if pooled."""
    line: dict[str, Any] = {"folds": kind, "fold": fold, "tests": tests}
    line |= {"num_crops": test.num_crops, "num_fields": test.num_fields}
    for key in _KEYS:
        line[key] = getattr(test, key)
        line[f"{key}_low"], line[f"{key}_high"] = test.interval_95[key]
    return line | {"best_epoch": best_epoch}


def _cells(line: Mapping[str, Any]) -> list[str]:
    """The same for a reader, with intervals of what is pooled; those of a fold rest on too few."""
    name = ": ".join(filter(None, (line["fold"], line["tests"])))
    counts = [str(line["num_crops"]), str(line["num_fields"])]
    figures = []
    for key in _KEYS:
        interval = None if line["best_epoch"] else (line[f"{key}_low"], line[f"{key}_high"])
        figures.append(figure(line[key], interval or (None, None)))
    return [name, *counts, *figures, str(line["best_epoch"] or "")]
