import dataclasses
import json
import time
import warnings

import numpy as np
import pytest
import sklearn.metrics as peer
from scipy.special import softmax

from jaxcells.data.crop_set import CropRecord
from jaxcells.evaluation import bootstrap, metrics
from jaxcells.evaluation.bootstrap import Split
from jaxcells.evaluation.metrics import (
    Score,
    SplitMetrics,
    classification_metrics,
    field_metrics,
    split_metrics,
    summary_table,
)
from jaxcells.evaluation.predictions import Predictions
from jaxcells.files import from_record

ABC = ["A", "B", "C"]


def one_hot(predictions, num_classes, confidence=1.0):
    """Probabilities [N, K] whose argmax is `predictions`."""
    rest = (1 - confidence) / (num_classes - 1)
    return rest + (confidence - rest) * np.eye(num_classes)[np.asarray(predictions)]


def metrics_of(probabilities, labels, class_names, groups=None, **drawn):
    """Figures of crops, each of which is a unit of its own where `groups` does not say more."""
    units = np.arange(len(labels)) if groups is None else np.asarray(groups)
    split = Split(np.asarray(labels), units, class_names, **drawn)
    return classification_metrics(probabilities, split)


def ratios(row):
    return row.precision, row.recall, row.f1, row.specificity, row.support


def test_figures_by_hand():
    #          A  A  A  A  B  B  C  C
    labels = [0, 0, 0, 0, 1, 1, 2, 2]
    predictions = [0, 0, 0, 1, 1, 0, 0, 1]  # nothing is called C
    result = metrics_of(one_hot(predictions, 3, 0.8), labels, class_names=ABC)

    assert result.confusion_matrix == ((3, 1, 0), (1, 1, 0), (1, 1, 0))
    assert result.accuracy == 4 / 8
    assert result.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2 + 0) / 3, abs=1e-15)
    assert result.loss == pytest.approx(-(4 * np.log(0.8) + 4 * np.log(0.1)) / 8, abs=1e-12)
    assert {name: ratios(row) for name, row in result.per_class.items()} == {
        "A": (3 / 5, 3 / 4, 2 * 3 / (5 + 4), 2 / 4, 4),
        "B": (1 / 3, 1 / 2, 2 * 1 / (3 + 2), 4 / 6, 2),
        "C": (None, 0.0, 0.0, 1.0, 2),
    }
    # Of the 4 x 4 pairs of an A and another, the A is higher in 6, lower in 2: 8 are ties.
    assert result.per_class["A"].roc_auc == (6 + 8 / 2) / 16
    assert result.per_class["C"].roc_auc == 1 / 2
    assert result.absent_classes == ()
    assert (result.num_crops, result.num_fields) == (8, 8)
    stored = json.dumps(dataclasses.asdict(result), allow_nan=False)
    assert from_record(SplitMetrics, json.loads(stored), "a file") == result


def test_class_absent_from_the_split():
    result = metrics_of(one_hot([0, 0, 0, 2], 4), [0, 0, 2, 2], class_names=[*ABC, "D"])
    assert result.absent_classes == ("B", "D")
    assert result.balanced_accuracy == (1 + 1 / 2) / 2
    assert ratios(result.per_class["B"]) == (None, None, None, 1.0, 0)
    assert result.scores["macro_recall"] == Score(None, (None, None))
    assert result.scores["roc_auc"].value is None
    assert result.per_class["B"].roc_auc is None
    assert result.per_class["A"].roc_auc == (1 + 1 / 2) / 2
    assert "not in this split: B, D" in summary_table(result, "test")

    predicted_but_absent = metrics_of(one_hot([1], 2), [0], class_names=["A", "B"])
    assert ratios(predicted_but_absent.per_class["B"]) == (0.0, None, 0.0, 0.0, 0)
    assert predicted_but_absent.loss == pytest.approx(87.3365, abs=1e-3)  # finite, as documented


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[np.nan, 1.0]], [0], "NaN"),
        ([[3.0, -2.0]], [0], "no probabilities"),
        ([[4.0, 2.0]], [0], "no probabilities"),  # logits
        ([[0.5, 0.5]], [0, 1], "of 2 classes"),
        ([[1.0]], [0], "of 2 classes"),
        (np.empty((0, 2)), np.empty(0, int), "of 2 classes"),
    ],
)
def test_bugs_of_the_caller_raise(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics_of(probabilities, labels, class_names=["A", "B"])


def test_summary_table_fits_80_columns_and_keeps_the_ends_of_long_names():
    names = ["HE", "x" * 60 + " passage 12", "细胞系 {0} %s"]
    labels = np.repeat([0, 1, 2], 20)
    predictions = np.where(np.arange(60) % 4 == 0, (labels + 1) % 2, labels)
    fields = {"class_names": names, "groups": labels * 10 + np.arange(60) % 3}
    result = metrics_of(one_hot(predictions, 3), labels, **fields)
    table = summary_table(result, "test split, best checkpoint (step 300)")
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "test split, best checkpoint (step 300)"
    assert lines[1] == "60 crops from 9 independent fields (groups); 95 % intervals over these"
    # Five of every 20 are wrong: A's go to B, B's to A, C's to B.
    assert lines[4].split() == ["HE", "0.750", "0.750", "0.750", "20"]
    assert lines[5].split()[-4:] == ["0.600", "0.750", "0.667", "20"]
    assert "x…" in lines[5]
    assert "passage 12 " in lines[5]
    low, high = result.interval_95["accuracy"]
    assert f"\naccuracy 0.750 ({low:.3f} to {high:.3f})\n" in table
    assert f"\nloss {result.loss:.3f}\nnote: too few independent fields" in table

    alone = metrics_of(one_hot([0], 2), [0], class_names=["A", "B"])
    assert "\naccuracy 1.000 (no interval)\n" in summary_table(alone, "test")
    assert [line.split() for line in summary_table(alone, "test").splitlines()][5] == [
        *["B", "-", "-", "-", "0"]
    ]


def expected(labels, probabilities, weights=None):
    """All of scikit-learn's figures, None where it warns; of the split and of every class."""
    predicted, classes = probabilities.argmax(axis=1), list(range(probabilities.shape[1]))
    truth = labels[:, None] == classes
    shared = {"sample_weight": weights}

    def value(function, *args, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                return function(*args, **options, **shared)
            except (peer._classification.UndefinedMetricWarning, UserWarning):
                return None

    found = {}
    for kind in ("macro", "weighted"):
        for name in ("precision", "recall", "f1"):
            function = getattr(peer, f"{name}_score")
            # Absent classes weigh nothing, but scikit-learn warns of them all the same.
            of = classes if kind == "macro" else np.unique(labels)
            options = {"labels": of, "average": kind}
            found[f"{kind}_{name}"] = value(function, labels, predicted, **options)
    found["accuracy"] = value(peer.accuracy_score, labels, predicted)
    found["cohen_kappa"] = value(peer.cohen_kappa_score, labels, predicted)
    found["matthews"] = value(peer.matthews_corrcoef, labels, predicted)
    found["log_loss"] = value(peer.log_loss, labels, probabilities, labels=classes)
    found["brier"] = value(peer.brier_score_loss, labels, probabilities, labels=classes)
    if len(classes) > 5:
        options = {"k": 5, "labels": classes}
        found["top_5_accuracy"] = value(peer.top_k_accuracy_score, labels, probabilities, **options)
    rows = []
    for k in classes:
        row = {}
        for name in ("precision", "recall", "f1"):
            function = getattr(peer, f"{name}_score")
            row[name] = value(function, truth[:, k], predicted == k)
        row["specificity"] = value(peer.recall_score, ~truth[:, k], predicted != k)
        for name in ("roc_auc", "average_precision"):
            row[name] = value(getattr(peer, f"{name}_score"), truth[:, k], probabilities[:, k])
        rows.append(row)
    for name in ("roc_auc", "average_precision"):
        values = [row[name] for row in rows]
        found[name] = None if None in values else np.mean(values)
    return found, rows


def cases():
    """Random and degenerate labels and probabilities."""
    rng = np.random.default_rng(0)
    for repetition in range(120):
        classes = (2, 3, 4, 7)[repetition % 4]
        number = int(rng.integers(4, 60))
        labels = rng.integers(0, classes, number)
        logits = rng.normal(size=(number, classes)) * rng.choice([0.3, 3, 40])
        logits[np.arange(number), labels] += rng.choice([0, 1, 5])
        kind = repetition // 4 % 6
        if kind == 1:  # ties
            logits = logits.round()
        elif kind == 2:  # a class absent
            labels[labels == classes - 1] = 0
        elif kind == 3:  # a class never predicted
            logits[:, 0] -= 1000
        elif kind == 4:  # one class only
            labels[:] = 1
        elif kind == 5:  # perfect
            logits = 3.0 * (labels[:, None] == np.arange(classes))
        yield labels, softmax(logits, axis=1)


def difference(ours, theirs):
    assert (ours is None) == (theirs is None), (ours, theirs)
    return 0.0 if ours is None else abs(ours - theirs)


def test_all_figures_equal_those_of_scikit_learn():
    largest = 0.0
    for labels, probabilities in cases():
        names = [str(k) for k in range(probabilities.shape[1])]
        result = metrics_of(probabilities, labels, class_names=names, num_bootstrap=9)
        whole, rows = expected(labels, probabilities)
        assert set(result.scores) == {*whole, "balanced_accuracy"}
        differences = {key: difference(result.scores[key].value, v) for key, v in whole.items()}
        for row, values in zip(result.per_class.values(), rows, strict=True):
            for key, v in values.items():
                differences[key] = difference(getattr(row, key), v)
        largest = max(largest, *differences.values())
    print("largest difference:", largest)
    assert largest < 1e-14


def test_replicates_equal_scikit_learn_with_sample_weight():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(7), 12)
    logits = rng.normal(size=(84, 7)).round(1)
    logits[np.arange(84), labels] += 1
    probabilities = softmax(logits, axis=1)
    groups = labels * 10 + rng.integers(0, 4, 84)
    split = Split(labels, groups, "ABCDEFG", num_bootstrap=10)
    _, weights = bootstrap.weights_of(split)
    assert weights.shape == (84, 10)
    # n - 1 of the n units of a class are drawn, which together count like n.
    assert (np.ptp(weights, axis=1) > 0).all()
    for k in range(7):
        of_units = np.stack([weights[groups == unit][0] for unit in np.unique(groups[labels == k])])
        assert of_units.sum(axis=0) == pytest.approx(len(of_units))
    drawn = metrics._figures(probabilities, probabilities.argmax(axis=1), split, weights)
    for replicate in range(10):
        whole, rows = expected(labels, probabilities, weights[:, replicate])
        whole |= {f"macro_{key}": whole.pop(key) for key in ("roc_auc", "average_precision")}
        for key, value in whole.items():
            if key != "accuracy" and value is not None:
                assert drawn[key][replicate] == pytest.approx(value, abs=1e-13), key
        for k, row in enumerate(rows):
            for key, value in row.items():
                found = drawn[key][replicate, k]
                assert (
                    np.isnan(found) if value is None else found == pytest.approx(value, abs=1e-13)
                )


def simulated_predictions(fields_per_class, crops_per_field, spread=1.0, seed=0):
    """Predictions of crops of classes "a" and "b" whose fields resemble each other."""
    rng = np.random.default_rng(seed)
    records, logits = [], []
    for label in "ab":
        for field in range(fields_per_class):
            shift = rng.normal(1.0, spread)
            for crop in range(crops_per_field):
                source = f"{label}/{field}.png"
                name = f"test/{source}-{crop}.png"
                records.append(CropRecord(name, label, "", source, source, 0, 0, 1.0, "test", ""))
                margin = shift + rng.normal()
                logits.append((margin, 0.0) if label == "a" else (0.0, margin))
    number = len(records)
    logits = np.array(logits, np.float32)
    return Predictions(
        *(tuple(records), ("a", "b"), logits), np.ones(number), np.zeros(number), features=None
    )


def test_intervals_of_scores_are_percentiles_over_fields():
    predictions = simulated_predictions(8, 6)
    result = split_metrics(predictions, seed=3)
    split = Split(predictions.labels, predictions.groups, "ab", seed=3)
    weights = np.concatenate(list(bootstrap.weights_of(split))[1:], axis=1)
    assert weights.shape == (96, 2000)
    truth, score = predictions.labels == 1, predictions.probabilities[:, 1]
    values = [peer.roc_auc_score(truth, score, sample_weight=w) for w in weights.T[:300]]
    low, high = result.per_class["b"].interval_95["roc_auc"]
    assert (low, high) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.03)
    assert low < result.per_class["b"].roc_auc < high
    assert result.scores["roc_auc"].interval_95 == pytest.approx((low, high), abs=1e-12)
    assert result.scores["accuracy"].interval_95 == result.interval_95["accuracy"]
    assert result.scores["macro_recall"] == result.scores["balanced_accuracy"]

    # Crops instead of fields would make the interval too narrow.
    each = metrics_of(predictions.probabilities, predictions.labels, class_names="ab")
    narrow = np.ptp(each.scores["roc_auc"].interval_95)
    assert narrow < 0.7 * (high - low)


def test_what_all_replicates_agree_on_has_an_exact_bound_or_none():
    labels, numbers = np.repeat([0, 1], 50), np.arange(100)
    units = labels * 10 + numbers % 10
    predictions = np.where(numbers == 0, 1, labels)  # a single error, an A that is called B
    result = metrics_of(one_hot(predictions, 2, 0.9), labels, class_names="AB", groups=units)
    # Clopper and Pearson for 10 of 10: 0.6915.
    assert result.per_class["B"].interval_95["recall"] == pytest.approx((0.6915, 1), abs=1e-4)
    assert result.per_class["A"].interval_95["precision"] == pytest.approx((0.6915, 1), abs=1e-4)
    assert result.per_class["A"].interval_95["recall"][1] == 1
    assert result.per_class["A"].interval_95["recall"][0] > 0.6915

    perfect = metrics_of(one_hot(labels, 2), labels, class_names="AB", groups=units)
    assert perfect.scores["matthews"] == Score(1.0, (None, None))
    for key in ("accuracy", "weighted_recall", "macro_recall"):
        assert perfect.scores[key].interval_95 == pytest.approx((0.8316, 1), abs=1e-4)  # 20 of 20
    assert perfect.scores["roc_auc"] == Score(1.0, (None, None))
    alone = metrics_of(one_hot(labels, 2), labels, class_names="AB", groups=labels)
    ends = {end for row in alone.per_class.values() for end in row.interval_95.values()}
    assert ends | {score.interval_95 for score in alone.scores.values()} == {(None, None)}


def test_field_metrics_decide_by_the_mean_probability_of_a_field():
    predictions = simulated_predictions(8, 5, spread=2.0)
    result = field_metrics(predictions, seed=0)
    labels, probabilities = [], []
    for source in sorted(set(predictions.sources)):
        rows = predictions.sources == source
        labels.append("ab".index(source[0]))
        probabilities.append(predictions.probabilities[rows].mean(axis=0))
    assert result.num_crops == result.num_fields == 16
    right = np.argmax(probabilities, axis=1) == labels
    assert result.accuracy == right.mean() == 12 / 16
    assert result.scores["roc_auc"].value == peer.roc_auc_score(
        labels, np.array(probabilities)[:, 1]
    )
    assert sum(map(sum, result.confusion_matrix)) == 16


def test_intervals_of_a_small_run_take_no_time():
    labels = np.repeat(np.arange(3), 100)
    probabilities = softmax(np.random.default_rng(0).normal(size=(300, 3)), axis=1)
    start = time.process_time()
    metrics_of(probabilities, labels, class_names=ABC, groups=np.arange(300) // 5)
    assert time.process_time() - start < 2
