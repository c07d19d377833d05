import collections
import dataclasses
import itertools

import numpy as np
import pytest

from jaxcells import Error
from jaxcells.data.splits import (
    allot,
    allot_folds,
    apportion,
    find_groups,
    parse_fold,
    with_groups,
)
from tests.data.folders import make_fields

COUNTS = {"train": 754, "val": 100, "test": 100}


def allot_groups(layout, split_by="field", seed=0):
    """Returns fields with groups, and the split of every group."""
    fields = with_groups(make_fields(layout), split_by)
    return fields, allot(fields, COUNTS, split_by=split_by, seed=seed)


def fields_per_split(fields, allotted):
    counts = collections.Counter((f.label, allotted[f.group]) for f in fields)
    return {
        label: tuple(counts[label, split] for split in COUNTS)
        for label in sorted({f.label for f in fields})
    }


@pytest.mark.parametrize(
    ("total", "minimum", "expected"),
    [
        (954, 0, (754, 100, 100)),
        # Shares of 12.6, 1.7 and 1.7: what is left over goes to those held out.
        (16, 1, (12, 2, 2)),
        (3, 1, (1, 1, 1)),
        (4, 1, (2, 1, 1)),
        (5, 1, (3, 1, 1)),
        (2, 0, (1, 0, 1)),
        (0, 0, (0, 0, 0)),
    ],
)
def test_apportion(total, minimum, expected):
    assert tuple(apportion(total, COUNTS, minimum, {}).values()) == expected


def test_apportion_goes_by_the_sum_over_strata():
    equal = dict.fromkeys(COUNTS, 1)
    first = apportion(4, equal, 1, {})
    assert list(first.values()) == [1, 1, 2]
    assert list(apportion(2, equal, 0, first).values()) == [1, 1, 0]


def test_groups_are_found_in_paths():
    sources = ["A/day1/f.png", "B/day2/g.png"]
    assert find_groups(sources, r"day(\d)", "data.batch_by") == ["1", "2"]
    assert find_groups(sources, "", "data.batch_by") == ["", ""]


def test_fields_are_allotted_in_the_ratio_of_the_counts():
    assert fields_per_split(*allot_groups({"A": 16, "B": 3})) == {"A": (12, 2, 2), "B": (1, 1, 1)}


def test_every_split_sees_every_channel_that_is_large_enough():
    fields, allotted = allot_groups({"A/1": 6, "A/2": 6, "A/3": 2, "B/1": 9}, seed=3)
    for channel in ("1", "2"):
        splits = [allotted[f.group] for f in fields if (f.label, f.channel) == ("A", channel)]
        assert set(splits) == set(COUNTS)
    # Over all channels the ratio is 14 times 754:100:100, rounded up for val and test.
    assert fields_per_split(fields, allotted)["A"] == (10, 2, 2)


def test_few_channels_of_one_field_are_allotted_together():
    allotted = allot_groups({f"{label}/{n}": 1 for label in "AB" for n in range(5)})
    assert fields_per_split(*allotted) == {"A": (3, 1, 1), "B": (3, 1, 1)}


def test_the_split_of_a_class_depends_on_seed_and_class_alone():
    fields, both = allot_groups({"A": 16, "B": 16})
    of_a = [field for field in reversed(fields) if field.label == "A"]
    assert allot(of_a, COUNTS, split_by="field", seed=0).items() <= both.items()
    assert allot(fields, COUNTS, split_by="field", seed=1) != both


def test_channels_stay_in_one_split():
    fields, allotted = allot_groups({f"{c}/{n}": 4 for c in "AB" for n in range(3)}, "channel")
    assert len(allotted) == 6
    assert fields_per_split(fields, allotted) == {"A": (4, 4, 4), "B": (4, 4, 4)}


def test_a_group_shared_by_classes_stays_in_one_split():
    fields, allotted = allot_groups({"A": 10, "B": 10}, r"plate(\d)")
    assert {f.group for f in fields} == set("01234")
    assert sorted(collections.Counter(allotted.values()).values()) == [1, 1, 3]
    assert fields_per_split(fields, allotted) == {"A": (6, 2, 2), "B": (6, 2, 2)}


@pytest.mark.parametrize("seed", range(8))
def test_groups_that_only_overlap_in_part_still_reach_every_split(seed):
    # A has plates 0, 1 and 2, B has 2, 3 and 4: most ways of cutting leave one without a split.
    fields = with_groups(make_fields({"A": 15, "B": 15}), r"plate(\d)")
    fields = [f for f in fields if f.group in ("012" if f.label == "A" else "234")]
    allotted = allot(fields, COUNTS, split_by=r"plate(\d)", seed=seed)
    assert all(min(numbers) > 0 for numbers in fields_per_split(fields, allotted).values())


def test_groups_that_cannot_reach_every_split_are_an_error():
    # Any three of four plates would have to be in three splits.
    plates = {"A": "012", "B": "013", "C": "023", "D": "123"}
    fields = with_groups(make_fields(dict.fromkeys(plates, 15)), r"plate(\d)")
    fields = [f for f in fields if f.group in plates[f.label]]
    with pytest.raises(Error, match="no way to give each of the classes A, B, C, D a group"):
        allot(fields, COUNTS, split_by=r"plate(\d)", seed=0)


@pytest.mark.parametrize(
    ("layout", "split_by", "text"),
    [
        (
            {"A": 16, "B": 2},
            "field",
            r"B' has 2 fields and needs at least 3.*`cross_validate`",
        ),
        ({"A/1": 16, "B/1": 8}, "channel", r"'A' has 1 channel and .*split_by=field$"),
        ({"A": 10, "B": 10}, "(plate)", r"split_by=\(plate\): class 'A' has 1 group and needs"),
        ({"A": 2}, r"well(\d)", r"split_by='well.*' finds no .* path of A/plate0_0\.png, A/plate"),
    ],
)
def test_what_cannot_be_split_is_named_with_what_would_work(layout, split_by, text):
    with pytest.raises(Error, match=text):
        allot_groups(layout, split_by)


def folds_of(fields, of, *, split_by="group", batch_by="", seed=0):
    return allot_folds(fields, of, split_by=split_by, batch_by=batch_by, seed=seed)


def random_fields(seed):
    """Two to four classes that share some of three to seven groups."""
    rng = np.random.default_rng(seed)
    names = [f"g{n}" for n in range(rng.integers(3, 8))]
    fields = []
    for label in "ABCD"[: rng.integers(2, 5)]:
        groups = rng.choice(names, rng.integers(2, len(names) + 1), replace=False).tolist()
        for group, of_class in zip(groups, make_fields({label: len(groups)}), strict=True):
            fields.append(dataclasses.replace(of_class, group=group))
    return fields


def reaches(fields, fold_of, num_folds):
    """Whether every class is in every fold."""
    found = {(field.label, fold_of[field.group]) for field in fields}
    return len(found) == num_folds * len({field.label for field in fields})


@pytest.mark.parametrize("num_folds", [2, 3])
def test_folds_of_shared_groups_are_found_wherever_there_are_any(num_folds):
    possible = 0
    for seed in range(60):
        fields = random_fields(seed)
        groups = sorted({field.group for field in fields})
        by_hand = itertools.product(range(num_folds), repeat=len(groups))
        assignments = (dict(zip(groups, folds, strict=True)) for folds in by_hand)
        if any(reaches(fields, fold_of, num_folds) for fold_of in assignments):
            possible += 1
            fold_of = folds_of(fields, str(num_folds), seed=seed)
            assert fold_of.keys() == set(groups)
            assert set(fold_of.values()) == set(range(1, num_folds + 1))
            assert reaches(fields, fold_of, num_folds)
        else:
            with pytest.raises(Error, match=r"are needed|no way"):
                folds_of(fields, str(num_folds), seed=seed)
    assert possible > 20


def test_folds_of_fields_are_as_equal_as_can_be_and_see_every_channel():
    fields = make_fields({"A/1": 6, "A/2": 5, "B": 7})
    fold_of = folds_of(fields, "5", split_by="field")
    counts = collections.Counter((f.label, fold_of[f.group]) for f in fields)
    for label, expected in (("A", [2, 2, 2, 2, 3]), ("B", [1, 1, 1, 2, 2])):
        assert sorted(counts[label, fold] for fold in range(1, 6)) == expected
    assert {fold_of[f.group] for f in fields if f.channel == "1"} == {1, 2, 3, 4, 5}
    assert folds_of(fields, "5", split_by="field", seed=1) != fold_of
    # Of other draws than the split: folds of what is left do not follow from it.
    equal = allot(fields, {str(n): 1 for n in range(1, 6)}, split_by="field", seed=0)
    assert {group: int(fold) for group, fold in equal.items()} != fold_of


def test_each_group_or_batch_is_left_out_once():
    fields = make_fields({"A": 10, "B": 10})
    assert sorted(folds_of(fields, "0").values()) == list(range(1, 21))
    in_batches = folds_of(fields, "batch", batch_by=r"plate(\d)")
    for field in fields:
        assert in_batches[field.group] == int(field.name.split("plate")[1][0]) + 1
    shared = [dataclasses.replace(field, group="same") for field in fields]
    with pytest.raises(Error, match=r"group 'same' .* is in two batches"):
        folds_of(shared + fields, "batch", batch_by=r"plate(\d)")


@pytest.mark.parametrize(
    ("layout", "of", "batch_by", "text"),
    [
        ({"A": 9, "B": 4}, "5", "", r"'B' has 4 .* 5 are needed; add .* use folds=4 or folds=0"),
        ({"A": 9, "B": 1}, "0", "", "'B' has 1 groups .* 2 are needed; add images$"),
        ({"A": 9, "B": 1}, "batch", r"plate(\d)", "'B' has 1 batches to test"),
        ({"A": 9, "B": 9}, "batch", r"day(\d)", "data.batch_by=.* finds no group 1"),
    ],
)
def test_what_has_too_few_groups_for_folds_is_named(layout, of, batch_by, text):
    with pytest.raises(Error, match=text):
        folds_of(make_fields(layout), of, batch_by=batch_by)


def test_folds_are_named_by_their_number_and_of_how_many():
    assert parse_fold("2/5") == (2, "5", False)
    assert parse_fold("12/0 all") == (12, "0", True)
    assert parse_fold("1/batch") == (1, "batch", False)
    for text in ("", "0/5", "2", "2/1", "2/5all", "2/plate"):
        with pytest.raises(Error, match="must be such as 2/5"):
            parse_fold(text)
