"""What the terminal says at the end of a run."""

import dataclasses

from jaxcells.evaluation.calibration import Calibration
from jaxcells.evaluation.evidence import gather_evidence
from jaxcells.evaluation.metrics import split_metrics
from jaxcells.evaluation.results import RunResults, Timing
from tests.evaluation.test_evidence import make_predictions


def make_results(tested, warnings=(), init=None):
    metrics = split_metrics(tested, seed=0)
    return RunResults(
        validation=metrics,
        test=metrics,
        test_opened=1,
        evidence=gather_evidence(tested, seed=0),
        calibration=Calibration(30, 1.5, "nearest neighbour", 0.1, ""),
        init=init or {"kind": "random"},
        data={"audit": {"warnings": list(warnings)}},
        timing=Timing(1, 1, 0, 60, 60, 1, 70, 100.0, 300.0),
        memory={},
        best_step=30,
        num_steps=40,
        num_epochs=4,
        model={},
        environment={},
    )


def test_a_good_run_begins_with_its_table():
    results = make_results(make_predictions(fields=12, right=0.98))
    lines = results.summary().splitlines()
    assert lines[0] == "test split, best checkpoint (step 30)"
    assert not any("WARNING" in line for line in lines)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "24 whole fields, by the mean over their crops: accuracy 1.000 (0." in text
    background = results.evidence.baselines["background"].balanced_accuracy
    assert f"balanced accuracy: majority 0.500, background {background:.3f}" in text
    assert f"calibration error {results.evidence.reliability.ece_calibrated.value:.3f} (" in text


def test_a_baseline_that_is_not_beaten_is_said_first():
    tested = make_predictions(fields=12)
    equal = {**tested.baselines, "brightness": tested.predicted}
    lines = make_results(dataclasses.replace(tested, baselines=equal)).summary().splitlines()
    assert lines[0].startswith("WARNING: the network is not shown to beat the balanced accuracy of")
    assert "brightness and contrast of the crops alone (0." in " ".join(lines[:3])
    assert max(map(len, lines)) <= 80


def test_what_a_reader_must_know_is_said_last():
    shared = "data.split_by=crop: 9 images give crops to two or more splits; training crops show "
    shared += "31.0% of the validation pixels and 34.5% of the test pixels"
    confounded = "batches are confounded with classes: plate0 holds A alone"
    other = "classes are unequal: A has 80 training crops, B 20"
    init = {"kind": "file", "warning": "trained on other images"}
    tested = make_predictions(fields=12, right=0.98)
    text = make_results(tested, (shared, other, confounded), init).summary()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(text.split())
    for warning in (shared, confounded, "trained on other images"):
        assert f"WARNING: {warning}" in words
    assert other not in words
