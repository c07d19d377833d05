"""Whole runs on small folders: one by the command line, one killed and resumed, others here."""

import csv
import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import demo
from jaxcells import Error
from jaxcells.evaluation import predict
from jaxcells.evaluation.results import RunResults
from jaxcells.files import Workdir, from_record, lock_workdir, read_json, write_json
from jaxcells.models.fetch import WeightsUnavailableError
from jaxcells.training import initialization
from jaxcells.training.checkpoints import best_step, list_steps
from jaxcells.training.progress import read_metrics
from jaxcells.workflows import train
from jaxcells.workflows.evaluate import evaluate
from jaxcells.workflows.prepare import prepare_crops, prepare_data
from jaxcells.workflows.report import report
from jaxcells.workflows.train import train_and_evaluate
from tests.data.folders import textured, write_image
from tests.training.conftest import assert_same_run

REPOSITORY = Path(__file__).parents[2]
SETTINGS = {
    "model.width": 4,
    "data.crop_size": 32,
    "data.crops_per_class": 40,
    "data.split": (28, 6, 6),
    "data.augment.dihedral": True,
    "train.batch_size": 8,
    "train.num_epochs": 4,
    "optim.learning_rate": 0.02,
}
EPOCHS, STEPS_PER_EPOCH = 4, 7


def write_images(root: Path, seed: int) -> Path:
    """Two classes that differ in texture, 18 fields each."""
    for number in range(18):
        coarse = textured(16, 16, seed + number).repeat(4, 0).repeat(4, 1)
        write_image(root / "coarse" / f"field{number}.png", coarse)
        write_image(root / "fine" / f"field{number}.png", textured(64, 64, seed + 100 + number))
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), seed=0)


def make_config(images, **changed):
    """The config of the runs below; a key's dots are written as two underscores."""
    config = demo.get_config()
    changed = {key.replace("__", "."): value for key, value in changed.items()}
    config.update_from_flattened_dict(SETTINGS | {"data.root": str(images)} | changed)
    return config


def start(images: Path, workdir: Path) -> subprocess.Popen:
    """The same by the command line, in a process of its own."""
    flags = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    return subprocess.Popen(
        [
            *(sys.executable, "launch.py", "--config", "configs/demo.py"),
            *(f"--workdir={workdir}", f"--config.data.root={images}", *flags),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            # What one of these processes compiled, the others need not compile again.
            "JAX_COMPILATION_CACHE_DIR": str(images.with_name("compiled")),
            "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Workdir:
    """The workdir of an uninterrupted run."""
    workdir = Workdir(tmp_path_factory.mktemp("run") / "whole")
    process = start(images, workdir.path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (workdir.path / "terminal.txt").write_text(out + err)
    return workdir


def read_results(workdir: Workdir) -> RunResults:
    return from_record(RunResults, read_json(workdir.results), workdir)


def history(workdir: Workdir) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in workdir.history.read_text().splitlines()]
    return [(line["verb"], line["split"]) for line in lines]


def test_a_run_leaves_everything_that_the_design_promises(finished):
    results = read_results(finished)
    for figures in (results.test, results.validation):
        assert figures.num_crops == np.sum(figures.confusion_matrix) == 12
        low, high = figures.interval_95["accuracy"]
        assert low is None or low <= figures.accuracy <= high
    assert results.test_opened == 1
    assert results.init["kind"] == "random"
    data = results.data
    assert data["split_by"] == "field"
    assert data["classes"] == ["coarse", "fine"]
    assert data["crops_per_class"]["train"] == {"coarse": 28, "fine": 28}
    assert data["audit"]["counts"]["train"].keys() == {"coarse", "fine"}
    assert data["image"] == {"shape": [32, 32, 1], "dtype": "uint8"}
    assert data["normalization"]["kind"] == "imagenet"
    timing = results.timing
    parts = (timing.crop_s, timing.compile_s, timing.train_s, timing.evaluate_s)
    assert 0 < sum(parts) < timing.total_s
    assert timing.features_s == 0
    assert timing.train_images_per_second == pytest.approx(EPOCHS * 56 / timing.train_s)
    assert timing.eval_images_per_second == pytest.approx(24 / timing.evaluate_s)
    assert results.memory["train_step_bytes"] > 100_000
    assert results.num_steps == EPOCHS * STEPS_PER_EPOCH
    assert results.best_step == best_step(finished.checkpoints)
    assert results.environment["dependencies"]["jax"] == jax.__version__
    assert results.environment["devices"]["platform"] == "cpu"
    evidence = results.evidence
    assert evidence.baselines.keys() == {"majority", "brightness", "background"}
    assert evidence.baselines["majority"].balanced_accuracy == 0.5
    assert evidence.fields.num_crops == sum(evidence.units.values())
    assert sum(subset.num_crops for subset in evidence.subsets["foreground"]) == 12
    assert evidence.clusters.num_crops == 12
    for path in (finished.config, *map(finished.figure, ("curves", "confusion", "crops"))):
        assert path.stat().st_size > 0
    assert list(finished.tensorboard.iterdir())
    assert history(finished)[0] == ("train", "test")
    text = (finished.path / "terminal.txt").read_text()
    for part in ("running on the CPU", "for the next 23 steps", "audit passed", "epoch 4/4"):
        assert part in text
    assert "balanced accuracy" in text
    assert "orbax" not in text.lower()


def test_the_report_is_written_and_its_command_is_the_run(finished, images, tmp_path, monkeypatch):
    text = finished.report.read_text()
    accuracy = f"<strong>{100 * read_results(finished).test.accuracy:.1f} %</strong>"
    assert accuracy in text
    copy = Workdir(tmp_path / "copy")
    shutil.copytree(finished.path, copy.path)
    copy.report.unlink()
    report(copy)
    assert copy.report.read_text() == text
    predict.write_history(copy, "evaluate", "test", 1)
    report(copy)
    assert "it was opened 1 time more" in copy.report.read_text()

    command = html.unescape(re.search(r"<pre[^>]*>(.*?)</pre>", text, re.DOTALL)[1])
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "launch.py")
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=parsed)
    assert words[:2] == ["--config", "default"]
    monkeypatch.setattr(sys, "argv", [script, "--config=configs/default.py", *words[2:]])
    parsed(sys.argv)
    assert parsed.config.to_dict() == make_config(images).to_dict()


def test_predictions_agree_with_the_figures(finished):
    with open(finished.predictions("test"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        probabilities = {name: float(row[f"probability {name}"]) for name in ("coarse", "fine")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max(probabilities, key=probabilities.__getitem__)
        assert row["path"].startswith(f"test/{row['label']}/")
    accuracy = np.mean([row["label"] == row["prediction"] for row in rows])
    assert accuracy == pytest.approx(read_results(finished).test.accuracy)


def test_metrics_have_a_record_per_epoch_and_split(finished):
    records = read_metrics(finished.metrics)
    assert [(r["step"], r["epoch"], r["split"]) for r in records] == [
        (STEPS_PER_EPOCH * epoch, epoch, split)
        for epoch in range(1, EPOCHS + 1)
        for split in ("train", "val")
    ]
    assert all(0 <= record["accuracy"] <= 1 for record in records)
    train = [r for r in records if r["split"] == "train"]
    assert 0 < train[-1]["loss"] < train[0]["loss"]
    assert train[0]["images_per_second"] > 0
    # A cosine from 0.02: the rate of the last step of the first epoch.
    expected = 0.02 * 0.5 * (1 + np.cos(np.pi * 6 / 28))
    assert train[0]["learning_rate"] == pytest.approx(expected, rel=1e-5)


def test_a_finished_run_says_so_and_refuses_other_images_configs_and_company(
    finished, images, tmp_path, caplog, capsys
):
    def times():
        files = (path for path in finished.path.rglob("*") if path.name != ".lock")
        return {path: path.stat().st_mtime_ns for path in files}

    caplog.set_level("INFO", "jaxcells")
    before = times()
    results = train_and_evaluate(make_config(images), finished)
    assert results == read_results(finished)
    assert "this run is finished" in caplog.text
    assert f"step {results.best_step}" in capsys.readouterr().out
    assert times() == before
    with pytest.raises(Error, match="not the images that"):
        train_and_evaluate(make_config(write_images(tmp_path, seed=1000)), finished)
    with pytest.raises(Error, match=r"train\.num_epochs was 4, now 9.*choose another workdir"):
        train_and_evaluate(make_config(images, train__num_epochs=9), finished)
    with lock_workdir(finished.path), pytest.raises(Error, match="another process is working"):
        train_and_evaluate(make_config(images), finished)


def wait_for_checkpoint(process: subprocess.Popen, workdir: Workdir, after: int) -> int:
    """Waits until a step past `after` is saved."""
    deadline = time.monotonic() + 240
    while (step := max(list_steps(workdir.checkpoints), default=0)) <= after:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return step


def test_killed_and_resumed_is_bit_identical(finished, images, tmp_path):
    workdir = Workdir(tmp_path / "interrupted")
    process = start(images, workdir.path)
    wait_for_checkpoint(process, workdir, after=0)
    process.kill()
    process.communicate()

    before = max(list_steps(workdir.checkpoints))
    process = start(images, workdir.path)
    wait_for_checkpoint(process, workdir, after=before)
    process.terminate()
    asked = time.monotonic()
    _, terminal = process.communicate(timeout=60)
    assert f"resuming at step {before} of" in terminal
    if process.returncode == 128 + signal.SIGTERM:
        assert "the same command resumes there" in terminal
        assert time.monotonic() - asked < 20
    else:  # training was over before it was asked
        assert process.returncode in (0, -signal.SIGTERM)
        assert max(list_steps(workdir.checkpoints)) == EPOCHS * STEPS_PER_EPOCH

    process = start(images, workdir.path)
    _, terminal = process.communicate(timeout=300)
    assert process.returncode == 0, terminal
    assert_same_run(workdir.path, finished.path)
    assert read_results(workdir).test == read_results(finished).test
    assert workdir.predictions("test").read_text() == finished.predictions("test").read_text()


def test_missing_weights_stop_a_run_on_anyones_own_images(images, tmp_path, monkeypatch):
    def fetch(name):
        raise WeightsUnavailableError(f"cannot download {name}")

    monkeypatch.setattr(initialization, "fetch_imagenet", fetch)
    config, workdir = make_config(images, init="imagenet"), Workdir(tmp_path)
    # A checkpoint whose copying stopped half way is none to go on from.
    (workdir.checkpoints / "7").mkdir(parents=True)
    write_json(workdir.config, config.to_dict())
    with pytest.raises(WeightsUnavailableError):
        train_and_evaluate(config, workdir)
    assert not workdir.crops.exists()


def test_a_run_can_begin_from_an_earlier_one(finished, images, tmp_path):
    config = make_config(images, init=str(finished), train__num_epochs=1)
    results = train_and_evaluate(config, Workdir(tmp_path / "second"))
    assert results.init["kind"] == "run"
    assert results.init["source"] == str(finished)
    # Another seed is another split: what that run was trained on would now be test data.
    with pytest.raises(Error, match="images that are held out here"):
        train_and_evaluate(
            make_config(images, init=str(finished), seed=1), Workdir(tmp_path / "leak")
        )


def test_other_crops_than_a_run_was_trained_on_are_refused(finished, images, tmp_path):
    workdir = Workdir(tmp_path / "copy")
    shutil.copytree(finished.path, workdir.path)
    for folder in (workdir.crops, workdir.arrays):
        shutil.rmtree(folder)
    prepare_crops(make_config(images, seed=1), workdir)
    with pytest.raises(Error, match="were trained on other crops"):
        evaluate(workdir, split="val", which="best")


def test_evaluate_gives_the_figures_of_the_run_and_keeps_count(finished, caplog):
    caplog.set_level("INFO", "jaxcells")
    results = read_results(finished)
    opened = history(finished).count(("evaluate", "test"))
    assert evaluate(finished, split="test", which="best") == results.test
    written = read_json(finished.evaluation(f"test_step{results.best_step}"))
    assert written["accuracy"] == results.test.accuracy
    assert written["checkpoint"] == results.best_step
    assert f"has now been opened {opened + 2} times" in caplog.text
    assert history(finished)[-1] == ("evaluate", "test")

    last = EPOCHS * STEPS_PER_EPOCH
    assert evaluate(finished, split="val", which="latest").num_crops == 12
    assert finished.evaluation(f"val_step{last}").exists()
    assert finished.predictions(f"val_step{last}").exists()
    with pytest.raises(Error, match="use one of train, val, test"):
        evaluate(finished, split="dev", which="best")
    with pytest.raises(Error, match="no checkpoint of step 12345"):
        evaluate(finished, split="val", which=12345)


def test_a_workdir_in_the_image_folder_is_refused_before_it_is_made(images):
    workdir = Workdir(images / "run")
    with pytest.raises(Error, match="lies in the image folder"):
        train_and_evaluate(make_config(images), workdir)
    assert not workdir.path.exists()


def test_a_fraction_of_the_images_is_what_is_counted_as_trained_on(images, tmp_path):
    config = make_config(images, data__fraction=0.25)
    data = prepare_data(config, Workdir(tmp_path / "run"))
    whole, kept = data.audit.counts["train"], train._trained_on(config, data)
    number = whole["fine"]["fields"]
    assert kept.audit.counts["train"]["fine"]["fields"] == round(number / 4)
    assert len(kept.arrays["train"].labels) == sum(
        count["crops"] for count in kept.audit.counts["train"].values()
    )
    assert kept.audit.counts["test"] == data.audit.counts["test"]
