import dataclasses
import json

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.calibration import calibration_curve

from jaxcells.data.crop_set import CropRecord
from jaxcells.evaluation.calibration import Calibration, fit_calibration, reliability
from jaxcells.evaluation.predictions import Predictions
from jaxcells.files import from_record


def predictions_of(labels, logits, groups, features=None):
    """Predictions of crops of classes "0", "1", ... in fields of the given names."""
    records = tuple(
        CropRecord(f"{n}.png", str(label), "", f"{group}.png", str(group), 0, 0, 1.0, "val", "")
        for n, (label, group) in enumerate(zip(labels, groups, strict=True))
    )
    logits, number = np.asarray(logits, np.float32), len(labels)
    features = np.ones((number, 2)) if features is None else features
    names = tuple(str(k) for k in range(logits.shape[1]))
    return Predictions(
        *(records, names, logits, np.ones(number), np.zeros(number)),
        features=np.asarray(features, np.float32),
    )


def calibrated_logits(rng, number, classes):
    """Labels drawn from the probabilities of random logits, which are so calibrated."""
    logits = rng.normal(size=(number, classes)) * 2
    return (logits + rng.gumbel(size=logits.shape)).argmax(axis=1), logits


@pytest.mark.parametrize("classes", [2, 5])
def test_temperature_undoes_a_false_scale_and_is_the_likeliest(classes):
    labels, logits = calibrated_logits(np.random.default_rng(0), 4000, classes)
    found = fit_calibration(predictions_of(labels, 3 * logits, np.arange(4000) % 50), 7)
    assert found.checkpoint == 7
    assert found.temperature == pytest.approx(3, rel=0.06)

    def loss(temperature):
        scaled = log_softmax(3 * logits / temperature, axis=1)
        return -scaled[np.arange(4000), labels].mean()

    best = minimize(loss, 1.0, method="Nelder-Mead", options={"xatol": 1e-6}).x[0]
    assert found.temperature == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("labels", [[0, 1] * 10, [0] * 20], ids=["two classes", "one class"])
def test_perfect_validation_leaves_the_temperature_alone(labels, caplog):
    logits = 0.1 * np.eye(2)[labels]
    assert fit_calibration(predictions_of(labels, logits, range(20)), 0).temperature == 1
    assert not caplog.records


def test_a_temperature_at_its_limit_is_finite():
    labels = np.array([0, 1] * 10)
    always_wrong = fit_calibration(predictions_of(labels, np.eye(2)[1 - labels], range(20)), 0)
    assert always_wrong.temperature == pytest.approx(20, rel=1e-3)


def fields_of_cells(rng, directions, fields, crops):
    """Features and groups of crops near some directions; crops of a field lie closer together."""
    features, groups = [], []
    for number, direction in enumerate(directions):
        for field in range(fields):
            center = direction + 0.2 * rng.normal(size=8)
            features.append(center + 0.05 * rng.normal(size=(crops, 8)))
            groups += [f"{number}-{field}"] * crops
    return np.concatenate(features), groups


def test_unknown_crops_are_those_far_from_all_others():
    rng = np.random.default_rng(0)
    features, groups = fields_of_cells(rng, np.eye(8)[:2], 10, 12)
    labels = np.repeat([0, 1], 120)
    validation = predictions_of(labels, np.eye(2)[labels], groups, features)
    found = fit_calibration(validation, 0)
    stored = json.loads(json.dumps(dataclasses.asdict(found)))
    assert from_record(Calibration, stored, "a file") == found

    # By hand: 40 crops a class, every third; cosine distances to those of other fields.
    unit = features.astype(np.float32) / np.linalg.norm(features, axis=1, keepdims=True)
    apart = np.array(groups)[:, None] != np.array(groups)[::3]
    distances = np.where(apart, 1 - unit @ unit[::3].T, 2).min(axis=1)
    assert found.unknown_threshold == pytest.approx(np.quantile(distances, 0.95), abs=1e-3)

    new, new_groups = fields_of_cells(rng, np.eye(8)[:3], 20, 12)
    known = np.repeat([0, 1, 1], 240)
    tested = found.apply(predictions_of(known, np.eye(2)[known], new_groups, 7 * new))
    assert (tested.temperature == found.temperature).all()
    nearest = 1 - (new / np.linalg.norm(new, axis=1, keepdims=True)) @ unit[::3].T
    assert tested.unknown == pytest.approx(nearest.min(axis=1) - found.unknown_threshold, abs=1e-3)
    assert (tested.unknown[:480] > 0).mean() < 0.15
    assert (tested.unknown[480:] > 0).all()


def test_of_a_single_group_nothing_is_unknown():
    labels = np.array([0, 1] * 10)
    features = np.random.default_rng(0).normal(size=(20, 8))
    validation = predictions_of(labels, np.eye(2)[labels], ["one"] * 20, features)
    found = fit_calibration(validation, 0)
    assert (found.apply(dataclasses.replace(validation, features=-features)).unknown <= 0).all()


def test_reliability_equals_calibration_curve_and_a_loop():
    rng = np.random.default_rng(1)
    labels, logits = calibrated_logits(rng, 600, 3)
    tested = predictions_of(labels, 2 * logits, labels * 100 + rng.integers(0, 12, 600))
    tested = dataclasses.replace(tested, temperature=np.full(600, 2.0))
    found = reliability(tested, seed=0)
    right = tested.predicted == labels
    for bins, score, probabilities in (
        (found.bins, found.ece, tested.probabilities),
        (found.bins_calibrated, found.ece_calibrated, tested.calibrated),
    ):
        confidence = probabilities.max(axis=1)
        filled = [b for b in bins if b.count]
        shares, means = calibration_curve(right, confidence, n_bins=10)
        assert [b.accuracy for b in filled] == pytest.approx(shares, abs=1e-14)
        assert [b.confidence for b in filled] == pytest.approx(means, abs=1e-14)
        assert len(bins) == 10
        assert bins[0].confidence is None  # of three classes, one always has a third
        errors = 0.0
        for n in range(10):
            inside = (confidence > n / 10) & (confidence <= (n + 1) / 10)
            if inside.any():
                errors += inside.sum() * abs(confidence[inside].mean() - right[inside].mean())
        assert score.value == pytest.approx(errors / 600, abs=1e-14)
        low, high = score.interval_95
        assert low < high
    assert found.ece.value > 2 * found.ece_calibrated.value
    assert reliability(tested, seed=0) == found

    alone = dataclasses.replace(tested, records=predictions_of(labels, logits, labels).records)
    assert reliability(alone, seed=0).ece.interval_95 == (None, None)
