"""Predictions: probabilities raw and calibrated, and files that give back what was written."""

import csv
import dataclasses

import numpy as np
import pytest

from jaxcells import Error
from jaxcells.data.crop_set import CropRecord
from jaxcells.evaluation.predictions import Predictions, read_predictions, write_predictions

NAMES = ("line A", "line B")


def make_record(number, label):
    source = f"{label}/f{number // 2}.png"
    place = (source, source, 10 * number, 0, 0.5)
    return CropRecord(f"test/{label}/{number}.png", label, "", *place, "test", f"hash {number}")


@pytest.fixture
def predictions():
    logits = np.array([[2, 0], [0, 2], [0, 1], [3, 0]], np.float32)
    return Predictions(
        records=tuple(make_record(n, NAMES[n // 2]) for n in range(4)),
        class_names=NAMES,
        logits=logits,
        temperature=np.full(4, 2.0),
        unknown=np.array([-0.1, 0.2, -0.3, 0.0]),
        features=np.arange(12, dtype=np.float32).reshape(4, 3),
        baselines={"majority": np.zeros(4, np.int64)},
    )


def test_probabilities_are_the_softmax_and_calibrated_ones_that_at_the_temperature(predictions):
    assert predictions.labels.tolist() == [0, 0, 1, 1]
    assert predictions.predicted.tolist() == [0, 1, 1, 0]
    expected = 1 / (1 + np.exp(-predictions.logits[:, 0] + predictions.logits[:, 1]))
    np.testing.assert_allclose(predictions.probabilities[:, 0], expected, rtol=1e-6)
    assert predictions.calibrated[0, 0] == pytest.approx(1 / (1 + np.exp(-1.0)))
    assert predictions.calibrated.dtype == np.float64
    np.testing.assert_array_equal(predictions.calibrated.argmax(1), predictions.predicted)


def test_what_is_written_is_read_again_and_can_be_read_by_people(predictions, tmp_path):
    path = tmp_path / "predictions_test.csv"
    write_predictions(path, predictions)
    again = read_predictions(path, predictions.records, NAMES)
    for name in ("logits", "temperature", "unknown", "features"):
        np.testing.assert_array_equal(getattr(again, name), getattr(predictions, name))
        assert getattr(again, name).dtype == getattr(predictions, name).dtype
    assert again.baselines["majority"].tolist() == [0, 0, 0, 0]
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prediction"] for row in rows] == ["line A", "line B", "line B", "line A"]
    assert [row["unknown"] for row in rows] == ["no", "yes", "no", "no"]
    for kind, probabilities in (
        ("probability", predictions.probabilities),
        ("calibrated", predictions.calibrated),
    ):
        read = [[float(row[f"{kind} {name}"]) for name in NAMES] for row in rows]
        np.testing.assert_allclose(read, probabilities, rtol=1e-5)


def test_predictions_of_several_folds_have_no_features_and_name_the_fold(predictions, tmp_path):
    path, folds = tmp_path / "predictions.csv", np.array([1, 1, 2, 2])
    write_predictions(path, dataclasses.replace(predictions, features=None, folds=folds))
    again = read_predictions(path, predictions.records, NAMES)
    assert again.features is None
    assert again.folds.tolist() == [1, 1, 2, 2]
    with open(path, newline="") as file:
        assert [row["fold"] for row in csv.DictReader(file)] == ["1", "1", "2", "2"]


def test_predictions_of_other_crops_or_damaged_ones_are_refused(predictions, tmp_path):
    path = tmp_path / "predictions_test.csv"
    with pytest.raises(Error, match="missing or damaged"):
        read_predictions(path, predictions.records, NAMES)
    write_predictions(path, predictions)
    with pytest.raises(Error, match="4 crops for 3 of the manifest"):
        read_predictions(path, predictions.records[:3], NAMES)
    arrays = path.with_suffix(".npz")
    with np.load(arrays) as file:
        np.savez(tmp_path / "other.npz", logits=file["logits"])
    with pytest.raises(Error, match="temperature"):
        read_predictions(tmp_path / "other.csv", predictions.records, NAMES)
    arrays.write_bytes(arrays.read_bytes()[:100])
    with pytest.raises(Error, match="missing or damaged"):
        read_predictions(path, predictions.records, NAMES)
