"""Comparisons in this process: order of events, the choice, resuming, failures."""

import collections
import csv
import dataclasses
import gc
import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import compare as compare_config
from jaxcells import Error, experiment
from jaxcells import compare as comparison
from jaxcells.config import expand_comparison
from jaxcells.evaluation.comparison import choose
from jaxcells.evaluation.comparison_table import Row
from jaxcells.training import signals
from jaxcells.training.checkpoints import list_steps, restore_variables
from jaxcells.training.progress import read_metrics
from jaxcells.training.signals import Interrupted
from jaxcells.workflows.compare import compare
from jaxcells.workflows.comparison_report import describe_circumstances
from tests.data.folders import write_folder

CONFIGS = Path(__file__).parents[2] / "configs"
LABELS = ["resnet18_seed0", "resnet18_seed1", "plain18_seed0", "plain18_seed1"]
STEPS = 10  # two epochs of 40 crops in batches of 8


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), {"A": 12, "B": 12})


@pytest.fixture(scope="module")
def experiments(images):
    """The config of the crops, and four trainings on them."""
    config = compare_config.get_config()
    config.experiments, config.seeds = ("resnet18", "plain18"), (0, 1)
    config.model.width, config.init = 2, "random"
    config.data.root, config.data.crop_size = str(images), 32
    config.data.crops_per_class, config.data.split = 36, (20, 8, 8)
    config.optim.learning_rate = 0.02
    config.train.batch_size, config.train.num_epochs = 8, 2
    return expand_comparison(config, CONFIGS)


@pytest.fixture(scope="module")
def compiled():
    """How often each function was compiled, by name."""
    return collections.Counter()


@pytest.fixture(scope="module")
def finished(experiments, compiled, tmp_path_factory):
    """The workdir of an uninterrupted comparison."""
    workdir = tmp_path_factory.mktemp("comparison")

    class Listener(logging.Handler):
        def emit(self, record):
            text = record.getMessage()
            if text.startswith("Finished XLA compilation of "):
                compiled[text.split()[4]] += 1

    logger, listener = logging.getLogger("jax._src.dispatch"), Listener()
    logger.addHandler(listener)
    try:
        with jax.log_compiles():
            compare(*experiments, workdir)
    finally:
        logger.removeHandler(listener)
    return workdir


def read(path):
    return json.loads(path.read_text())


def column(path, name):
    with open(path, newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def training_seconds(workdir, name):
    """The median epoch of 40 crops, twice; the mean of both seeds."""
    of_seeds = []
    for seed in (0, 1):
        records = read_metrics(workdir / "experiments" / f"{name}_seed{seed}" / "metrics.jsonl")
        epochs = [40 / r["images_per_second"] for r in records if r["split"] == "train"]
        of_seeds.append(2 * np.median(epochs))
    return np.mean(of_seeds)


def test_a_comparison_leaves_tables_figures_and_whole_workdirs(finished):
    for name in ("table.csv", "table.md", "curves.png", "accuracy_against_time.png"):
        assert (finished / "compare" / name).stat().st_size > 100
    assert column(finished / "compare" / "table.csv", "experiment") == ["resnet18", "plain18"]
    assert column(finished / "compare" / "table.csv", "seeds") == ["0 1", "0 1"]
    found = read(finished / "compare" / "compare.json")
    assert found["failures"] == {}
    assert found["tested_before_choice"] == []
    for label in LABELS:
        folder = finished / found["folders"][label]
        results = read(folder / "results.json")
        assert results["num_steps"] == STEPS
        assert results["memory"]["train_step_bytes"] > 100_000
        assert column(folder / "predictions_val.csv", "prediction")
        # A run's folder stands for itself: `evaluate` needs nothing else.
        figures = experiment.evaluate(folder, split="val", which="best")
        assert figures["accuracy"] == results["validation"]["accuracy"]
    rows = {row["name"]: row for row in found["experiments"]}
    for name in ("resnet18", "plain18"):
        of = [read(finished / "experiments" / f"{name}_seed{s}" / "results.json") for s in (0, 1)]
        for split in ("validation", "test"):
            values = [results[split]["balanced_accuracy"] for results in of]
            assert rows[name][split]["balanced_accuracy"] == pytest.approx(np.mean(values))
            deviation = rows[name][split]["deviation"]["balanced_accuracy"]
            assert deviation == pytest.approx(np.std(values, ddof=1))
        seconds = training_seconds(finished, name)
        assert rows[name]["train_s"] == pytest.approx(seconds)
        assert rows[name]["epoch_s"] == pytest.approx(seconds / 2)
        assert rows[name]["train_images_per_second"] == pytest.approx(2 * 40 / seconds)
    # Counted independently, in test_resnet and test_summary, at other sizes.
    assert rows["resnet18"]["parameters"] > rows["plain18"]["parameters"]
    assert rows["resnet18"]["multiply_adds"] > rows["plain18"]["multiply_adds"]


def test_seeds_differ_in_training_and_share_crops(finished):
    crops = {label: finished / "experiments" / label / "crops" for label in LABELS}
    assert {path.resolve() for path in crops.values()} == {(finished / "crops").resolve()}
    first, second = (
        restore_variables(finished / "experiments" / label / "checkpoints", "latest")[0]
        for label in LABELS[:2]
    )
    assert not np.array_equal(first["params"]["fc"]["kernel"], second["params"]["fc"]["kernel"])


def test_seeds_of_an_experiment_share_what_is_compiled(finished, compiled):
    assert compiled["jit(train_step)"] == 2  # one a network
    assert compiled["jit(eval_step)"] == 2
    assert compiled["jit(predict_step)"] == 2


def test_the_choice_follows_from_validation_alone(finished):
    found = read(finished / "compare" / "choice.json")
    folder = finished / "experiments" / LABELS[0]
    labels = [int(name == "B") for name in column(folder / "predictions_val.csv", "label")]
    predictions, seconds = {}, {}
    for name in ("resnet18", "plain18"):
        folders = [finished / "experiments" / f"{name}_seed{seed}" for seed in (0, 1)]
        predictions[name] = [
            [int(p == "B") for p in column(f / "predictions_val.csv", "prediction")]
            for f in folders
        ]
        seconds[name] = training_seconds(finished, name)
    groups = column(folder / "predictions_val.csv", "group")
    expected = choose(predictions, labels, groups, seconds, class_names=["A", "B"], seed=0)
    assert found.pop("tested_before_choice") == []
    expected = json.loads(json.dumps(expected.to_dict()))
    for candidate, other in zip(found["candidates"], expected["candidates"], strict=True):
        # From rounded rates here, from the clock there.
        assert candidate.pop("seconds") == pytest.approx(other.pop("seconds"))
    assert found == expected


class Sealed(dict):
    """Arrays whose test split cannot be had before the choice is written."""

    def __init__(self, arrays, choice):
        super().__init__(arrays)
        self.choice = choice

    def __getitem__(self, side):
        if side == "test":
            assert self.choice.exists(), "the test split was opened before the choice"
        return super().__getitem__(side)


def untested(finished, workdir):
    """Copies a comparison as it is when all is trained and nothing chosen."""
    shutil.copytree(finished, workdir, symlinks=True)
    shutil.rmtree(workdir / "compare")
    for label in LABELS:
        for name in ("results.json", "predictions_test.csv", "history.jsonl"):
            (workdir / "experiments" / label / name).unlink()


def test_poisoned_test_figures_change_nothing_about_the_choice(
    finished, experiments, tmp_path, monkeypatch
):
    workdir = tmp_path / "poisoned"
    untested(finished, workdir)

    def poisoned(config, folder):
        data = experiment.prepare_together(config, folder)
        test = data.arrays["test"]
        noise = np.random.default_rng(0).integers(0, 256, test.images.shape).astype(np.uint8)
        wrong = dataclasses.replace(test, images=noise, labels=1 - test.labels)
        arrays = Sealed({**data.arrays, "test": wrong}, workdir / "compare" / "choice.json")
        return dataclasses.replace(data, arrays=arrays)

    monkeypatch.setattr(comparison, "prepare_together", poisoned)
    compare(*experiments, workdir)
    assert read(workdir / "compare" / "choice.json") == read(finished / "compare" / "choice.json")
    of = [read(w / "compare" / "compare.json")["experiments"] for w in (finished, workdir)]
    assert [row["test"] for row in of[0]] != [row["test"] for row in of[1]]
    assert [row["validation"] for row in of[0]] == [row["validation"] for row in of[1]]


def test_stopped_anywhere_it_goes_on_there_and_trains_nothing_twice(
    finished, experiments, tmp_path, monkeypatch
):
    calls = 0
    workdir = tmp_path / "stopped"

    def requested(self, step):
        nonlocal calls
        calls += 1
        # The second run's eighth step, that is in its second epoch.
        self.signal = 15 if calls == STEPS + 8 else 0
        return self.signal != 0

    monkeypatch.setattr(signals.StopRequest, "requested", requested)
    with pytest.raises(Interrupted, match="stopped at step 7 of 10"):
        compare(*experiments, workdir)
    assert not (workdir / "compare").exists()
    assert not (workdir / "experiments" / LABELS[2]).exists()
    assert list_steps(workdir / "experiments" / LABELS[1] / "checkpoints")[-1] == 7
    assert not list(workdir.rglob("predictions_test.csv"))
    checkpoint = workdir / "experiments" / LABELS[0] / "checkpoints" / str(STEPS)
    written = checkpoint.stat().st_mtime_ns

    compare(*experiments, workdir)
    assert calls == 4 * STEPS + 1  # every step once, and the one that was refused
    assert checkpoint.stat().st_mtime_ns == written
    for label in LABELS:
        whole, resumed = (
            restore_variables(w / "experiments" / label / "checkpoints", "latest")[0]
            for w in (finished, workdir)
        )
        jax.tree.map(np.testing.assert_array_equal, whole, resumed)

    choice = read(workdir / "compare" / "choice.json")
    assert choice["tested_before_choice"] == []

    # What is finished is only read, and the choice stays as it was made; what it left behind is
    # enough.
    base, four = experiments
    for label in LABELS:
        shutil.rmtree(workdir / "experiments" / label / "checkpoints")
        (workdir / "experiments" / label / "metrics.jsonl").unlink()
    compare(*experiments, workdir)
    assert calls == 4 * STEPS + 1
    assert read(workdir / "compare" / "choice.json") == choice
    assert read(workdir / "compare" / "compare.json")["tested_before_choice"] == []

    # Of other experiments it is another choice.
    compare(base, four[1:], workdir)
    assert calls == 4 * STEPS + 1
    assert column(workdir / "compare" / "table.csv", "seeds") == ["1", "0 1"]
    # By then their test figures had been seen, and the record of this other choice says so.
    assert read(workdir / "compare" / "compare.json")["tested_before_choice"] == LABELS[1:]


def test_one_that_fails_is_reported_and_the_others_go_on(experiments, tmp_path, monkeypatch):
    base, four = experiments
    two = [four[0], four[2]]
    train = comparison.train_run

    def failing(config, workdir, data, init):
        if "resnet18" in workdir.name:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocating 9 GiB")
        return train(config, workdir, data, init)

    monkeypatch.setattr(comparison, "train_run", failing)
    with pytest.raises(Error, match=r"1 of the trainings failed \(resnet18_seed0: RuntimeError: "):
        compare(base, two, tmp_path)
    found = read(tmp_path / "compare" / "compare.json")
    assert found["choice"]["chosen"] == "plain18"
    assert "out of memory" in (tmp_path / "compare" / "table.md").read_text()
    assert column(tmp_path / "compare" / "table.csv", "status") == ["failed", "finished"]

    # The same command tries it again, and trains nothing else.
    monkeypatch.setattr(comparison, "train_run", train)
    compare(base, two, tmp_path)
    assert column(tmp_path / "compare" / "table.csv", "status") == ["finished", "finished"]

    monkeypatch.setattr(comparison, "train_run", failing)
    with pytest.raises(Error, match="1 of the trainings failed"):
        compare(base, two[:1], tmp_path / "none")


def test_a_signal_in_the_last_step_stops_the_comparison_too(experiments, tmp_path, monkeypatch):
    def requested(self, step):
        # Comes in after the last step's question.
        self.signal, stop = (15 if step == STEPS else 0), False
        return stop

    monkeypatch.setattr(signals.StopRequest, "requested", requested)
    with pytest.raises(Interrupted, match="stopped at step 10 of 10"):
        compare(*experiments, tmp_path)
    assert list_steps(tmp_path / "experiments" / LABELS[0] / "checkpoints")[-1] == STEPS
    assert not (tmp_path / "experiments" / LABELS[1]).exists()


def test_a_copy_with_the_links_followed_goes_on(finished, experiments, tmp_path):
    shutil.copytree(finished, tmp_path / "copy", symlinks=False)
    compare(*experiments, tmp_path / "copy")
    assert read(tmp_path / "copy" / "compare" / "compare.json")["failures"] == {}


def test_runs_and_comparisons_keep_out_of_each_other(finished, experiments, tmp_path):
    base, four = experiments
    with pytest.raises(Error, match="is the workdir of a comparison"):
        experiment.train_and_evaluate(four[0].config, finished)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(Error, match="is the workdir of a single run"):
        compare(base, four, tmp_path)


def test_no_array_stays_on_the_devices(finished, experiments):
    gc.collect()
    before = len(jax.live_arrays())
    compare(*experiments, finished)
    gc.collect()
    assert len(jax.live_arrays()) <= before


def test_other_crops_and_another_config_are_refused(finished, experiments):
    base, four = experiments
    changed = dataclasses.replace(four[0], config=four[0].config.copy_and_resolve_references())
    changed.config.optim.learning_rate = 0.5
    before = (finished / "compare" / "compare.json").read_bytes()
    with pytest.raises(Error, match=r"optim\.learning_rate was 0\.02, now 0\.5"):
        compare(base, [four[2], changed], finished)
    assert (finished / "compare" / "compare.json").read_bytes() == before
    other = base.copy_and_resolve_references()
    other.data.crop_size = 48
    with pytest.raises(Error, match="crop_size"):
        compare(other, four, finished)


def configured(**values):
    config = compare_config.get_config()
    config.init = "random"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return expand_comparison(config, CONFIGS)


def test_experiments_are_the_comparison_with_what_their_configs_change():
    base, found = configured(
        experiments=("resnet18,plain34",), seeds=(3, 5), seed=7, train__num_epochs=9
    )
    assert [e.label for e in found] == [
        f"{name}_seed{seed}" for name in ("resnet18", "plain34") for seed in (3, 5)
    ]
    assert "experiments" not in base
    for e in found:
        assert e.config.model.name == e.name
        assert e.config.seed == e.seed
        assert e.config.data.seed == 7  # of the crops, which all share
        assert e.config.train.num_epochs == 9
        assert e.config.data.split == (754, 100, 100)


def test_the_network_is_the_experiment_s_and_what_else_it_changes_is_told():
    _, (resnet34, probe) = configured(
        experiments=("resnet34", "linear_probe"),
        model__name="plain18",
        optim__learning_rate=0.2,
        init="random",
    )
    assert resnet34.config.model.name == "resnet34"
    assert (resnet34.config.optim.learning_rate, probe.config.optim.learning_rate) == (0.2, 0.01)


def test_what_a_reader_must_know_stands_in_the_table(finished, experiments):
    base, four = experiments
    changed = four[2].config.copy_and_resolve_references()
    changed.train.num_epochs = 9
    done = [four[0], dataclasses.replace(four[2], config=changed)]
    tested = {e.label: {"baseline": {"test_accuracy": 0.75}} for e in done}
    rows = [
        Row("resnet18", test={"accuracy": 0.7}),
        Row("plain18", test={"accuracy": 0.8}),
    ]
    assert describe_circumstances(base, done, tested, rows, ["resnet18_seed0"]) == [
        "Note: plain18 is trained otherwise than the comparison says: in its own config "
        "train.num_epochs was 2, now 9.",
        "Brightness and contrast of the crops alone, by a linear classifier: accuracy 0.750 on the "
        "test split.",
        "WARNING: no better than brightness and contrast: resnet18.",
        "Note: the test split had been opened for resnet18_seed0 before this choice.",
    ]
    table = (finished / "compare" / "table.md").read_text()
    assert "Brightness and contrast of the crops alone" in table
    found = read(finished / "compare" / "compare.json")
    assert found["data"]["classes"] == ["A", "B"]
    assert found["config"]["seed"] == 0
    for label in LABELS:
        results = read(finished / found["folders"][label] / "results.json")
        assert found["trainings"][label]["test"] == results["test"]


def test_the_default_is_the_four_depths():
    _, found = expand_comparison(compare_config.get_config(), CONFIGS)
    assert [e.config.model.name for e in found] == ["resnet18", "resnet34", "resnet50", "resnet152"]
    assert {e.config.init for e in found} == {"imagenet"}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"experiments": ("resnet17",)}, "there is no file .*resnet17.py"),
        ({"experiments": ()}, "must name one or more configs"),
        ({"experiments": ("resnet18", "resnet18")}, "each once"),
        ({"experiments": ("../configs/resnet18",)}, "must be the name of a config file"),
        ({"seeds": (0, 0)}, "each once"),
        ({"seeds": (True,)}, "must be one or more whole numbers"),
        ({"seeds": (-1,)}, r"resnet18: the config has a mistake:\s+seed=-1"),
        ({"experiments": ("demo",)}, "demo: data.crop_size=100 would need other crops"),
        ({"optim__momentum": 2.0}, r"optim\.momentum"),
    ],
)
def test_wrong_comparisons_say_what_is_wrong(values, text):
    with pytest.raises(Error, match=text):
        configured(**values)
