"""Lights: each is lit by what it names, and by nothing else."""

import dataclasses

import numpy as np
import pytest

from jaxcells.data.audit import Audit
from jaxcells.evaluation.checks import run_checks
from jaxcells.evaluation.evidence import Clusters, gather_evidence
from jaxcells.evaluation.metrics import Score, split_metrics
from tests.evaluation.test_evidence import make_predictions

NAMES = [
    "independent fields",
    "leaks",
    "shortcuts",
    "baseline beaten",
    "calibration",
    "convergence",
    "few crops",
    "unknowns",
]
COUNTS = {"train": {"class0": {"crops": 80, "fields": 8}, "class1": {"crops": 90, "fields": 9}}}


def make_audit(**changed):
    found = {"errors": (), "warnings": (), "counts": COUNTS, "shared_pixels": {"val": 0, "test": 0}}
    return Audit(**found | changed)


def make_curves(val_losses, balanced, train_losses=None):
    records = []
    train_losses = train_losses or val_losses
    for epoch, (loss, accuracy, train) in enumerate(
        zip(val_losses, balanced, train_losses, strict=True), start=1
    ):
        record = {"step": 10 * epoch, "epoch": epoch}
        records.append({**record, "split": "train", "loss": train, "accuracy": 0.5})
        val = {"split": "val", "loss": loss, "balanced_accuracy": accuracy}
        records.append({**record, **val})
    return records


CONVERGED = make_curves([0.9, 0.4, 0.41], [0.6, 0.9, 0.9])


def blind_where_empty(tested):
    """The same predictions, but of crops without cells as if by a coin."""
    rng = np.random.default_rng(9)
    empty = np.array([record.foreground == 0 for record in tested.records])
    coin = rng.permutation(np.arange(empty.sum()) % 2)
    logits = tested.logits.copy()
    logits[empty] = np.where(coin[:, None] == [0, 1], 2, -2)
    return dataclasses.replace(tested, logits=logits)


def lights(
    tested=None,
    *,
    evidence=None,
    audit=None,
    curves=CONVERGED,
    split_by="field",
    temperature=1.5,
    **changed,
):
    """The checks by name."""
    tested = tested or blind_where_empty(make_predictions(fields=12, right=0.98))
    evidence = evidence or gather_evidence(tested, seed=0)
    # The stated probabilities are those of no network, and their calibration is given.
    good = Score(0.03, (0.01, 0.06))
    reliability = dataclasses.replace(evidence.reliability, ece_calibrated=good)
    evidence = dataclasses.replace(
        evidence, **{"reliability": reliability, "unknown_share": 0.05} | changed
    )
    test = split_metrics(tested, seed=0)
    checks = run_checks(test, evidence, audit or make_audit(), curves, split_by, temperature)
    assert [check.name for check in checks] == NAMES
    for check in checks:
        assert check.reason
        assert check.advice
        assert "--" not in check.reason + check.advice
    return {check.name: check for check in checks}


def test_a_good_run_lights_good_and_leaves_unknowns_unmeasured():
    found = lights()
    assert {name: check.light for name, check in found.items()} == dict.fromkeys(NAMES, "good") | {
        "unknowns": "unmeasured"
    }
    assert "12 independent fields" in found["independent fields"].reason
    assert "24 crops without cells" in found["shortcuts"].reason
    assert "'class0' has 80 training crops" in found["few crops"].reason


@pytest.mark.parametrize(("fields", "light"), [(1, "bad"), (2, "look"), (4, "look"), (5, "good")])
def test_independent_fields(fields, light):
    check = lights(make_predictions(fields=fields))["independent fields"]
    assert check.light == light
    assert f"{fields} independent field" in check.reason


def test_crops_of_one_image_on_both_sides():
    shared = make_audit(
        warnings=("data.split_by=crop: 9 images give crops to two or more splits",),
        shared_pixels={"val": 0.2, "test": 0.345},
    )
    found = lights(audit=shared, split_by="crop")
    assert found["independent fields"].light == found["leaks"].light == "bad"
    assert "34.5% of the test pixels" in found["leaks"].reason
    found = lights(audit=make_audit(errors=("3 groups in two splits, such as A",)))
    assert found["leaks"].light == "bad"
    assert found["leaks"].reason == "3 groups in two splits, such as A"


def test_a_fold_whose_training_and_validation_share_an_image():
    shared = make_audit(warnings=("1 groups give crops to train and val of this fold, too few",))
    leaks = lights(audit=shared)["leaks"]
    assert leaks.light == "look"
    assert leaks.reason.startswith("1 groups give crops to train and val of this fold")
    assert leaks.reason.endswith("of what is tested nothing was seen before")


def test_empty_crops_that_are_told_apart():
    check = lights(make_predictions(fields=12, right=0.98))["shortcuts"]
    assert check.light == "bad"
    assert "the network on 24 crops without cells: balanced accuracy " in check.reason
    assert "guessing 0.500, so background, lamp or dish tell the classes apart" in check.reason
    few = lights(make_predictions(fields=4, right=0.98))["shortcuts"]
    assert few.light == "look"


def test_no_empty_crops_and_no_interval_is_unmeasured():
    check = lights(make_predictions(fields=1, crops=3))["shortcuts"]
    assert check.light == "unmeasured"


@pytest.mark.parametrize(("fields", "light"), [(4, "unmeasured"), (5, "good")])
def test_no_shortcut_shown_in_few_fields_is_not_none_there(fields, light):
    check = lights(blind_where_empty(make_predictions(fields=fields, right=0.98)))["shortcuts"]
    assert check.light == light
    assert "guessing 0.500" in check.reason
    assert ("from so few fields" in check.reason) == (light == "unmeasured")


def test_a_border_that_gives_the_class_away():
    tested = blind_where_empty(make_predictions(fields=12, right=0.98))
    wrong = np.arange(len(tested.labels)) % 5 == 0
    border = np.where(wrong, 1 - tested.labels, tested.labels)
    tested = dataclasses.replace(tested, baselines={**tested.baselines, "background": border})
    check = lights(tested)["shortcuts"]
    assert check.light == "look"
    assert "border alone: balanced accuracy 0.79" in check.reason
    assert "without cells" not in check.reason  # measured, and none


@pytest.mark.parametrize(
    ("by_class", "by_field", "light"), [(0.5, 0.1, "good"), (0.1, 0.3, "look"), (-0.1, 0, "good")]
)
def test_clusters_by_field(by_class, by_field, light):
    check = lights(clusters=Clusters(by_class, by_field, 100))["shortcuts"]
    assert check.light == light
    assert ("0.30 against 0.10" in check.reason) == (light == "look")


def test_what_the_audit_says_of_shortcuts():
    differ = "classes differ in dtype (A: uint8; B: uint16): a shortcut by which a network can tell"
    check = lights(audit=make_audit(warnings=(differ, "few independent fields in val")))[
        "shortcuts"
    ]
    assert (check.light, check.reason) == ("look", differ)
    batches = "batches are confounded with classes: plate0 holds A alone"
    check = lights(audit=make_audit(warnings=(differ, batches)))["shortcuts"]
    assert (check.light, check.reason) == ("bad", f"{batches}; {differ}")
    groups = "data.split_by=patient: groups and classes are confounded"
    check = lights(audit=make_audit(warnings=(groups,)))["shortcuts"]
    assert (check.light, check.reason) == ("look", groups)


def test_baselines():
    tested = make_predictions(fields=12, right=0.98)
    check = lights(tested)["baseline beaten"]
    assert check.light == "good"
    assert "above that of the best" in check.reason
    equal = {**tested.baselines, "brightness": tested.predicted}
    check = lights(dataclasses.replace(tested, baselines=equal))["baseline beaten"]
    assert check.light == "bad"
    assert "not shown to beat" in check.reason
    few = make_predictions(fields=3, right=1.0)
    zeros = dict.fromkeys(few.baselines, np.zeros_like(few.labels))
    assert lights(dataclasses.replace(few, baselines=zeros))["baseline beaten"].light == "look"
    assert lights(make_predictions(fields=1, right=1.0))["baseline beaten"].light == "unmeasured"
    alone = make_predictions(fields=1, right=1.0)
    equal = {"background": alone.predicted}
    check = lights(dataclasses.replace(alone, baselines=equal))["baseline beaten"]
    assert check.light == "bad"


@pytest.mark.parametrize(
    ("score", "light"),
    [
        (Score(0.05, (0.01, 0.2)), "good"),
        (Score(0.06, (0.01, 0.2)), "look"),
        (Score(0.2, (0.11, 0.3)), "bad"),
        (Score(0.01, (None, None)), "unmeasured"),
        (Score(None, (None, None)), "unmeasured"),
    ],
)
def test_calibration(score, light):
    evidence = gather_evidence(make_predictions(), seed=0)
    reliability = dataclasses.replace(evidence.reliability, ece_calibrated=score)
    assert lights(reliability=reliability)["calibration"].light == light
    hot = lights(reliability=reliability, temperature=19.99)["calibration"]
    assert hot.light == ("look" if light == "good" else light)
    assert ("20 is the highest that is tried" in hot.reason) == (light != "unmeasured")


@pytest.mark.parametrize(
    ("curves", "light", "words"),
    [
        ([], "unmeasured", "no curves"),
        (make_curves([0.5], [0.9]), "unmeasured", "no curves"),
        (make_curves([0.7, 0.7, 0.7], [0.5, 0.4, 0.5]), "bad", "never better than guessing"),
        (make_curves([0.7, 0.5, 0.3], [0.6, 0.8, 0.9]), "look", "loss went from 0.5 to 0.3"),
        (make_curves([0.7, 0.3, 0.5], [0.6, 0.9, 0.8]), "look", "from 0.3 to 0.5: overfitting"),
        (make_curves([0.7, 0.3, 0.3], [0.6, 0.9, 0.9]), "good", "best in epoch 3 of 3"),
        (make_curves([9.0, 0.3, 0.35], [0.6, 0.9, 0.8]), "good", "best in epoch 2 of 3"),
    ],
)
def test_convergence(curves, light, words):
    check = lights(curves=curves)["convergence"]
    assert check.light == light
    assert words in check.reason


def test_few_crops():
    few = {"train": {**COUNTS["train"], "class1": {"crops": 49, "fields": 9}}}
    check = lights(audit=make_audit(counts=few))["few crops"]
    assert check.light == "look"
    assert "'class1' has 49 training crops" in check.reason
    wide = lights(make_predictions(fields=5, right=0.5))["few crops"]
    assert wide.light == "look"
    assert "percentage points" in wide.reason
    assert lights(make_predictions(fields=1))["few crops"].light == "look"
    always = make_predictions(fields=12, logits=np.full((96, 2), [2, 0], np.float32))
    check = lights(always)["few crops"]
    assert (check.light, check.reason.split("; ")[1]) == ("look", "the accuracy has no interval")


@pytest.mark.parametrize(("share", "light"), [(0.15, "unmeasured"), (0.16, "look")])
def test_unknowns(share, light):
    check = lights(unknown_share=share)["unknowns"]
    assert check.light == light
    assert f"{share:.0%} of the test crops" in check.reason
