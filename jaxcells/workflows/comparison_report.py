"""What a comparison found: one row an experiment, tables, figures, and what a reader must know."""

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxcells.config import Experiment, differences
from jaxcells.data.arrays import SplitArrays
from jaxcells.evaluation.comparison import Choice, compare_with, split_figures
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
from jaxcells.files import Error, read_json, write_json, write_whole
from jaxcells.models import create_model
from jaxcells.models.summary import summarize, totals
from jaxcells.training.progress import Progress, read_metrics
from jaxcells.workflows.prepare import PreparedData

Results = dict[str, Any]

_OF_RESULTS = (
    *("model", "init", "best_step", "num_epochs", "timing"),
    *("validation", "test", "baseline"),
)


@dataclasses.dataclass(frozen=True)
class Trained:
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


def training_folder(workdir: Path, experiment: Experiment) -> Path:
    """Returns the workdir of one training of a comparison."""
    return workdir / "experiments" / experiment.label


def read_predictions(path: Path, split: SplitArrays, class_names: Sequence[str]) -> np.ndarray:
    """Reads the predicted classes, int [N], of a table that `write_predictions` wrote.

    Raises:
      Error: its crops are not those of the split.
    """
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    if [row["path"] for row in rows] != [record.crop for record in split.records]:
        raise Error(f"{path}: of other crops, or damaged; delete it to predict again")
    label = {name: number for number, name in enumerate(class_names)}
    return np.array([label[row["prediction"]] for row in rows])


def experiment_names(experiments: Sequence[Experiment]) -> list[str]:
    """Returns every name once, in order."""
    return list(dict.fromkeys(experiment.name for experiment in experiments))


def by_name(experiments: Sequence[Experiment], predictions: Mapping[str, Any]) -> dict[str, Any]:
    """Stacks predictions [N] of the seeds of every experiment that has any: int [S, N]."""
    stacked = {
        name: [
            predictions[e.label] for e in experiments if e.name == name and e.label in predictions
        ]
        for name in experiment_names(experiments)
    }
    return {name: np.stack(rows) for name, rows in stacked.items() if rows}


def mean_over_seeds(
    experiments: Sequence[Experiment], name: str, value: Callable[[Experiment], float]
) -> float:
    """Returns the mean of a value over the trainings of one experiment."""
    return float(np.mean([value(e) for e in experiments if e.name == name]))


def write_report(
    workdir: Path,
    base: ConfigDict,
    experiments: Sequence[Experiment],
    trained: Mapping[str, Trained],
    tested: Mapping[str, Results],
    choice: Choice,
    before: Sequence[str],
    failures: Mapping[str, str],
    data: PreparedData,
) -> None:
    """Writes tables, figures and compare.json to workdir/compare, and prints the table.

    Args:
      workdir: the comparison's folder.
      base: the config of its crops.
      experiments: all that were asked for.
      trained: those that were trained, by label.
      tested: what is in results.json of those that were tested, by label.
      choice: what was chosen, before any of these was tested.
      before: labels of those that had been tested before the choice all the same.
      failures: why others failed, by label.
      data: the crops.
    """
    directory, class_names = workdir / "compare", data.crop_set.class_names
    seed = base.seed
    done = [e for e in experiments if e.label in tested]
    folders = {e.label: training_folder(workdir, e) for e in experiments}
    predictions = {
        "validation": by_name(done, {label: t.predictions for label, t in trained.items()}),
        "test": by_name(
            done,
            {
                e.label: read_predictions(
                    folders[e.label] / "predictions_test.csv",
                    data.arrays["test"],
                    class_names,
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

        train_s = mean_over_seeds(mine, name, lambda e: trained[e.label].seconds)
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
            eval_images_per_second=mean_over_seeds(
                mine, name, lambda e: tested[e.label]["timing"]["eval_images_per_second"]
            ),
            step_memory_bytes=max(tested[e.label]["memory"]["train_step_bytes"] for e in mine),
            chosen=name == choice.chosen,
            failure="; ".join(failed) or None,
        )

    rows = [row(name) for name in experiment_names(experiments)]
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
    notes = describe_circumstances(base, done, tested, rows, before)
    markdown = table_markdown(rows, choice, comparisons, notes)
    with write_whole(directory / "table.md") as file:
        file.write(markdown)
    plot_accuracy_against_time(rows, directory / "accuracy_against_time.png")
    plot_curves_together(
        {
            name: [read_metrics(folders[e.label] / "metrics.jsonl") for e in done if e.name == name]
            for name in experiment_names(done)
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
            "folders": {label: str(path.relative_to(workdir)) for label, path in folders.items()},
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


def describe_circumstances(
    base: ConfigDict,
    done: Sequence[Experiment],
    tested: Mapping[str, Results],
    rows: Sequence[Row],
    before: Sequence[str],
) -> list[str]:
    """Returns what a reader must know to compare the figures."""
    notes = []
    for name in experiment_names(done):
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
