import numpy as np
import pytest

from jaxcells.evaluation import bootstrap
from jaxcells.evaluation.bootstrap import Split
from jaxcells.evaluation.metrics import summary_table
from tests.evaluation.test_metrics import ABC, metrics_of, one_hot


def simulate(rng, units_per_class, crops_per_unit, accuracy, resemblance):
    """Crops of two classes; `resemblance` is the correlation of two crops of one unit."""
    shape = (2, units_per_class)
    scale = (1 - resemblance) / resemblance
    skill = rng.beta(accuracy * scale, (1 - accuracy) * scale, size=shape)
    right = rng.random((*shape, crops_per_unit)) < skill[..., None]
    labels = np.broadcast_to(np.arange(2)[:, None, None], right.shape).ravel()
    units = np.repeat(np.arange(2 * units_per_class), crops_per_unit)
    return one_hot(np.where(right.ravel(), labels, 1 - labels), 2), labels, units


@pytest.mark.parametrize(("units_per_class", "expected"), [(30, 0.94), (6, 0.91)])
def test_interval_covers_the_truth_as_often_as_documented(units_per_class, expected):
    rng = np.random.default_rng(0)
    covered = {"accuracy": 0, "balanced_accuracy": 0}
    for repetition in range(400):
        probabilities, labels, units = simulate(rng, units_per_class, 5, 0.75, 0.3)
        split = Split(labels, units, "AB", num_bootstrap=400, seed=repetition)
        counts = bootstrap.count_by_unit(probabilities.argmax(axis=1) == labels, split)
        intervals, _ = bootstrap.accuracy_intervals(*counts, split)
        for key, (low, high) in intervals.items():
            covered[key] += low <= 0.75 <= high
    for key, count in covered.items():
        # 0.04 is three binomial deviations. Resampling crops instead of units gives 0.8.
        assert count / 400 == pytest.approx(expected, abs=0.04), key


@pytest.mark.parametrize("spanning", [False, True], ids=["fields", "plates"])
def test_interval_equals_a_naive_loop_over_the_same_draws(spanning):
    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(3), [60, 90, 40])
    units = np.arange(190) % 11 if spanning else labels * 100 + rng.integers(0, 7, 190)
    right = rng.random(190) < 0.4 + 0.1 * (units % 5)
    probabilities = one_hot(np.where(right, labels, (labels + 1) % 3), 3)
    result = metrics_of(
        probabilities, labels, class_names=ABC, groups=units, num_bootstrap=150, seed=7
    )
    counts = bootstrap.count_by_unit(right, Split(labels, units, ABC))
    weights, hits, crops = bootstrap._replicates(*counts, 150, 7)
    accuracies, balanced = [], []
    for replicate in weights:
        drawn_hits = sum(weight * row for weight, row in zip(replicate, hits, strict=True))
        drawn_crops = sum(weight * row for weight, row in zip(replicate, crops, strict=True))
        accuracies.append(drawn_hits.sum() / drawn_crops.sum())
        balanced.append(np.mean(drawn_hits / drawn_crops))
    for key, values in {"accuracy": accuracies, "balanced_accuracy": balanced}.items():
        low, high = np.percentile(values, [2.5, 97.5])
        assert result.interval_95[key] == pytest.approx((low, high), abs=1e-12)
        assert low < getattr(result, key) < high
    assert result.interval_note is None


def test_same_seed_same_intervals_as_ever():
    labels = np.repeat([0, 1, 2], [30, 50, 40])
    units = labels * 10 + np.arange(120) % 7
    predictions = np.where(np.arange(120) ** 2 % 11 < 3, (labels + 1) % 3, labels)
    result = metrics_of(one_hot(predictions, 3), labels, class_names=ABC, groups=units, seed=5)
    assert result.interval_95 == {
        "accuracy": pytest.approx((0.6952380952380953, 0.7699999999999999), abs=1e-12),
        "balanced_accuracy": pytest.approx((0.6948212217257926, 0.7801410491962817), abs=1e-12),
    }


def test_reproducible_from_the_seed_and_independent_of_the_order_of_crops():
    probabilities, labels, units = simulate(np.random.default_rng(3), 8, 6, 0.8, 0.4)

    def intervals(order, seed):
        drawn = {"groups": units[order].astype(str), "seed": seed}
        return metrics_of(
            probabilities[order], labels[order], class_names="AB", **drawn
        ).interval_95

    shuffled = np.random.default_rng(4).permutation(len(labels))
    assert intervals(np.arange(len(labels)), 0) == intervals(shuffled, 0)
    assert intervals(shuffled, 0) != intervals(shuffled, 7)


def test_few_units_are_named_and_one_gives_no_interval():
    labels = np.repeat([0, 1, 2], 20)
    predictions = np.where(np.arange(60) % 7 == 0, (labels + 1) % 3, labels)
    for units_of_a, note in [
        (2, "too few independent fields (groups) in this split (2 of 'A'): the intervals cannot"),
        (1, "too few independent fields (groups) in this split (1 of 'A'): no interval"),
    ]:
        units = np.where(labels == 0, np.arange(60) % units_of_a, 100 * labels + np.arange(60) % 6)
        result = metrics_of(one_hot(predictions, 3), labels, class_names=ABC, groups=units)
        assert result.interval_note.startswith(note)
        low, high = result.interval_95["balanced_accuracy"]
        assert (low is None and high is None) if units_of_a == 1 else low < high
        assert "note: too few independent fields" in summary_table(result, "test")

    result = metrics_of(one_hot(labels, 3), labels, class_names=ABC, groups=labels)
    assert set(result.interval_95.values()) == {(None, None)}
    assert result.num_fields == 3
    assert "1 of 'A', 1 of 'B', 1 of 'C'" in result.interval_note

    names, labels = [f"line {k}" for k in range(30)], np.repeat(np.arange(30), 4)
    result = metrics_of(one_hot(labels, 30), labels, class_names=names, groups=np.arange(120) // 2)
    assert "2 of 'line 11', … 26 more)" in result.interval_note


def test_a_network_that_always_says_one_class_has_no_interval():
    labels = np.repeat([0, 1], 40)
    always = one_hot(np.zeros(80, int), 2)
    result = metrics_of(always, labels, class_names="AB", groups=np.arange(80) // 4)
    assert (result.accuracy, result.balanced_accuracy) == (0.5, 0.5)
    assert set(result.interval_95.values()) == {(None, None)}
    assert "give accuracy and balanced_accuracy no interval" in result.interval_note
    unequal = np.minimum(np.arange(80) // 4, 17)  # one field has more crops than the others
    result = metrics_of(always, labels, class_names="AB", groups=unequal)
    assert result.interval_95["balanced_accuracy"] == (None, None)
    assert result.interval_95["accuracy"][0] < 0.5
    assert result.interval_note.endswith("and give balanced_accuracy no interval")


def test_no_error_still_has_a_lower_bound():
    labels, numbers = np.repeat([0, 1], 50), np.arange(100)
    for units, trials, low in [
        # Clopper and Pearson for 20 of 20: 0.8316, as in any table of exact binomial limits.
        (labels * 10 + numbers % 10, 20, 0.8316),
        (np.where(labels == 0, numbers % 6, 100 + numbers % 40), 12, 0.7354),
        (numbers % 10, 10, 0.6915),  # plates, each of which holds both classes
    ]:
        result = metrics_of(one_hot(labels, 2), labels, class_names="AB", groups=units)
        assert result.interval_95["accuracy"] == pytest.approx((low, 1.0), abs=1e-4)
        assert result.interval_95["balanced_accuracy"] == result.interval_95["accuracy"]
        assert f"{trials} independent fields (groups) without an error" in result.interval_note


def test_replicates_without_a_class_are_left_out_and_counted():
    # Class C is in two of eight plates: a replicate misses it with probability (6 / 8) ** 7 = 0.13.
    units = np.repeat(np.arange(8), 6)
    labels = np.tile([0, 0, 0, 1, 1, 1], 8)
    labels[[0, 6]] = 2
    predictions = np.where(np.arange(48) % 5 == 0, 0, labels)
    result = metrics_of(
        one_hot(predictions, 3), labels, class_names=ABC, groups=units, num_bootstrap=1000
    )
    notes = result.interval_note.split("; ")
    assert "2 of 'C'" in notes[0]
    left_out, _, total, *_ = notes[1].split()
    assert total == "1000"
    assert int(left_out) == pytest.approx(1000 * (6 / 8) ** 7, abs=45)
    low, high = result.interval_95["balanced_accuracy"]
    assert 0 < low < high <= 1
