import dataclasses
import json
import math

import numpy as np
import pytest

from jaxcells.evaluation.bootstrap import Split
from jaxcells.evaluation.comparison import (
    RULE,
    Choice,
    choose,
    compare_with,
    estimate,
    mcnemar,
    paired_difference,
)
from jaxcells.evaluation.metrics import classification_metrics
from jaxcells.files import from_record


def split_of(num_classes=2, num_fields=10, num_crops=10, **drawn):
    """A split of `num_fields` fields a class with `num_crops` crops each, in order."""
    labels = np.repeat(np.arange(num_classes), num_fields * num_crops)
    return Split(labels, np.arange(len(labels)) // num_crops, "ABC"[:num_classes], **drawn)


FIELDS = split_of()


def wrong_at(split, *indices):
    """Predictions [1, N] that are right but for `indices`, any of which may be an array."""
    predictions = split.labels.copy()
    at = np.concatenate([np.atleast_1d(index) for index in indices]) if indices else []
    at = np.asarray(at, int)
    predictions[at] = (split.labels[at] + 1) % len(split.class_names)
    return predictions[None]


def interval(found):
    return found.interval_95["balanced_accuracy"]


def by_name(choice):
    return {candidate.name: candidate for candidate in choice.candidates}


# McNemar's test


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [
        (0, 0, 1),
        (1, 0, 1),  # 2 * 1/2
        (1, 5, 14 / 64),  # 2 * (1 + 6) of 2**6 sequences
        (7, 1, 18 / 256),  # 2 * (1 + 8) of 2**8
        (3, 3, 1),  # 2 * (1 + 6 + 15 + 20) / 64 is more than 1
        (0, 20, 2 / 2**20),
        # z with continuity correction; twice the upper tail of the normal law.
        (10000, 10300, math.erfc((300 - 1) / math.sqrt(20300) / math.sqrt(2))),
        (0, 15000, 0),  # below the smallest float
    ],
)
def test_mcnemar_by_hand(only_a, only_b, p_value):
    assert mcnemar(only_a, only_b) == pytest.approx(p_value, rel=1e-12 if only_a < 99 else 1e-3)
    assert mcnemar(only_b, only_a) == mcnemar(only_a, only_b)


# Means


@pytest.mark.parametrize("num_wrong", [0, 30])
def test_figures_of_one_seed_are_those_of_the_metrics(num_wrong):
    split = split_of(num_classes=3, num_fields=4, seed=3)
    predictions = wrong_at(split, np.random.default_rng(0).permutation(120)[:num_wrong])
    found = estimate(predictions, split)
    metrics = classification_metrics(np.eye(3)[predictions[0]], split)
    for key in ("accuracy", "balanced_accuracy", "interval_95", "interval_note"):
        assert getattr(found, key) == getattr(metrics, key)
    assert "4 of 'A'" in found.interval_note
    assert (found.accuracy_deviation, found.balanced_accuracy_deviation) == (None, None)


def test_figures_of_several_seeds_by_hand():
    split = Split(np.repeat([0, 1], [60, 20]), np.arange(80) // 5, "AB")
    first, second = wrong_at(split, np.arange(12)), wrong_at(split, [60, 61])
    found = estimate(np.vstack([first, second]), split)
    # Recalls 48/60 and 1, then 1 and 18/20: balanced 0.9 and 0.95; accuracies 68/80 and 78/80.
    assert found.balanced_accuracy == pytest.approx(0.925, abs=1e-15)
    assert found.accuracy == pytest.approx(0.9125, abs=1e-15)
    # Of two values the deviation is their distance over the root of 2.
    assert found.accuracy_deviation == pytest.approx(0.125 / math.sqrt(2), abs=1e-15)
    assert found.balanced_accuracy_deviation == pytest.approx(0.05 / math.sqrt(2), abs=1e-15)
    for key, (low, high) in found.interval_95.items():
        assert low < getattr(found, key) < high

    # Wrong once in ten in every field of one seed of two: 0.95 whichever fields are drawn.
    seeds = np.vstack([wrong_at(FIELDS), wrong_at(FIELDS, np.arange(0, 200, 10))])
    assert interval(estimate(seeds, FIELDS)) == (None, None)
    # Of the same network twice the fields vary as of one, the seeds not at all.
    twice, once = estimate(np.vstack([first, first]), split), estimate(first, split)
    assert twice == dataclasses.replace(once, accuracy_deviation=0, balanced_accuracy_deviation=0)


# Paired differences


def test_paired_difference_by_hand():
    # Two fields of four crops in each class; A beats B on two crops of the first field alone.
    split = split_of(num_fields=2, num_crops=4)
    found = paired_difference(wrong_at(split, 10), wrong_at(split, 0, 1, 10), split)
    assert (found.accuracy, found.balanced_accuracy) == (2 / 16, (2 / 8 + 0) / 2)
    # One of two fields is drawn in each class: A's is better by 2/4 or not at all, at even odds.
    assert found.interval_95 == {"accuracy": (0, 0.25), "balanced_accuracy": (0, 0.25)}
    assert "2 of 'A', 2 of 'B'): the intervals cannot be trusted" in found.interval_note


def test_paired_interval_equals_a_naive_bootstrap_of_fields():
    rng = np.random.default_rng(1)
    split = split_of(num_classes=3, num_fields=6, num_crops=7, num_bootstrap=8000)
    keep = rng.random(len(split.labels)) < 0.8  # fields of unequal size
    labels, groups = split.labels[keep], split.groups[keep]
    split = dataclasses.replace(split, labels=labels, groups=groups)
    hard = rng.random(18)[groups] * 0.4

    def predict(skill):
        return np.where(rng.random(len(labels)) < skill - hard, labels, (labels + 1) % 3)

    a, b = np.stack([predict(0.95), predict(0.9)]), predict(0.85)[None]
    found = paired_difference(a, b, split)

    def recall_mean(predictions, crops):
        right, of = predictions[:, crops] == labels[crops], labels[crops]
        return np.mean([right[:, of == k].mean() for k in range(3)])

    every = np.arange(len(labels))
    expected = recall_mean(a, every) - recall_mean(b, every)
    assert found.balanced_accuracy == pytest.approx(expected, abs=1e-12)
    replicates = []
    for _ in range(2000):
        drawn = np.concatenate([6 * k + rng.integers(0, 6, 5) for k in range(3)])
        crops = np.concatenate([np.flatnonzero(groups == field) for field in drawn])
        replicates.append(recall_mean(a, crops) - recall_mean(b, crops))
    naive = np.quantile(replicates, [0.025, 0.975])
    # Three deviations of such a quantile.
    assert interval(found) == pytest.approx(tuple(naive), abs=0.012)


def test_networks_that_are_right_together_differ_by_nothing():
    split = split_of(num_classes=3)
    a, b = wrong_at(split, 3, 17, 120), wrong_at(split, 3, 17, 120)
    b[0, 3] = 2  # wrong in another way
    assert (a != b).any()
    found = paired_difference(np.repeat(a, 3, 0), np.repeat(b, 2, 0), split)
    assert (found.accuracy, found.balanced_accuracy) == (0, 0)
    assert found.interval_95 == {"accuracy": (0, 0), "balanced_accuracy": (0, 0)}


def test_a_replicate_without_a_difference_is_zero_and_not_a_rounding_error():
    # In every field of A's class, whatever its size, one has a fifth of the crops wrong; in every
    # field of B's class the other has.
    sizes = [5, 10, 15] * 3 + [10, 15, 5] * 2
    labels = np.repeat(np.repeat([0, 1], [9, 6]), sizes)
    split = Split(labels, np.repeat(np.arange(15), sizes), "AB")
    fifth = np.concatenate([np.arange(size) < size // 5 for size in sizes])
    a = wrong_at(split, np.flatnonzero(fifth & (labels == 0)))
    b = wrong_at(split, np.flatnonzero(fifth & (labels == 1)))
    for pair in ((a, b), (b, a)):
        found = paired_difference(*pair, split)
        assert (found.balanced_accuracy, interval(found)) == (0, (0, 0))


def test_paired_intervals_hold_the_truth_as_often_as_documented():
    rng = np.random.default_rng(0)
    scale = (1 - 0.3) / 0.3
    covered = 0
    for repetition in range(500):
        split = split_of(num_fields=12, num_crops=5, num_bootstrap=400, seed=repetition)
        skill = np.repeat(rng.beta(0.8 * scale, 0.2 * scale, size=24), 5)
        first, second = rng.random((2, 120))
        second = np.where(rng.random(120) < 0.5, first, second)
        a = np.where(first < skill, split.labels, 1 - split.labels)[None]
        b = np.where(second < skill * 0.75 / 0.8, split.labels, 1 - split.labels)[None]
        low, high = interval(paired_difference(a, b, split))
        covered += low <= 0.05 <= high
    assert covered / 500 == pytest.approx(0.93, abs=0.035)  # three binomial deviations


# The choice


def test_the_fastest_within_the_interval_of_the_best_is_chosen():
    predictions = {
        # One crop of every field: worse by 0.1 whichever fields are drawn.
        "fastest, clearly worse": wrong_at(FIELDS, np.arange(0, 200, 10)),
        # Two crops of one field, which 39 % of the replicates miss: 0.9 ** 9.
        "fast, a little worse": wrong_at(FIELDS, 0, 1),
        "slow, best": wrong_at(FIELDS),
        "slowest, a little worse": wrong_at(FIELDS, 100),
    }
    choice = choose(predictions, FIELDS, dict(zip(predictions, (1, 2, 3, 4), strict=True)))
    assert choice.chosen == "fast, a little worse"
    assert choice.best == "slow, best"
    assert choice.rule == RULE
    worse, little, best, _ = choice.candidates
    assert list(by_name(choice)) == list(predictions)
    assert [candidate.qualifies for candidate in choice.candidates] == [False, True, True, True]
    assert [candidate.seconds for candidate in choice.candidates] == [1, 2, 3, 4]

    assert worse.estimate.balanced_accuracy == 0.9
    assert worse.behind.balanced_accuracy == pytest.approx(0.1, abs=1e-12)
    assert interval(worse.behind) == (0.1, 0.1)
    assert little.estimate.balanced_accuracy == (0.98 + 1) / 2
    assert little.behind.balanced_accuracy == pytest.approx(0.01, abs=1e-12)
    # Draws of that field among nine: three or fewer in 99.2 %, two or fewer in 94.7 %. The ninth
    # part of its 2/10, three times, over two classes.
    assert interval(little.behind) == (0, pytest.approx(0.2 * 3 / 9 / 2, abs=1e-12))
    assert (best.behind.balanced_accuracy, interval(best.behind)) == (0, (0, 0))
    stored = json.loads(json.dumps(dataclasses.asdict(choice), allow_nan=False))
    assert from_record(Choice, stored, "choice.json") == choice


def test_the_choice_takes_means_over_seeds():
    every = np.arange(0, 200, 10)
    one_seed = wrong_at(FIELDS, np.arange(0, 200, 40))  # 0.975
    three_seeds = np.vstack([wrong_at(FIELDS), wrong_at(FIELDS, every), wrong_at(FIELDS, every)])
    predictions = {"one": one_seed, "three": three_seeds}
    choice = choose(predictions, FIELDS, {"one": 2, "three": 1})
    # Two of three seeds err once in ten: 0.933 at best, though one seed alone is perfect.
    assert (choice.chosen, choice.best) == ("one", "one")
    three = by_name(choice)["three"]
    assert three.estimate.balanced_accuracy == pytest.approx(2.8 / 3, abs=1e-15)
    deviation = three.estimate.balanced_accuracy_deviation
    assert deviation == pytest.approx(0.1 / math.sqrt(3), abs=1e-15)
    assert three.behind.balanced_accuracy == pytest.approx(0.975 - 2.8 / 3, abs=1e-12)
    assert interval(three.behind)[0] > 0


def test_the_choice_counts_classes_alike_however_many_crops_they_have():
    split = Split(np.repeat([0, 1], [180, 20]), np.arange(200) // 2, "AB")
    common, rare = wrong_at(split, np.arange(0, 180, 10)), wrong_at(split, np.arange(180, 190))
    choice = choose({"rare": rare, "common": common}, split, {"rare": 1, "common": 2})
    # Accuracies 0.9 and 0.95, but recalls 0.9 of the common class and 0.5 of the rare one.
    assert (choice.chosen, choice.best) == ("common", "common")
    assert by_name(choice)["common"].estimate.balanced_accuracy == pytest.approx(0.95, abs=1e-15)
    assert by_name(choice)["rare"].behind.balanced_accuracy == pytest.approx(0.2, abs=1e-12)


def test_of_experiments_that_tie_for_the_best_the_faster_is_the_reference():
    # Recalls 1/10, 2/10, 3/10 and the reverse, which floats add up to different sums.
    split = split_of(num_classes=3, num_fields=1)
    rising = wrong_at(split, np.arange(9), np.arange(10, 18), np.arange(20, 27))
    falling = wrong_at(split, np.arange(7), np.arange(10, 18), np.arange(20, 29))
    for slow, fast in ((rising, falling), (falling, rising)):
        choice = choose({"slow": slow, "fast": fast}, split, {"slow": 5, "fast": 4})
        assert (choice.best, choice.chosen) == ("fast", "fast")
        assert by_name(choice)["slow"].behind.balanced_accuracy == 0
        assert by_name(choice)["slow"].qualifies


def test_of_equally_fast_experiments_the_more_accurate_is_chosen_then_the_first():
    right, almost = wrong_at(FIELDS), wrong_at(FIELDS, 0)
    seconds = {"a": 1, "b": 1}
    assert choose({"a": almost, "b": right}, FIELDS, seconds).chosen == "b"
    both = choose({"a": almost, "b": almost}, FIELDS, seconds)
    assert (both.chosen, both.best) == ("a", "a")
    alone = choose({"a": almost}, FIELDS, {"a": 1})
    assert (alone.chosen, alone.best, alone.candidates[0].qualifies) == ("a", "a", True)


def test_a_class_of_a_single_field_leaves_ties_alone_to_qualify():
    groups = np.where(FIELDS.labels == 1, 99, FIELDS.groups)
    split = dataclasses.replace(FIELDS, groups=groups)
    predictions = {"worse": wrong_at(split, 0), "tied": wrong_at(split), "best": wrong_at(split)}
    choice = choose(predictions, split, {"worse": 1, "tied": 3, "best": 2})
    assert (choice.chosen, choice.best) == ("best", "best")
    assert [candidate.qualifies for candidate in choice.candidates] == [False, True, True]
    assert {interval(candidate.behind) for candidate in choice.candidates} == {(None, None)}
    assert "1 of 'B'): no interval can be given" in choice.candidates[0].behind.interval_note


# After the choice


def test_the_chosen_is_compared_with_each_other():
    predictions = {
        "worse": wrong_at(FIELDS, np.arange(0, 200, 10)),
        "chosen": np.vstack([wrong_at(FIELDS, 0, 15), wrong_at(FIELDS)]),
        "same": np.vstack([wrong_at(FIELDS), wrong_at(FIELDS, 0, 15)]),
    }
    compared = compare_with("chosen", predictions, FIELDS)
    assert list(compared) == ["worse", "same"]
    worse, same = compared.values()
    of = (predictions["chosen"], predictions["worse"])
    assert worse.difference == paired_difference(*of, FIELDS)
    assert worse.difference.balanced_accuracy == pytest.approx(0.1 - 0.005, abs=1e-12)
    # The first networks of each: crop 0 is wrong in both, 15 in the chosen, 19 more in the other.
    assert (worse.only_chosen_right, worse.only_other_right) == (19, 1)
    assert worse.p_value == pytest.approx(2 * (1 + 20) / 2**20)
    assert same.difference.balanced_accuracy == 0
    assert (same.only_chosen_right, same.only_other_right) == (0, 2)
    assert same.p_value == 0.5
