"""Whole runs of the command line on small folders, each in a process of its own."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxcells.files import lock_workdir
from jaxcells.training.checkpoints import _read_arrays, best_step, list_steps
from jaxcells.training.progress import read_metrics
from tests.data.folders import textured, write_image

REPOSITORY = Path(__file__).parents[2]
OVERRIDES = [
    *("--config.model.width=4", "--config.data.crop_size=32", "--config.data.crops_per_class=40"),
    *("--config.data.split=28,6,6", "--config.train.batch_size=8", "--config.train.num_epochs=4"),
    *("--config.optim.learning_rate=0.02", "--config.data.augment.dihedral=True"),
]
EPOCHS, STEPS_PER_EPOCH = 4, 7


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes that differ in texture, 18 fields each."""
    root = tmp_path_factory.mktemp("images")
    for label in ("coarse", "fine"):
        for number in range(18):
            fine = textured(64, 64, number + 100 * (label == "fine"))
            if label == "coarse":
                fine = fine[:16, :16].repeat(4, 0).repeat(4, 1)
            write_image(root / label / f"field{number}.png", fine)
    return root


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
    }


def command(images: Path, workdir: Path, *extra: str) -> list[str]:
    return [
        *(sys.executable, str(REPOSITORY / "launch.py")),
        *("--config", str(REPOSITORY / "configs/demo.py"), "--workdir", str(workdir)),
        *(f"--config.data.root={images}", *OVERRIDES, *extra),
    ]


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, env=environment, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def finished(images, environment, tmp_path_factory) -> Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    result = run(command(images, workdir), environment)
    assert result.returncode == 0, result.stderr
    (workdir / "terminal.txt").write_text(result.stdout + result.stderr)
    return workdir


def last_state(workdir: Path) -> dict[str, np.ndarray]:
    """Returns the last checkpoint's parameters, statistics, optimiser state and step by name."""
    folder = workdir / "checkpoints" / str(list_steps(workdir / "checkpoints")[-1])
    tree = {name: _read_arrays(folder, name) for name in ("variables", "optimizer")}
    return flatten_dict(tree, sep="/")


def without_timings(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records]


def test_a_run_leaves_everything_that_the_design_promises(finished, images):
    results = json.loads((finished / "results.json").read_text())
    for name in ("test", "validation"):
        figures = results[name]
        assert set(figures) >= {
            *("accuracy", "balanced_accuracy", "loss", "per_class", "confusion_matrix"),
            *("interval_95", "num_crops", "num_fields"),
        }
        assert figures["num_crops"] == np.sum(figures["confusion_matrix"]) == 12
        low, high = figures["interval_95"]["accuracy"]
        assert low <= figures["accuracy"] <= high
    assert results["test"]["opened"] == 1
    assert results["init"]["kind"] == "random"
    assert results["data"]["split_by"] == "field"
    assert results["data"]["classes"] == ["coarse", "fine"]
    assert results["data"]["crops_per_class"]["train"] == {"coarse": 28, "fine": 28}
    assert set(results["timing"]) >= {
        *("crop_s", "compile_s", "train_s", "evaluate_s", "total_s"),
        *("train_images_per_second", "eval_images_per_second"),
    }
    assert results["num_steps"] == EPOCHS * STEPS_PER_EPOCH
    assert results["best_step"] == best_step(finished / "checkpoints")
    assert results["environment"]["dependencies"]["jax"] == jax.__version__
    assert results["environment"]["devices"]["platform"] == "cpu"
    assert 0 <= results["baseline"]["test_accuracy"] <= 1
    for name in ("config.json", "environment.json", "curves.png", "confusion.png", "crops.png"):
        assert (finished / name).stat().st_size > 0
    assert list((finished / "tensorboard").iterdir())
    assert len(list_steps(finished / "checkpoints")) in (2, 3)
    history = [json.loads(x) for x in (finished / "history.jsonl").read_text().splitlines()]
    assert [(line["verb"], line["split"]) for line in history] == [("train", "test")]


def test_predictions_agree_with_the_figures(finished):
    results = json.loads((finished / "results.json").read_text())
    with open(finished / "predictions_test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        probabilities = {name: float(row[f"probability {name}"]) for name in ("coarse", "fine")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max(probabilities, key=probabilities.__getitem__)
        assert row["path"].startswith(f"test/{row['label']}/")
    accuracy = np.mean([row["label"] == row["prediction"] for row in rows])
    assert accuracy == pytest.approx(results["test"]["accuracy"])


def test_metrics_have_a_record_per_epoch_and_split(finished):
    records = read_metrics(finished / "metrics.jsonl")
    assert [(r["step"], r["epoch"], r["split"]) for r in records] == [
        (STEPS_PER_EPOCH * epoch, epoch, split)
        for epoch in range(1, EPOCHS + 1)
        for split in ("train", "val")
    ]
    for record in records:
        assert record["loss"] > 0
        assert 0 <= record["accuracy"] <= 1
    train = [r for r in records if r["split"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"]
    assert train[0]["images_per_second"] > 0
    # A cosine from 0.02: the rate of the last step of the first epoch.
    expected = 0.02 * 0.5 * (1 + np.cos(np.pi * 6 / 28))
    assert train[0]["learning_rate"] == pytest.approx(expected, rel=1e-5)


def test_the_terminal_tells_what_matters(finished):
    text = (finished / "terminal.txt").read_text()
    assert "running on the CPU" in text
    assert "steps left" in text
    assert "audit passed" in text
    assert "epoch 4/4" in text
    assert "balanced accuracy" in text.lower()
    assert "orbax" not in text.lower()


def test_a_finished_run_says_so(finished, images, environment):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.suffix != ".lock"}
    result = run(command(images, finished), environment)
    assert result.returncode == 0
    assert "this run is finished" in result.stderr
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.suffix != ".lock"} == before


def test_a_finished_run_has_no_answer_for_other_images(finished, environment, tmp_path):
    for label in ("coarse", "fine"):
        for number in range(18):
            write_image(tmp_path / label / f"field{number}.png", textured(64, 64, 1000 + number))
    result = run(command(tmp_path, finished), environment)
    assert result.returncode == 2
    assert "not the images that" in result.stderr


def test_a_changed_config_is_refused_with_its_keys(finished, images, environment):
    result = run(command(images, finished, "--config.train.num_epochs=9"), environment)
    assert result.returncode == 2
    assert "train.num_epochs was 4, now 9" in result.stderr


def start(images: Path, workdir: Path, environment: dict[str, str]) -> subprocess.Popen:
    with open(workdir.with_suffix(".txt"), "a") as terminal:
        return subprocess.Popen(command(images, workdir), env=environment, stderr=terminal)


def latest_step(workdir: Path) -> int:
    return max(list_steps(workdir / "checkpoints"), default=0)


def wait_for_checkpoint(process: subprocess.Popen, workdir: Path, after: int) -> None:
    """Waits until a step past `after` is saved, then a little: anywhere in what follows."""
    deadline = time.monotonic() + 240
    while latest_step(workdir) <= after:
        assert process.poll() is None, workdir.with_suffix(".txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.SystemRandom().uniform(0, 0.2))


def test_killed_and_resumed_is_bit_identical(finished, images, environment, tmp_path):
    workdir = tmp_path / "interrupted"
    process = start(images, workdir, environment)
    wait_for_checkpoint(process, workdir, after=0)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    before = latest_step(workdir)
    process = start(images, workdir, environment)
    wait_for_checkpoint(process, workdir, after=before)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    exit_code = process.wait(timeout=60)
    terminal = workdir.with_suffix(".txt").read_text()
    assert f"resuming at step {before} of" in terminal
    if exit_code == 128 + signal.SIGTERM:
        assert "the same command resumes there" in terminal
        assert time.monotonic() - asked < 20
    else:  # training was over before it was asked
        assert exit_code in (0, -signal.SIGTERM)
        assert latest_step(workdir) == EPOCHS * STEPS_PER_EPOCH

    result = run(command(images, workdir), environment)
    assert result.returncode == 0, result.stderr
    whole, resumed = last_state(finished), last_state(workdir)
    assert whole.keys() == resumed.keys()
    assert len(whole) > 100
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)
    assert without_timings(read_metrics(workdir / "metrics.jsonl")) == without_timings(
        read_metrics(finished / "metrics.jsonl")
    )
    results = [json.loads((w / "results.json").read_text()) for w in (finished, workdir)]
    assert results[0]["test"] == results[1]["test"]
    assert (workdir / "predictions_test.csv").read_text() == (
        finished / "predictions_test.csv"
    ).read_text()


def test_a_second_process_on_one_workdir_is_refused(images, environment, tmp_path):
    with lock_workdir(tmp_path / "busy"):
        result = run(command(images, tmp_path / "busy"), environment)
    assert result.returncode == 2
    assert "another process is working there" in result.stderr


def test_missing_weights_stop_a_run_on_anyones_own_images(images, environment, tmp_path):
    offline = {**environment, "JAXCELLS_CACHE": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    arguments = command(
        images, tmp_path / "run", "--config.init=imagenet", "--config.model.width=64"
    )
    result = run(arguments, offline)
    assert result.returncode == 2
    assert "--config.init=random" in result.stderr
    assert not (tmp_path / "run" / "crops").exists()


def test_a_run_can_begin_from_an_earlier_one(finished, images, environment, tmp_path):
    workdir = tmp_path / "second"
    extra = [f"--config.init={finished}", "--config.train.num_epochs=1"]
    # Another seed is another split: what that run was trained on would now be test data.
    result = run(command(images, tmp_path / "leak", *extra, "--config.seed=1"), environment)
    assert result.returncode == 2
    assert "images that are held out here" in result.stderr
    result = run(command(images, workdir, *extra), environment)
    assert result.returncode == 0, result.stderr
    init = json.loads((workdir / "results.json").read_text())["init"]
    assert init["kind"] == "run"
    assert init["source"] == str(finished)


def test_other_crops_than_a_run_was_trained_on_are_refused(finished, images, environment, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    for name in ("crops", "arrays"):
        shutil.rmtree(workdir / name)
    crop = [*command(images, workdir, "--config.seed=1"), "crop"]
    assert run(crop, environment).returncode == 0
    launch = [sys.executable, str(REPOSITORY / "launch.py"), "evaluate", "--workdir", str(workdir)]
    result = run(launch, environment)
    assert result.returncode == 2
    assert "were trained on other crops" in result.stderr


def test_evaluate_gives_the_figures_of_the_run_and_keeps_count(finished, environment):
    launch = [sys.executable, str(REPOSITORY / "launch.py"), "evaluate", "--workdir", str(finished)]
    result = run([*launch, "--split=test"], environment)
    assert result.returncode == 0, result.stderr
    results = json.loads((finished / "results.json").read_text())
    again = json.loads((finished / f"evaluation_test_step{results['best_step']}.json").read_text())
    for key in ("accuracy", "loss", "confusion_matrix", "interval_95"):
        assert again[key] == results["test"][key]
    assert "has now been opened 2 times" in result.stderr
    history = (finished / "history.jsonl").read_text().splitlines()
    assert json.loads(history[-1])["verb"] == "evaluate"

    assert run([*launch, "--checkpoint=latest"], environment).returncode == 0
    assert (finished / f"evaluation_val_step{EPOCHS * STEPS_PER_EPOCH}.json").exists()
    wrong = run([*launch, "--split=dev"], environment)
    assert wrong.returncode == 2
    assert "use one of train, val, test" in wrong.stderr
    assert run([*launch, "--checkpoint=12345"], environment).returncode == 2
