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
from jaxcells.config import expand_comparison
from jaxcells.evaluation.bootstrap import Split
from jaxcells.evaluation.comparison import Choice, choose
from jaxcells.evaluation.results import RunResults
from jaxcells.files import Error, Workdir, from_record
from jaxcells.training import signals
from jaxcells.training.checkpoints import list_steps, restore_variables
from jaxcells.training.progress import read_metrics
from jaxcells.training.signals import Interrupted
from jaxcells.workflows import train
from jaxcells.workflows.compare import circumstances, compare
from jaxcells.workflows.evaluate import evaluate
from jaxcells.workflows.report import report
from tests.data.folders import write_folder
from tests.evaluation.test_comparison_figures import figures, row

CONFIGS = Path(compare_config.__file__).parent
NAMES = ("resnet18", "plain18")
LABELS = [f"{name}_seed{seed}" for name in NAMES for seed in (0, 1)]
STEPS = 10  # two epochs of 40 crops in batches of 8


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    """The config of the crops, and four trainings on them."""
    images = write_folder(tmp_path_factory.mktemp("images"), {"A": 12, "B": 12})
    config = compare_config.get_config()
    config.experiments, config.seeds = NAMES, (0, 1)
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
    workdir = Workdir(tmp_path_factory.mktemp("comparison"))

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


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it, with links as links."""
    return Workdir(shutil.copytree(finished.path, tmp_path / "copy", symlinks=True))


def run_of(workdir, label):
    return Workdir(workdir.experiments / label)


def read(path):
    return json.loads(path.read_text())


def comparison_of(workdir):
    return read(workdir.comparison / "compare.json")


def column(path, name):
    with open(path, newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def variables(workdir, label):
    return restore_variables(run_of(workdir, label).checkpoints, "latest")[0]


def test_a_comparison_leaves_tables_figures_and_whole_workdirs(finished):
    found = comparison_of(finished)
    for name in ("curves.png", "accuracy_against_time.png"):
        assert (finished.comparison / name).stat().st_size > 100
    assert "Brightness and contrast of the crops" in (finished.comparison / "table.md").read_text()
    assert column(finished.comparison / "table.csv", "experiment") == list(NAMES)
    assert column(finished.comparison / "table.csv", "seeds") == ["0 1", "0 1"]
    assert found["failures"] == {}
    results = {}
    for label in LABELS:
        run = run_of(finished, label)
        assert run.crops.resolve() == finished.crops.resolve()
        assert read(run.results) == found["trainings"][label]
        results[label] = from_record(RunResults, read(run.results), run.results)
    for measured, name in zip(found["experiments"], NAMES, strict=True):
        of = [results[f"{name}_seed{seed}"] for seed in (0, 1)]
        for split in ("validation", "test"):
            values = [getattr(r, split).balanced_accuracy for r in of]
            assert measured[split]["balanced_accuracy"] == pytest.approx(np.mean(values))
            deviation = measured[split]["balanced_accuracy_deviation"]
            assert deviation == pytest.approx(np.std(values, ddof=1))
        seconds = training_seconds(finished, name)
        assert measured["train_s"] == pytest.approx(seconds)
        assert measured["epoch_s"] == pytest.approx(seconds / 2)
        assert measured["train_images_per_second"] == pytest.approx(2 * 40 / seconds)
        assert measured["step_memory_bytes"] > 100_000
    # Counted independently, in test_resnet and test_summary, at other sizes.
    resnet, plain = found["experiments"]
    assert resnet["parameters"] > plain["parameters"]
    assert resnet["multiply_adds"] > plain["multiply_adds"]


def test_the_report_is_of_the_comparison_and_of_what_it_chose(finished):
    text = finished.report.read_text()
    assert text.count("chance (0.500)") == text.count("brightness alone, test (") == 3
    chosen = run_of(finished, f"{comparison_of(finished)['choice']['chosen']}_seed0")
    accuracy = read(chosen.results)["test"]["accuracy"]
    assert f"<strong>{100 * accuracy:.1f} %</strong>" in text
    for part in (
        "Report of a comparison",
        "Accuracy against training time",
        "Rule: Chosen is",
        *NAMES,
    ):
        assert part in text


def test_the_report_of_fractions_shows_the_learning_curve(copy):
    path, caption = copy.comparison / "compare.json", "Accuracy against the number of training"
    assert caption not in copy.report.read_text()
    for name in NAMES:  # as if they were trained on half of the images
        path.write_text(path.read_text().replace(f'"{name}"', f'"{name}_fraction0.5"'))
    for run in list(copy.experiments.iterdir()):
        run.rename(run.with_name(run.name.replace("_seed", "_fraction0.5_seed")))
    report(copy)
    assert caption in copy.report.read_text()


def test_seeds_differ_in_training_and_share_what_is_compiled(finished, compiled):
    first, second = (variables(finished, label)["params"]["fc"] for label in LABELS[:2])
    assert not np.array_equal(first["kernel"], second["kernel"])
    assert compiled["jit(train_step)"] == 2  # one a network
    assert compiled["jit(eval_step)"] == 2
    assert compiled["jit(predict_step)"] == 2


def training_seconds(workdir, name):
    """The median epoch of 40 crops, twice; the mean of both seeds."""
    of_seeds = []
    for seed in (0, 1):
        records = read_metrics(run_of(workdir, f"{name}_seed{seed}").metrics)
        epochs = [40 / r["images_per_second"] for r in records if r["split"] == "train"]
        of_seeds.append(2 * np.median(epochs))
    return np.mean(of_seeds)


def test_the_choice_follows_from_validation_alone(finished):
    path = finished.comparison / "choice.json"
    found = from_record(Choice, read(path), path)
    tables = {}
    for run in map(run_of, [finished] * 4, LABELS):
        # A run's folder stands for itself: `evaluate` needs nothing else.
        of_run = evaluate(run, split="val", which="best")
        assert of_run.accuracy == read(run.results)["validation"]["accuracy"]
        (tables[run.path.name],) = run.path.glob("predictions_val_step*.csv")
    is_b = {label: np.array(column(t, "prediction")) == "B" for label, t in tables.items()}
    labels = (np.array(column(tables[LABELS[0]], "label")) == "B").astype(int)
    split = Split(labels, np.array(column(tables[LABELS[0]], "group")), ["A", "B"])
    predictions = {n: [is_b[f"{n}_seed{seed}"] for seed in (0, 1)] for n in NAMES}
    seconds = {candidate.name: candidate.seconds for candidate in found.candidates}
    assert found == choose(predictions, split, seconds)
    assert seconds == pytest.approx({name: training_seconds(finished, name) for name in NAMES})


class Sealed(dict):
    """Arrays whose test split cannot be had before the choice is written."""

    def __init__(self, arrays, choice):
        super().__init__(arrays)
        self.choice = choice

    def __getitem__(self, split):
        assert split != "test" or self.choice.exists(), "the test split was opened before"
        return super().__getitem__(split)


def test_poisoned_test_figures_change_nothing_about_the_choice(
    finished, copy, experiments, monkeypatch
):
    shutil.rmtree(copy.comparison)
    for label in LABELS[:2]:  # as it is when all is trained and nothing chosen
        run = run_of(copy, label)
        for path in (run.results, run.predictions("test"), run.history):
            path.unlink()
    prepare = train.prepare_together

    def poisoned(config, workdir):
        data = prepare(config, workdir)
        test = data.arrays["test"]
        noise = np.random.default_rng(0).integers(0, 256, test.images.shape).astype(np.uint8)
        wrong = dataclasses.replace(test, images=noise, labels=1 - test.labels)
        arrays = Sealed({**data.arrays, "test": wrong}, workdir.comparison / "choice.json")
        return dataclasses.replace(data, arrays=arrays)

    monkeypatch.setattr(train, "prepare_together", poisoned)
    compare(*experiments, copy)
    was, now = (comparison_of(workdir) for workdir in (finished, copy))
    assert now["choice"].pop("tested_before_choice") == LABELS[2:]
    assert f"Before the choice, {', '.join(LABELS[2:])} had been" in copy.report.read_text()
    assert now["choice"] == {key: was["choice"][key] for key in now["choice"]}
    of = [found["experiments"] for found in (was, now)]
    assert [row["validation"] for row in of[0]] == [row["validation"] for row in of[1]]
    assert [row["test"] for row in of[0]] != [row["test"] for row in of[1]]


def test_stopped_anywhere_it_goes_on_there_and_trains_nothing_twice(
    finished, experiments, tmp_path, monkeypatch
):
    base, (first, second, *_) = experiments
    workdir, calls = Workdir(tmp_path / "stopped"), 0

    def requested(self, step):
        nonlocal calls
        calls += 1
        # The second run's eighth step, that is in its second epoch.
        self.signal = 15 if calls == STEPS + 8 else 0
        return self.signal != 0

    monkeypatch.setattr(signals.StopRequest, "requested", requested)
    with pytest.raises(Interrupted, match="stopped at step 7 of 10"):
        compare(base, [first, second], workdir)
    assert not workdir.comparison.exists()
    for unfinished in (workdir, run_of(workdir, LABELS[1])):
        with pytest.raises(Error, match="not finished; give the command that began it again"):
            report(unfinished)
    assert list_steps(run_of(workdir, LABELS[1]).checkpoints)[-1] == 7
    assert not list(workdir.path.rglob("predictions_test.csv"))

    compare(base, [first, second], workdir)
    assert calls == 2 * STEPS + 1  # every step once, and the one that was refused
    for label in LABELS[:2]:
        whole, resumed = variables(finished, label), variables(workdir, label)
        jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    choice = read(workdir.comparison / "choice.json")
    assert choice["tested_before_choice"] == []

    # What is finished is not trained again, and the choice stays as it was made.
    run_of(workdir, LABELS[0]).metrics.unlink()
    compare(base, [first, second], workdir)
    assert comparison_of(workdir)["choice"] == read(workdir.comparison / "choice.json") == choice

    # Of other experiments it is another choice. By then their test figures had been seen, and the
    # record of it says so.
    compare(base, [second], workdir)
    assert calls == 2 * STEPS + 1
    assert column(workdir.comparison / "table.csv", "seeds") == ["1"]
    assert read(workdir.comparison / "choice.json")["tested_before_choice"] == [LABELS[1]]
    prepare = train.prepare_together

    def other_crops(config, workdir):
        data = prepare(config, workdir)
        crop_set = dataclasses.replace(data.crop_set, manifest_sha256="0")
        return dataclasses.replace(data, crop_set=crop_set)

    monkeypatch.setattr(train, "prepare_together", other_crops)
    with pytest.raises(Error, match="resnet18_seed1 was trained on other crops; delete it"):
        compare(base, [second], workdir)


def test_one_that_fails_is_reported_and_the_others_go_on(copy, experiments, monkeypatch):
    base, four = experiments
    tried, kinds = [], [Error, jax.errors.JaxRuntimeError, MemoryError]

    def failing(config, run, *args):
        tried.append(run.path.name)
        raise kinds[len(tried) - 1]("RESOURCE_EXHAUSTED: out of memory\nallocating 9 GiB")

    monkeypatch.setattr(train, "train_run", failing)
    shutil.rmtree(run_of(copy, LABELS[0]).path)
    message = "resnet18_seed0: RESOURCE_EXHAUSTED: out of memory allocating 9 GiB"
    for _ in range(2):  # the same command tries it again, and nothing else
        with pytest.raises(Error, match=rf"1 of the trainings failed \({message}\); the same"):
            compare(base, four, copy)
    assert tried == [LABELS[0]] * 2
    assert column(copy.comparison / "table.csv", "experiment") == [*NAMES, LABELS[0]]
    assert column(copy.comparison / "table.csv", "seeds") == ["1", "0 1", ""]
    assert "out of memory" in (copy.comparison / "table.md").read_text()

    with pytest.raises(Error, match="1 of the trainings failed"):
        compare(base, four[:1], copy)
    # A bug is no failure of an experiment: it keeps its traceback.
    monkeypatch.setattr(train, "train_run", lambda *args: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        compare(base, four, copy)


def test_a_copy_with_the_links_followed_goes_on_and_leaves_no_array(
    finished, experiments, tmp_path
):
    workdir = Workdir(shutil.copytree(finished.path, tmp_path / "copy", symlinks=False))
    gc.collect()
    before = len(jax.live_arrays())
    compare(*experiments, workdir)
    gc.collect()
    assert len(jax.live_arrays()) <= before
    assert column(workdir.comparison / "table.csv", "failure") == ["", ""]


def test_other_crops_another_config_and_workdirs_of_runs_are_refused(
    finished, experiments, tmp_path
):
    base, four = experiments
    changed = dataclasses.replace(four[0], config=four[0].config.copy_and_resolve_references())
    changed.config.optim.learning_rate = 0.5
    before = (finished.comparison / "compare.json").read_bytes()
    with pytest.raises(Error, match=r"optim\.learning_rate was 0\.02, now 0\.5"):
        compare(base, [four[2], changed], finished)
    other = base.copy_and_resolve_references()
    other.data.crop_size = 48
    with pytest.raises(Error, match="crop_size"):
        compare(other, four, finished)
    assert (finished.comparison / "compare.json").read_bytes() == before
    with pytest.raises(Error, match="is the workdir of a comparison"):
        train.train_and_evaluate(four[0].config, finished)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(Error, match="is the workdir of a run; choose another workdir"):
        compare(base, four, Workdir(tmp_path))


def test_what_a_reader_must_know_stands_in_the_table(experiments):
    base, four = experiments
    changed = four[2].config.copy_and_resolve_references()
    changed.train.num_epochs = 9
    done = [four[0], dataclasses.replace(four[2], config=changed)]
    rows = [row(name, 1, 1, figures(0.7 + n / 10, 0.6, 0.9)) for n, name in enumerate(NAMES)]
    assert circumstances(base, done, rows, 0.75) == [
        "Note: plain18 is trained otherwise than the comparison says: in its own config "
        "train.num_epochs was 2, now 9.",
        "Brightness and contrast of the crops alone, by a linear classifier: accuracy 0.750 on the "
        "test split.",
        "WARNING: no better than brightness and contrast: resnet18.",
    ]


def configured(**values):
    config = compare_config.get_config()
    config.init = "random"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return expand_comparison(config, CONFIGS)


def test_experiments_are_the_comparison_with_what_their_configs_change():
    base, found = configured(
        experiments=("resnet34,linear_probe",),
        seeds=(3, 5),
        seed=7,
        model__name="plain18",
        optim__learning_rate=0.2,
    )
    names = ("resnet34", "linear_probe")
    assert [e.label for e in found] == [f"{name}_seed{seed}" for name in names for seed in (3, 5)]
    assert "experiments" not in base
    assert [e.config.seed for e in found] == [3, 5, 3, 5]
    assert {e.config.data.seed for e in found} == {7}  # of the crops, which all share
    assert {e.config.model.name for e in found} == {"resnet34"}
    assert [e.config.optim.learning_rate for e in found] == [0.2, 0.2, 0.01, 0.01]

    _, found = configured(
        experiments=("resnet18",), fractions=(0.25, 1.0), train__num_epochs=3, data__seed=4
    )
    assert [e.label for e in found] == ["resnet18_fraction0.25_seed0", "resnet18_fraction1_seed0"]
    assert [e.config.data.fraction for e in found] == [0.25, 1]
    assert [e.config.train.num_epochs for e in found] == [12, 3]  # as many steps

    _, found = expand_comparison(compare_config.get_config(), CONFIGS)  # by default four depths
    assert [e.config.model.name for e in found] == ["resnet18", "resnet34", "resnet50", "resnet152"]
    assert {e.config.init for e in found} == {"imagenet"}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"experiments": ("resnet17",)}, "there is no file resnet17, nor a config"),
        ({"experiments": ()}, "must be names of configs"),
        ({"experiments": ("resnet18", "resnet18")}, "each once"),
        ({"experiments": ("../configs/resnet18",)}, "must be names of configs"),
        ({"seeds": (0, 0)}, "each once"),
        ({"fractions": (0.5, 0.5)}, r"fractions=\(0\.5, 0\.5\) must be"),
        ({"fractions": (0.0, 1.0)}, "above 0 and at most 1"),
        ({"seeds": (True,)}, "must be one or more whole numbers"),
        ({"seeds": (-1,)}, r"resnet18: the config has a mistake:\s+seed=-1"),
        ({"experiments": ("demo",)}, "demo: data.crop_size=100 would need other crops"),
        ({"optim__momentum": 2.0}, r"optim\.momentum"),
    ],
)
def test_wrong_comparisons_say_what_is_wrong(values, text):
    with pytest.raises(Error, match=text):
        configured(**values)
