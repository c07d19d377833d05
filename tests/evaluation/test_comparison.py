import json
import math
import subprocess
import sys

import numpy as np
import pytest

from jaxcells.evaluation.comparison import (
    RULE,
    choose,
    compare_with,
    mcnemar,
    mean_and_deviation,
    paired_difference,
    split_figures,
)
from jaxcells.evaluation.metrics import classification_metrics

AB = ["A", "B"]


def fields(num_classes=2, num_fields=10, num_crops=10):
    """Labels and groups of `num_fields` fields a class with `num_crops` crops each, in order."""
    labels = np.repeat(np.arange(num_classes), num_fields * num_crops)
    return labels, np.arange(len(labels)) // num_crops


def wrong_at(labels, *indices):
    """Predictions [1, N] that are right but for `indices`, any of which may be an array."""
    predictions = labels.copy()
    at = np.concatenate([np.atleast_1d(index) for index in indices]) if indices else []
    at = np.asarray(at, int)
    predictions[at] = (labels[at] + 1) % (labels.max() + 1)
    return predictions[None]


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
    ],
)
def test_mcnemar_by_hand(only_a, only_b, p_value):
    a = np.array([True] * only_a + [False] * only_b + [True] * 4 + [False] * 2)
    b = np.array([False] * only_a + [True] * only_b + [True] * 4 + [False] * 2)
    result = mcnemar(a, b)
    assert result == {"only_a_right": only_a, "only_b_right": only_b, "p_value": p_value}
    assert mcnemar(b, a)["p_value"] == p_value
    assert json.loads(json.dumps(result)) == result


def test_mcnemar_of_many_crops_is_exact_and_near_the_normal_law():
    a, b = np.zeros(40000, bool), np.zeros(40000, bool)
    a[:10000], b[10000:20300] = True, True
    p_value = mcnemar(a, b)["p_value"]
    # z with continuity correction; twice the upper tail of the normal law.
    normal = math.erfc((300 - 1) / math.sqrt(20300) / math.sqrt(2))
    assert p_value == pytest.approx(normal, rel=1e-3)
    assert mcnemar(~b[:15000], b[:15000])["p_value"] == 0.0  # below the smallest float


@pytest.mark.parametrize(
    ("a", "b"),
    [([True], [True, False]), ([1, 0], [True, False]), ([[True]], [[True]])],
)
def test_mcnemar_takes_two_equal_rows_of_bool(a, b):
    with pytest.raises(ValueError, match="correct"):
        mcnemar(a, b)


# Means


def test_mean_and_deviation_by_hand():
    mean, deviation = mean_and_deviation([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3, abs=1e-15)
    # Squares of -4/3, -1/3 and 5/3 add up to 42/9; half of it is 7/3.
    assert deviation == pytest.approx(math.sqrt(7 / 3), abs=1e-15)
    assert mean_and_deviation([0.3]) == (0.3, None)
    assert mean_and_deviation([0.1, 0.1, 0.1])[1] == 0
    with pytest.raises(ValueError, match="data point"):
        mean_and_deviation([])


@pytest.mark.parametrize("num_wrong", [0, 30])
def test_figures_of_one_seed_are_those_of_the_metrics(num_wrong):
    labels, groups = fields(num_classes=3, num_fields=4)
    predictions = wrong_at(labels, np.random.default_rng(0).permutation(120)[:num_wrong])
    figures = split_figures(predictions, labels, groups, class_names=list("ABC"), seed=3)
    metrics = classification_metrics(
        np.eye(3)[predictions[0]], labels, class_names=list("ABC"), groups=groups, seed=3
    )
    assert figures["interval_95"] == metrics["interval_95"]
    assert figures["interval_note"] == metrics["interval_note"]
    assert "4 of 'A'" in figures["interval_note"]
    for key in ("accuracy", "balanced_accuracy"):
        assert figures[key] == pytest.approx(metrics[key], abs=1e-15)
    assert figures["deviation"] == {"accuracy": None, "balanced_accuracy": None}


def test_figures_of_several_seeds_by_hand():
    labels = np.repeat([0, 1], [60, 20])
    groups = np.arange(80) // 5
    first, second = wrong_at(labels, np.arange(12)), wrong_at(labels, [60, 61])
    figures = split_figures(np.vstack([first, second]), labels, groups, class_names=AB)
    # Recalls 48/60 and 1, then 1 and 18/20: balanced 0.9 and 0.95; accuracies 68/80 and 78/80.
    assert figures["balanced_accuracy"] == pytest.approx(0.925, abs=1e-15)
    assert figures["accuracy"] == pytest.approx(0.9125, abs=1e-15)
    # Of two values the deviation is their distance over the root of 2.
    expected = {"accuracy": 0.125 / math.sqrt(2), "balanced_accuracy": 0.05 / math.sqrt(2)}
    assert figures["deviation"] == pytest.approx(expected, abs=1e-15)
    for key, (low, high) in figures["interval_95"].items():
        assert low < figures[key] < high
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures

    # Wrong once in ten in every field of one seed of two: 0.95 whichever fields are drawn.
    labels_of_ten, groups_of_ten = fields()
    seeds = np.vstack([wrong_at(labels_of_ten), wrong_at(labels_of_ten, np.arange(0, 200, 10))])
    constant = split_figures(seeds, labels_of_ten, groups_of_ten, class_names=AB)
    assert constant["interval_95"]["balanced_accuracy"] == pytest.approx([0.95, 0.95], abs=1e-12)

    twice = split_figures(np.vstack([first, first]), labels, groups, class_names=AB)
    once = split_figures(first, labels, groups, class_names=AB)
    assert twice["interval_95"] == once["interval_95"]
    assert twice["deviation"] == {"accuracy": 0, "balanced_accuracy": 0}


# Paired differences


def test_paired_difference_by_hand():
    # Two fields of four crops in each class; A beats B on two crops of the first field alone.
    labels, groups = fields(num_fields=2, num_crops=4)
    result = paired_difference(
        wrong_at(labels, 10), wrong_at(labels, 0, 1, 10), labels, groups, class_names=AB
    )
    assert result["balanced_accuracy"] == (2 / 8 + 0) / 2
    assert result["accuracy"] == 2 / 16
    # One of two fields is drawn in each class: A's is better by 2/4 or not at all, at even odds.
    assert result["interval_95"] == {"accuracy": [0, 0.25], "balanced_accuracy": [0, 0.25]}
    assert "2 of 'A', 2 of 'B'): the intervals cannot be trusted" in result["interval_note"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_paired_interval_equals_a_naive_bootstrap_of_fields():
    rng = np.random.default_rng(1)
    labels, groups = fields(num_classes=3, num_fields=6, num_crops=7)
    keep = rng.random(len(labels)) < 0.8  # fields of unequal size
    labels, groups = labels[keep], groups[keep]
    hard = rng.random(18)[groups] * 0.4

    def predict(skill):
        return np.where(rng.random(len(labels)) < skill - hard, labels, (labels + 1) % 3)

    a, b = np.stack([predict(0.95), predict(0.9)]), predict(0.85)[None]
    result = paired_difference(a, b, labels, groups, class_names=list("ABC"), num_bootstrap=8000)

    def recall_mean(predictions, crops):
        return np.mean(
            [
                (row[crops] == labels[crops])[labels[crops] == k].mean()
                for row in predictions
                for k in range(3)
            ]
        )

    every = np.arange(len(labels))
    assert result["balanced_accuracy"] == pytest.approx(
        recall_mean(a, every) - recall_mean(b, every), abs=1e-12
    )
    replicates = []
    for _ in range(2000):
        drawn = np.concatenate([6 * k + rng.integers(0, 6, 5) for k in range(3)])
        crops = np.concatenate([np.flatnonzero(groups == field) for field in drawn])
        replicates.append(recall_mean(a, crops) - recall_mean(b, crops))
    naive = np.quantile(replicates, [0.025, 0.975])
    # Three deviations of such a quantile.
    assert result["interval_95"]["balanced_accuracy"] == pytest.approx(naive, abs=0.012)


def test_networks_that_are_right_together_differ_by_nothing():
    labels, groups = fields(num_classes=3)
    a, b = wrong_at(labels, 3, 17, 120), wrong_at(labels, 3, 17, 120)
    b[0, 3] = 2  # wrong in another way
    assert (a != b).any()
    result = paired_difference(
        np.repeat(a, 3, 0), np.repeat(b, 2, 0), labels, groups, class_names=list("ABC")
    )
    assert result == {
        "accuracy": 0.0,
        "balanced_accuracy": 0.0,
        "interval_95": {"accuracy": [0.0, 0.0], "balanced_accuracy": [0.0, 0.0]},
        "interval_note": None,
    }


def test_a_replicate_without_a_difference_is_zero_and_not_a_rounding_error():
    # In every field of A's class, whatever its size, one has a fifth of the crops wrong; in every
    # field of B's class the other has.
    sizes = [5, 10, 15] * 3 + [10, 15, 5] * 2
    labels = np.repeat(np.repeat([0, 1], [9, 6]), sizes)
    groups = np.repeat(np.arange(15), sizes)
    fifth = np.concatenate([np.arange(size) < size // 5 for size in sizes])
    a = wrong_at(labels, np.flatnonzero(fifth & (labels == 0)))
    b = wrong_at(labels, np.flatnonzero(fifth & (labels == 1)))
    for pair in ((a, b), (b, a)):
        result = paired_difference(*pair, labels, groups, class_names=AB)
        assert result["balanced_accuracy"] == 0
        assert result["interval_95"]["balanced_accuracy"] == [0, 0]


def test_pairing_cancels_what_is_hard_for_both():
    rng = np.random.default_rng(2)
    labels, groups = fields(num_fields=12)
    hard = np.flatnonzero(rng.random(24)[groups] < 0.4)
    a, b = wrong_at(labels, hard), wrong_at(labels, np.union1d(hard, np.arange(0, 240, 16)))

    def width(result):
        low, high = result["interval_95"]["balanced_accuracy"]
        return high - low

    paired = width(paired_difference(a, b, labels, groups, class_names=AB))
    single = width(split_figures(a, labels, groups, class_names=AB))
    assert paired < 0.3 * single


def test_paired_intervals_hold_the_truth_as_often_as_documented():
    rng = np.random.default_rng(0)
    labels, groups = fields(num_fields=12, num_crops=5)
    scale = (1 - 0.3) / 0.3
    covered = 0
    for repetition in range(500):
        skill = np.repeat(rng.beta(0.8 * scale, 0.2 * scale, size=24), 5)
        first, second = rng.random((2, 120))
        second = np.where(rng.random(120) < 0.5, first, second)
        a = np.where(first < skill, labels, 1 - labels)[None]
        b = np.where(second < skill * 0.75 / 0.8, labels, 1 - labels)[None]
        low, high = paired_difference(
            a, b, labels, groups, class_names=AB, num_bootstrap=400, seed=repetition
        )["interval_95"]["balanced_accuracy"]
        covered += low <= 0.05 <= high
    assert covered / 500 == pytest.approx(0.93, abs=0.035)  # three binomial deviations


def test_paired_difference_is_reproducible_and_independent_of_the_order_of_crops():
    rng = np.random.default_rng(3)
    labels, groups = fields()
    a = np.where(rng.random((2, 200)) < 0.9, labels, 1 - labels)
    b = np.where(rng.random((3, 200)) < 0.8, labels, 1 - labels)

    def difference(order, seed):
        return paired_difference(
            a[:, order],
            b[:, order],
            labels[order],
            groups[order].astype(str),
            class_names=AB,
            seed=seed,
        )

    shuffled = rng.permutation(200)
    assert difference(np.arange(200), 0) == difference(shuffled, 0)
    assert difference(shuffled, 0) != difference(shuffled, 1)


# The choice


def by_name(choice):
    return {candidate.name: candidate for candidate in choice.candidates}


def test_the_fastest_within_the_interval_of_the_best_is_chosen():
    labels, groups = fields()
    predictions = {
        # One crop of every field: worse by 0.1 whichever fields are drawn.
        "fastest, clearly worse": wrong_at(labels, np.arange(0, 200, 10)),
        # Two crops of one field, which 39 % of the replicates miss: 0.9 ** 9.
        "fast, a little worse": wrong_at(labels, 0, 1),
        "slow, best": wrong_at(labels),
        "slowest, a little worse": wrong_at(labels, 100),
    }
    seconds = dict(zip(predictions, (1.0, 2.0, 3.0, 4.0), strict=True))
    choice = choose(predictions, labels, groups, seconds, class_names=AB)
    assert choice.chosen == "fast, a little worse"
    assert choice.best == "slow, best"
    assert choice.note is None
    assert choice.rule == RULE
    candidates = by_name(choice)
    assert [candidate.name for candidate in choice.candidates] == list(predictions)
    assert [candidate.qualifies for candidate in choice.candidates] == [False, True, True, True]
    assert [candidate.seconds for candidate in choice.candidates] == [1, 2, 3, 4]

    worse = candidates["fastest, clearly worse"]
    assert worse.balanced_accuracy == 0.9
    assert worse.difference == pytest.approx(0.1, abs=1e-15)
    assert worse.interval_95 == (0.1, 0.1)
    little = candidates["fast, a little worse"]
    assert little.balanced_accuracy == (0.98 + 1) / 2
    assert little.difference == pytest.approx(0.01, abs=1e-15)
    # Draws of that field among nine: three or fewer in 99.2 %, two or fewer in 94.7 %. The ninth
    # part of its 2/10, three times, over two classes.
    assert little.interval_95 == (0, pytest.approx(0.2 * 3 / 9 / 2, abs=1e-12))
    best = candidates["slow, best"]
    assert (best.difference, best.interval_95, best.deviation) == (0, (0, 0), None)


def test_the_choice_goes_to_json():
    labels, groups = fields()
    choice = choose(
        {"a": wrong_at(labels, 5), "b": wrong_at(labels)},
        labels,
        groups,
        {"a": 1, "b": 2},
        class_names=AB,
    )
    stored = json.loads(json.dumps(choice.to_dict(), allow_nan=False))
    assert stored["chosen"] == "a"
    assert stored["rule"] == RULE
    assert stored["candidates"][1]["qualifies"] is True
    assert stored["candidates"][0]["interval_95"][0] == 0
    assert stored["candidates"][0].keys() >= {"name", "seconds", "difference", "deviation", "note"}


def test_the_choice_takes_means_over_seeds():
    labels, groups = fields()
    every = np.arange(0, 200, 10)
    one_seed = wrong_at(labels, np.arange(0, 200, 40))  # 0.975
    three_seeds = np.vstack([wrong_at(labels), wrong_at(labels, every), wrong_at(labels, every)])
    choice = choose(
        {"one": one_seed, "three": three_seeds},
        labels,
        groups,
        {"one": 2, "three": 1},
        class_names=AB,
    )
    # Two of three seeds err once in ten: 0.933 at best, though one seed alone is perfect.
    assert (choice.chosen, choice.best) == ("one", "one")
    three = by_name(choice)["three"]
    assert three.balanced_accuracy == pytest.approx(2.8 / 3, abs=1e-15)
    assert three.deviation == pytest.approx(0.1 / math.sqrt(3), abs=1e-15)
    assert three.difference == pytest.approx(0.975 - 2.8 / 3, abs=1e-15)
    assert three.interval_95[0] > 0


def test_the_choice_counts_classes_alike_however_many_crops_they_have():
    labels = np.repeat([0, 1], [180, 20])
    groups = np.arange(200) // 2
    common = np.vstack([wrong_at(labels, np.arange(0, 180, 10)), wrong_at(labels)])
    rare = np.vstack([wrong_at(labels, np.arange(180, 190)), wrong_at(labels)])
    choice = choose(
        {"rare": rare, "common": common}, labels, groups, {"rare": 1, "common": 2}, class_names=AB
    )
    # Accuracies 0.95 and 0.975, but recalls 0.9 of the common class and 0.5 of the rare one.
    assert (choice.chosen, choice.best) == ("common", "common")
    candidates = by_name(choice)
    assert candidates["common"].balanced_accuracy == pytest.approx(0.975, abs=1e-15)
    assert candidates["rare"].balanced_accuracy == pytest.approx(0.875, abs=1e-15)
    assert candidates["rare"].deviation == pytest.approx(0.25 / math.sqrt(2), abs=1e-15)
    assert candidates["rare"].difference == pytest.approx(0.1, abs=1e-15)


def test_of_experiments_that_tie_for_the_best_the_faster_is_the_reference():
    # Recalls 1/10, 2/10, 3/10 and the reverse, which floats add up to different sums.
    labels, groups = fields(num_classes=3, num_fields=1)
    rising = wrong_at(labels, np.arange(9), np.arange(10, 18), np.arange(20, 27))
    falling = wrong_at(labels, np.arange(7), np.arange(10, 18), np.arange(20, 29))
    for slow, fast in ((rising, falling), (falling, rising)):
        choice = choose(
            {"slow": slow, "fast": fast},
            labels,
            groups,
            {"slow": 5, "fast": 4},
            class_names=list("ABC"),
        )
        assert (choice.best, choice.chosen) == ("fast", "fast")
        assert by_name(choice)["slow"].difference == 0
        assert by_name(choice)["slow"].qualifies


def test_of_equally_fast_experiments_the_more_accurate_is_chosen_then_the_first():
    labels, groups = fields()
    right, almost = wrong_at(labels), wrong_at(labels, 0)
    args = (labels, groups, {"a": 1, "b": 1})
    assert choose({"a": almost, "b": right}, *args, class_names=AB).chosen == "b"
    both = choose({"a": almost, "b": almost}, *args, class_names=AB)
    assert (both.chosen, both.best) == ("a", "a")


def test_one_experiment_is_chosen_and_a_note_says_that_it_was_alone():
    labels, groups = fields()
    choice = choose({"a": wrong_at(labels, 0)}, labels, groups, {"a": 1}, class_names=AB)
    assert (choice.chosen, choice.best) == ("a", "a")
    assert choice.candidates[0].qualifies
    assert "nothing to choose from" in choice.note


def test_a_class_of_a_single_field_leaves_ties_alone_to_qualify():
    labels, groups = fields()
    groups = np.where(labels == 1, 99, groups)
    choice = choose(
        {"worse": wrong_at(labels, 0), "tied": wrong_at(labels), "best": wrong_at(labels)},
        labels,
        groups,
        {"worse": 1, "tied": 3, "best": 2},
        class_names=AB,
    )
    assert (choice.chosen, choice.best) == ("best", "best")
    assert [candidate.qualifies for candidate in choice.candidates] == [False, True, True]
    assert {candidate.interval_95 for candidate in choice.candidates} == {(None, None)}
    assert choice.note == "without an interval only experiments that tie with the best qualify"
    assert "1 of 'B'): no interval can be given" in choice.candidates[0].note


def test_few_fields_are_noted_on_every_candidate():
    labels, groups = fields(num_fields=3)
    choice = choose(
        {"a": wrong_at(labels, 0), "b": wrong_at(labels)},
        labels,
        groups,
        {"a": 1, "b": 2},
        class_names=AB,
    )
    assert all("3 of 'A'" in candidate.note for candidate in choice.candidates)
    assert choice.note is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": {}}, "predictions of"),
        ({"seconds": {"b": 1}}, "seconds of"),
        ({"seconds": {"a": math.nan}}, "seconds that are none"),
        ({"predictions": {"a": np.zeros(20, int)}}, "predictions"),
        ({"predictions": {"a": np.zeros((1, 19), int)}}, "predictions"),
        ({"predictions": {"a": np.zeros((0, 20), int)}}, "predictions"),
        ({"groups": np.zeros(19)}, "groups"),
        ({"labels": np.full(20, 2)}, "labels 2 to 2"),
    ],
)
def test_bugs_of_the_caller_raise(change, message):
    labels, groups = fields(num_fields=2, num_crops=5)
    arguments = {
        "predictions": {"a": wrong_at(labels)},
        "labels": labels,
        "groups": groups,
        "seconds": {"a": 1},
    }
    with pytest.raises(ValueError, match=message):
        choose(**(arguments | change), class_names=AB)


# After the choice


def test_the_chosen_is_compared_with_each_other():
    labels, groups = fields()
    predictions = {
        "worse": wrong_at(labels, np.arange(0, 200, 10)),
        "chosen": np.vstack([wrong_at(labels, 0, 15), wrong_at(labels)]),
        "same": np.vstack([wrong_at(labels), wrong_at(labels, 0, 15)]),
    }
    compared = compare_with("chosen", predictions, labels, groups, class_names=AB)
    assert list(compared) == ["worse", "same"]
    worse = compared["worse"]
    assert worse["balanced_accuracy"] == pytest.approx(0.1 - 0.005, abs=1e-15)
    assert worse["interval_95"]["balanced_accuracy"][0] > 0.05
    # The first networks of each: crop 0 is wrong in both, 15 in the chosen, 19 more in the other.
    assert worse["mcnemar"] == {
        "only_a_right": 19,
        "only_b_right": 1,
        "p_value": 2 * (1 + 20) / 2**20,
    }
    assert compared["same"]["balanced_accuracy"] == 0
    assert compared["same"]["mcnemar"] == {"only_a_right": 0, "only_b_right": 2, "p_value": 0.5}


def test_intervals_are_those_of_the_paired_difference():
    rng = np.random.default_rng(4)
    labels, groups = fields()
    a, b = (np.where(rng.random((1, 200)) < skill, labels, 1 - labels) for skill in (0.9, 0.8))
    drawn = {"num_bootstrap": 300, "seed": 7}
    expected = paired_difference(a, b, labels, groups, class_names=AB, **drawn)
    interval = expected["interval_95"]["balanced_accuracy"]
    choice = choose({"a": a, "b": b}, labels, groups, {"a": 1, "b": 2}, class_names=AB, **drawn)
    assert by_name(choice)["b"].interval_95 == tuple(interval)
    compared = compare_with("a", {"a": a, "b": b}, labels, groups, class_names=AB, **drawn)
    assert compared["b"]["interval_95"] == expected["interval_95"]


def test_imports_numpy_alone():
    code = (
        "import sys, jaxcells.evaluation.comparison, jaxcells.evaluation.comparison_table;"
        "print({'scipy', 'jax', 'matplotlib', 'sklearn'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
