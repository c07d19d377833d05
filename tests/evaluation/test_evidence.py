"""Evidence of predictions made by hand, whose figures are known."""

import dataclasses
import json
import time

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, silhouette_score

from jaxcells.data.crop_set import CropRecord
from jaxcells.evaluation.evidence import Evidence, gather_evidence
from jaxcells.evaluation.metrics import Score
from jaxcells.evaluation.predictions import Predictions
from jaxcells.files import from_record


def make_predictions(
    num_classes=2, fields=6, crops=4, *, seed=0, right=0.8, group=None, channels=("",), **arrays
):
    """Fields of every class with crops of which a share is predicted rightly.

    Args:
      group: a function of label and number of the field; by default every field is a group.
      arrays: instead of those drawn at random.
    """
    rng = np.random.default_rng(seed)
    records = []
    for label in range(num_classes):
        for number in range(fields):
            name = f"class{label}/field{number}.png"
            for crop in range(crops):
                records.append(
                    CropRecord(
                        crop=f"test/class{label}/{number}_{crop}.png",
                        label=f"class{label}",
                        channel=channels[number % len(channels)],
                        source=name,
                        group=group(label, number) if group else name,
                        y=0,
                        x=0,
                        foreground=(0.0, 0.1, 0.6, 1.0)[crop % 4],
                        split="test",
                        sha256="",
                    )
                )
    labels = np.repeat(np.arange(num_classes), fields * crops)
    guesses = rng.integers(num_classes, size=len(labels))
    predicted = np.where(rng.random(len(labels)) < right, labels, guesses)
    logits = rng.normal(0, 0.3, (len(labels), num_classes)).astype(np.float32)
    logits[np.arange(len(labels)), predicted] += 3
    values = {
        "logits": logits,
        "temperature": np.full(len(labels), 1.5),
        "unknown": np.where(np.arange(len(labels)) % 10 == 0, 0.1, -0.1),
        "features": rng.normal(size=(len(labels), 8)).astype(np.float32) + 3 * logits[:, :1],
        "baselines": {"majority": np.zeros(len(labels), int), "background": guesses},
    }
    names = tuple(f"class{label}" for label in range(num_classes))
    return Predictions(tuple(records), names, **(values | arrays))


def by_name(subsets):
    return {subset.name: subset for subset in subsets}


def test_subsets_by_foreground_are_those_of_scikit_learn():
    tested = make_predictions(num_classes=3, fields=8, right=0.7, seed=1)
    subsets = gather_evidence(tested, seed=0).subsets
    assert subsets.keys() == {"foreground"}  # one channel, no group of several images, no batch
    assert [subset.name for subset in subsets["foreground"]] == ["empty", "little", "much"]
    foreground = np.array([record.foreground for record in tested.records])
    rows = {"empty": foreground == 0, "little": foreground == 0.1, "much": foreground > 0.5}
    for subset in subsets["foreground"]:
        labels, predicted = (a[rows[subset.name]] for a in (tested.labels, tested.predicted))
        assert subset.accuracy.value == (labels == predicted).mean()
        expected = balanced_accuracy_score(labels, predicted)
        assert subset.balanced_accuracy.value == pytest.approx(expected)
        low, high = subset.accuracy.interval_95
        assert low < subset.accuracy.value < high
        assert subset.num_crops == rows[subset.name].sum()
        assert subset.num_fields == 24
        assert subset.chance == pytest.approx(1 / 3)
        assert subset.interval_note is None


def test_bounds_of_the_subsets():
    tested = make_predictions(fields=5)
    amounts = (0.02, 0.021, 0.25, 0.251)
    records = [
        dataclasses.replace(record, foreground=amounts[number % 4])
        for number, record in enumerate(tested.records)
    ]
    tested = dataclasses.replace(tested, records=tuple(records))
    found = by_name(gather_evidence(tested, seed=0).subsets["foreground"])
    assert {name: subset.num_crops for name, subset in found.items()} == {
        "empty": 10,
        "little": 20,
        "much": 10,
    }


def test_subsets_by_channel_group_and_batch():
    tested = make_predictions(
        fields=6, channels=("DAPI", "GFP"), group=lambda label, number: f"plate{number // 2}"
    )
    batches = [record.group for record in tested.records]
    subsets = gather_evidence(tested, seed=0, batches=batches).subsets
    assert subsets.keys() == {"foreground", "channel", "group", "batch"}
    channels = by_name(subsets["channel"])
    assert channels.keys() == {"DAPI", "GFP"}
    right = tested.predicted == tested.labels
    dapi = np.array([record.channel == "DAPI" for record in tested.records])
    assert channels["DAPI"].accuracy.value == right[dapi].mean()
    assert channels["DAPI"].num_fields == 3  # plates hold both channels and both classes
    plates = by_name(subsets["group"])
    assert plates.keys() == {"plate0", "plate1", "plate2"}
    for name, plate in plates.items():
        assert plate.accuracy.value == right[tested.groups == name].mean()
        assert plate.num_fields == 4  # images, as all are of one group
        assert plate.accuracy.interval_95[0] is not None
    assert subsets["batch"] == subsets["group"]


def test_images_of_one_place_in_two_channels_are_no_groups():
    tested = make_predictions(
        fields=6,
        channels=("DAPI", "GFP"),
        group=lambda label, number: f"class{label}/place{number // 2}",
    )
    assert gather_evidence(tested, seed=0).subsets.keys() == {"foreground", "channel"}


def test_baselines_with_intervals_and_what_is_beaten():
    tested = make_predictions(fields=10, right=0.95)
    equal = tested.predicted
    baselines = {"majority": np.zeros_like(equal), "brightness": equal}
    found = gather_evidence(dataclasses.replace(tested, baselines=baselines), seed=0)
    majority, brightness = found.baselines["majority"], found.baselines["brightness"]
    assert majority.accuracy == majority.balanced_accuracy == 0.5
    gain = balanced_accuracy_score(tested.labels, equal) - 0.5
    assert majority.difference.balanced_accuracy == pytest.approx(gain)
    low, high = majority.difference.interval_95["balanced_accuracy"]
    assert 0 < low < gain < high
    assert majority.beaten
    assert brightness.difference.interval_95["balanced_accuracy"] == (0, 0)
    assert not brightness.beaten
    assert found.unbeaten == (
        "the network is not shown to beat the balanced accuracy of brightness and contrast of the "
        f"crops alone ({brightness.balanced_accuracy:.3f})"
    )
    del baselines["brightness"]
    assert (
        gather_evidence(dataclasses.replace(tested, baselines=baselines), seed=0).unbeaten is None
    )


def test_without_an_interval_nothing_is_beaten():
    tested = make_predictions(fields=1, right=1.0)
    found = gather_evidence(tested, seed=0)
    majority = found.baselines["majority"]
    assert majority.difference.balanced_accuracy == 0.5
    assert majority.difference.interval_95["balanced_accuracy"] == (None, None)
    assert not majority.beaten
    assert "most frequent class" in found.unbeaten


def test_clusters_are_the_silhouettes_of_scikit_learn():
    rng = np.random.default_rng(3)
    tested = make_predictions(num_classes=2, fields=3, crops=10)
    centers = 20 * rng.normal(size=(6, 5))  # by field, and not by class
    features = np.repeat(centers, 10, axis=0) + rng.normal(size=(60, 5))
    found = gather_evidence(dataclasses.replace(tested, features=features), seed=0).clusters
    assert found.by_class == pytest.approx(silhouette_score(features, tested.labels))
    within = [
        silhouette_score(features[half], tested.sources[half])
        for half in np.split(np.arange(60), 2)
    ]
    assert found.by_field == pytest.approx(np.mean(within))
    assert found.by_field > 0.8 > found.by_class
    assert found.num_crops == 60


def test_clusters_of_many_crops_are_of_a_part():
    tested = make_predictions(fields=30, crops=40)
    found = gather_evidence(tested, seed=0).clusters
    assert found.num_crops == 2000
    assert found == gather_evidence(tested, seed=0).clusters


def test_suspects_are_fields_whose_label_is_unlikely():
    tested = make_predictions(fields=3, crops=2, right=1.0)
    logits = np.full((12, 2), -4.0, np.float32)
    logits[np.arange(12), tested.labels] = 4
    logits[2:4] = [[-1, 1], [-3, 3]]  # class0/field1, all wrong
    logits[6:8] = [[2, -2], [-1, 1]]  # class1/field0, wrong on average
    logits[10:12] = [[1, -1], [-3, 3]]  # class1/field2: one crop wrong, right on average
    found = gather_evidence(dataclasses.replace(tested, logits=logits), seed=0).suspects
    assert [(s.field, s.label, s.prediction, s.num_crops) for s in found] == [
        ("class0/field1.png", "class0", "class1", 2),
        ("class1/field0.png", "class1", "class0", 2),
    ]
    calibrated = np.mean(1 / (1 + np.exp(np.array([2, 6]) / 1.5)))
    assert found[0].probability_of_label == pytest.approx(calibrated)


def test_the_worst_twenty_suspects_are_listed():
    tested = make_predictions(fields=30, crops=1, right=0.0, seed=5)
    found = gather_evidence(tested, seed=0).suspects
    probabilities = [suspect.probability_of_label for suspect in found]
    assert len(found) == 20
    assert probabilities == sorted(probabilities)
    wrong = tested.predicted != tested.labels
    own = tested.calibrated[np.arange(60), tested.labels]
    assert probabilities == pytest.approx(np.sort(own[wrong])[:20])


@pytest.mark.parametrize("num_classes", [2, 5, 20])
@pytest.mark.parametrize("fields", [1, 5])
def test_pooled_folds_small_classes_and_absent_ones(num_classes, fields):
    tested = make_predictions(num_classes=num_classes, fields=fields, features=None)
    tested = dataclasses.replace(
        tested,
        class_names=(*tested.class_names, "absent"),
        logits=np.pad(tested.logits, ((0, 0), (0, 1)), constant_values=-9),
        folds=np.arange(len(tested.records)) % 3 + 1,
    )
    evidence = gather_evidence(tested, seed=0)
    assert evidence.clusters is None
    assert evidence.units == dict.fromkeys(tested.class_names[:-1], fields) | {"absent": 0}
    assert evidence.subsets["foreground"][0].chance == 1 / num_classes
    assert evidence.unknown_share == pytest.approx(np.mean(tested.unknown > 0))
    record = json.loads(json.dumps(dataclasses.asdict(evidence), allow_nan=False))
    assert from_record(Evidence, record, "results.json") == evidence


def test_a_round_trip_keeps_everything():
    tested = make_predictions(channels=("DAPI", "GFP"), right=0.3)
    evidence = gather_evidence(tested, seed=0)
    assert evidence.suspects
    assert evidence.clusters
    record = json.loads(json.dumps(dataclasses.asdict(evidence), allow_nan=False))
    assert from_record(Evidence, record, "results.json") == evidence


def test_it_takes_less_than_a_second():
    tested = make_predictions(num_classes=3, fields=20, crops=5)
    gather_evidence(tested, seed=0)
    start = time.process_time()
    gather_evidence(tested, seed=0)
    assert time.process_time() - start < 2  # some 0.1 s where nothing else runs


def test_figures_are_shown_with_their_interval():
    assert str(Score(0.9128, (0.85, 0.9514))) == "0.913 (0.850 to 0.951)"
    assert str(Score(1.0, (None, None))) == "1.000 (no interval)"
    assert str(Score(None, (None, None))) == "none (no interval)"
