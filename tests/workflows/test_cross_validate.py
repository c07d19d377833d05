"""One small cross-validation: a fold fails, another is stopped, and what is pooled is right."""

import collections
import csv
import dataclasses
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from configs import cross_validate as cross_validate_config
from jaxcells.config import SHIPPED, expand_cross_validation
from jaxcells.data.crop_set import open_crop_set
from jaxcells.evaluation.bootstrap import Split
from jaxcells.evaluation.evidence import Evidence
from jaxcells.evaluation.metrics import classification_metrics
from jaxcells.files import Error, Workdir, from_record, read_json, write_json
from jaxcells.training import signals
from jaxcells.training.checkpoints import list_steps
from jaxcells.training.signals import Interrupted
from jaxcells.workflows import train
from jaxcells.workflows.compare import compare
from jaxcells.workflows.cross_validate import cross_validate
from jaxcells.workflows.report import pool_folds, report
from tests.data.folders import textured, write_image

STEPS = 6  # two epochs of 24 crops in batches of 8
FOLDS = ("fold1", "fold2", "batch1", "batch2")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A config, two folds, no test split: three fields of each class, of two days."""
    root = tmp_path_factory.mktemp("images")
    for number, day in enumerate((1, 1, 2)):
        coarse = textured(16, 16, number).repeat(4, 0).repeat(4, 1)
        write_image(root / "coarse" / f"day{day}_{number}.png", coarse)
        write_image(root / "fine" / f"day{day}_{number}.png", textured(64, 64, 100 + number))
    config = cross_validate_config.get_config()
    config.experiment, config.folds, config.keep_test = "demo", 2, False
    config.model.width = 4
    config.data.root, config.data.batch_by = str(root), r"(day\d)"
    config.data.crop_size, config.data.crops_per_class, config.data.split = 32, 20, (12, 4, 4)
    config.train.batch_size, config.train.num_epochs = 8, 2
    return expand_cross_validation(config, SHIPPED)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A cross-validation whose first fold failed at first, and whose second was stopped."""
    workdir = Workdir(tmp_path_factory.mktemp("cross_validation"))
    train_run, open_test_split = train.train_run, train.open_test_split
    failing, steps, shared = {"fold1"}, collections.Counter(), {}

    def train_or_fail(config, run, data, init, compiled):
        if run.path.name in failing:
            raise Error("out of\nmemory")
        return train_run(config, run, data, init, shared)  # compiled once for all calls

    def test(*arguments):
        return open_test_split(*arguments[:-1], shared)

    def stopping(self, step):
        steps[len(done())] += 1
        self.signal = 15 if len(done()) == 0 and steps[0] == 5 else 0
        return self.signal != 0

    def done():
        return list(workdir.folds.glob("*/results.json"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_run", train_or_fail)
        patch.setattr(train, "open_test_split", test)
        patch.setattr(signals.StopRequest, "requested", stopping)
        with pytest.raises(Interrupted, match="stopped at step 4 of 6"):
            cross_validate(*arguments, workdir)
        assert list_steps(Workdir(workdir.folds / "fold2").checkpoints)[-1] == 4
        assert not workdir.cross_validation.exists()
        with pytest.raises(Error, match=r"1 of the trainings failed \(fold1: out of memory\); the"):
            cross_validate(*arguments, workdir)
        assert sum(steps.values()) == 3 * STEPS + 1  # and the one that was refused
        table = (workdir.cross_validation / "table.md").read_text()
        assert "fold1 failed and is left out: out of memory" in table
        assert "1 of 2 pooled" in table
        failing.clear()
        cross_validate(*arguments, workdir)
    assert sum(steps.values()) == 4 * STEPS + 1  # nothing is trained twice
    return workdir


def test_every_field_is_tested_once_within_and_across_batches(finished):
    for ending, unit in (("", "source"), ("_across_batches", "group")):
        rows = rows_of(finished.cross_validation / f"predictions{ending}.csv")
        assert len(rows) == 40
        folds = collections.defaultdict(set)
        for row in rows:
            folds[row[unit]].add(row["fold"])
        assert len(folds) == (2 if ending else 6)
        assert {len(found) for found in folds.values()} == {1}
    for name in FOLDS:
        run = Workdir(finished.folds / name)
        assert run.history.read_text().count('"split": "test"') == 1
        assert open_crop_set(run.crops).num_folds == 2


def test_the_report_is_of_all_folds_together(finished):
    text = finished.report.read_text()
    accuracy = read_json(finished.cross_validation / "results.json")["pooled"]["within batches"][
        "accuracy"
    ]
    assert "of 40 crops from 6 independent fields were classified rightly" in text
    assert f"<strong>{100 * accuracy:.1f} %</strong>" in text
    for part in (
        "Report of a cross-validation",
        "no map of features",
        "By batch",
        "fold2",
        "(2 folds)",
    ):
        assert part in text


def test_the_report_is_of_batches_where_all_other_folds_failed(finished, tmp_path):
    copy = Workdir(shutil.copytree(finished.path, tmp_path / "copy"))
    path = copy.cross_validation / "results.json"
    found = read_json(path)
    for part in ("pooled", "evidence"):
        del found[part]["within batches"]
    write_json(path, found)
    report(copy)
    assert "of 40 crops from 2 independent" in copy.report.read_text()
    path.unlink()
    with pytest.raises(Error, match="not finished"):
        report(copy)


@pytest.mark.slow
def test_killed_in_a_fold_and_resumed_gives_the_same_predictions(finished, arguments, tmp_path):
    root, workdir = arguments[0].data.root, Workdir(tmp_path)
    keys = [
        *("experiment=demo", "folds=2", "keep_test=False", "model.width=4", f"data.root={root}"),
        *(r"data.batch_by=(day\d)", "data.crop_size=32", "data.crops_per_class=20"),
        *("data.split=12,4,4", "train.batch_size=8", "train.num_epochs=2"),
    ]
    command = [sys.executable, "launch.py", "cross_validate", "--config", "cross_validate"]
    command += [f"--workdir={tmp_path}", *(f"--config.{key}" for key in keys)]
    cwd, deadline = SHIPPED.parent, time.monotonic() + 240
    process = subprocess.Popen(command, cwd=cwd)
    while not list_steps(Workdir(workdir.folds / "fold2").checkpoints):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    subprocess.run(command, cwd=cwd, check=True)
    for path in finished.cross_validation.glob("*.csv"):
        assert (workdir.cross_validation / path.name).read_bytes() == path.read_bytes()


def test_pooled_figures_are_those_of_all_crops_together(finished):
    results = json.loads((finished.cross_validation / "results.json").read_text())
    assert results["failures"] == {}
    kinds = ["within batches", "across batches"]
    assert list(results["pooled"]) == list(results["evidence"]) == kinds
    within = from_record(Evidence, results["evidence"]["within batches"], "results.json")
    assert [subset.name for subset in within.subsets["batch"]] == ["day1", "day2"]
    assert within.baselines.keys() == {"majority", "brightness", "background"}
    table = rows_of(finished.cross_validation / "table.csv")
    assert [row["fold"] for row in table] == [
        *("fold1", "fold2", "2 of 2 pooled", "batch1", "batch2", "2 of 2 pooled")
    ]
    for kind, ending in (("within batches", ""), ("across batches", "_across_batches")):
        rows = rows_of(finished.cross_validation / f"predictions{ending}.csv")
        true, predicted = ([row[key] for row in rows] for key in ("label", "prediction"))
        pooled = results["pooled"][kind]
        assert pooled["accuracy"] == pytest.approx(accuracy_score(true, predicted))
        balanced = balanced_accuracy_score(true, predicted)
        assert pooled["balanced_accuracy"] == pytest.approx(balanced)
        names = ("coarse", "fine")
        probabilities = [[float(row[f"probability {name}"]) for name in names] for row in rows]
        labels = np.array([names.index(label) for label in true])
        split = Split(labels, np.array([row["group"] for row in rows]), names)
        again = classification_metrics(np.array(probabilities), split)
        assert list(again.interval_95["accuracy"]) == pooled["interval_95"]["accuracy"]
        assert pooled["num_fields"] == (2 if ending else 6)
        for row in (row for row in table if row["folds"] == kind and row["best_epoch"]):
            own = json.loads((finished.folds / row["fold"] / "results.json").read_text())
            assert float(row["accuracy"]) == own["test"]["accuracy"]
            assert int(row["best_epoch"]) == own["best_step"] // 3
    text = (finished.cross_validation / "table.md").read_text()
    assert text.count("each fold tests what it was not trained on") == 2
    assert "batch1: day1" in text
    within, across = (found["balanced_accuracy"] for found in results["pooled"].values())
    sentence = f"Balanced accuracy: within batches {within:.3f}, across batches {across:.3f}."
    assert sentence in text
    assert "not of one network" in text
    assert "no test split was set aside" in text


def test_a_finished_one_is_not_trained_again_and_gives_the_same(finished, arguments, monkeypatch):
    monkeypatch.setattr(train, "train_run", None)
    files = [f"{finished.cross_validation}/{name}" for name in ("table.csv", "predictions.csv")]
    before = [rows_of(path) for path in files]
    cross_validate(*arguments, finished)
    assert [rows_of(path) for path in files] == before
    runs = [Workdir(finished.folds / name) for name in FOLDS[:2]]
    pooled = pool_folds(runs)
    assert collections.Counter(pooled.folds.tolist()).keys() == {1, 2}
    assert pooled.rows()[0][-1] == "fold"


def test_workdirs_of_something_else_and_other_settings_are_refused(finished, arguments, tmp_path):
    config, folds, keep_test = arguments
    with pytest.raises(Error, match=r"data\.fold was '1/2 all', now '1/3 all'"):
        cross_validate(config, 3, keep_test, finished)
    with pytest.raises(Error, match="is the workdir of a cross-validation"):
        train.train_and_evaluate(config, finished)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(Error, match="is the workdir of a run; choose"):
        cross_validate(config, folds, keep_test, Workdir(tmp_path))
    with pytest.raises(Error, match="is the workdir of a cross-validation"):
        compare(config, [], finished)


def test_all_folds_are_checked_before_the_first_is_trained(arguments, tmp_path, monkeypatch):
    config, _, keep_test = arguments
    monkeypatch.setattr(train, "train_run", None)
    with pytest.raises(Error, match=r"'coarse' has 3 groups .* 5 are needed"):
        cross_validate(config, 5, keep_test, Workdir(tmp_path / "five"))
    # With the test split set aside, two are left of three: enough for two folds.
    prepare = train.prepare_data

    def leaking(config, run):
        data = prepare(config, run)
        wrong = ("a leak",) if run.path.name == "fold2" else ()
        return dataclasses.replace(data, audit=dataclasses.replace(data.audit, errors=wrong))

    monkeypatch.setattr(train, "prepare_data", leaking)
    with pytest.raises(Error, match="the audit found 1 errors: a leak"):
        cross_validate(config, 2, True, Workdir(tmp_path / "two"))
    shutil.rmtree(tmp_path / "two")
