import collections
from pathlib import Path

import pytest

from jaxcells import Error
from jaxcells.data.fields import Field
from jaxcells.data.images import ImageInfo
from jaxcells.data.splits import allot, apportion, with_groups

COUNTS = {"train": 754, "val": 100, "test": 100}
INFO = ImageInfo(height=100, width=100, channels=1, dtype="uint8", notes=())


def make_fields(layout: dict[str, int]) -> list[Field]:
    fields = []
    for folder, count in layout.items():
        label, _, channel = folder.partition("/")
        for number in range(count):
            name = f"{folder}/plate{number % 5}_{number}.png"
            fields.append(Field(Path(name), label, channel, name, name, INFO))
    return fields


def sides_per_class(fields, allotted):
    counts = collections.Counter((f.label, allotted[f.group]) for f in fields)
    return {
        label: tuple(counts[label, side] for side in COUNTS)
        for label in sorted({f.label for f in fields})
    }


@pytest.mark.parametrize(
    ("total", "minimum", "expected"),
    [
        (954, 0, (754, 100, 100)),
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


def test_apportion_rounds_in_favour_of_the_sides_held_out():
    # Shares of 12.8, 1.6 and 1.6.
    assert apportion(16, {"train": 96, "val": 12, "test": 12}, 1, {}) == {
        "train": 12,
        "val": 2,
        "test": 2,
    }
    assert apportion(4, {"train": 1, "val": 1, "test": 1}, 1, {}) == {
        "train": 1,
        "val": 1,
        "test": 2,
    }


def test_apportion_gives_nothing_to_a_side_without_a_count():
    assert apportion(10, {"train": 3, "val": 0, "test": 2}, 1, {}) == {
        "train": 6,
        "val": 0,
        "test": 4,
    }


def test_fields_are_allotted_in_the_ratio_of_the_counts():
    fields = make_fields({"A": 16, "B": 3})
    allotted = allot(with_groups(fields, "field"), COUNTS, split_by="field", seed=0)
    assert sides_per_class(fields, allotted) == {"A": (12, 2, 2), "B": (1, 1, 1)}


def test_every_side_sees_every_channel_that_is_large_enough():
    fields = make_fields({"A/1": 6, "A/2": 6, "A/3": 2, "B/1": 9})
    allotted = allot(with_groups(fields, "field"), COUNTS, split_by="field", seed=3)
    for channel in ("1", "2"):
        sides = collections.Counter(
            allotted[f.group] for f in fields if (f.label, f.channel) == ("A", channel)
        )
        assert sides["val"] >= 1
        assert sides["test"] >= 1
    # Over all channels the ratio is 14 times 754:100:100, rounded up for val and test.
    assert sides_per_class(fields, allotted)["A"] == (10, 2, 2)


def test_few_channels_of_one_field_are_allotted_together():
    fields = make_fields({f"{label}/{n}": 1 for label in "AB" for n in range(5)})
    allotted = allot(with_groups(fields, "field"), COUNTS, split_by="field", seed=0)
    assert sides_per_class(fields, allotted) == {"A": (3, 1, 1), "B": (3, 1, 1)}


def test_the_split_of_a_class_depends_on_seed_and_class_alone():
    fields = make_fields({"A": 16, "B": 16})
    both = allot(with_groups(fields, "field"), COUNTS, split_by="field", seed=0)
    alone = allot(
        with_groups(list(reversed(make_fields({"A": 16}))), "field"),
        COUNTS,
        split_by="field",
        seed=0,
    )
    assert alone.items() <= both.items()
    other = allot(with_groups(fields, "field"), COUNTS, split_by="field", seed=1)
    assert other != both


def test_channels_stay_on_one_side():
    fields = with_groups(make_fields({f"{c}/{n}": 4 for c in "AB" for n in range(3)}), "channel")
    allotted = allot(fields, COUNTS, split_by="channel", seed=0)
    assert len(allotted) == 6
    assert sides_per_class(fields, allotted) == {"A": (4, 4, 4), "B": (4, 4, 4)}


def test_a_group_shared_by_classes_stays_on_one_side():
    fields = with_groups(make_fields({"A": 10, "B": 10}), r"plate(\d)")
    assert {f.group for f in fields} == set("01234")
    allotted = allot(fields, COUNTS, split_by=r"plate(\d)", seed=0)
    assert sorted(collections.Counter(allotted.values()).values()) == [1, 1, 3]
    assert sides_per_class(fields, allotted) == {"A": (6, 2, 2), "B": (6, 2, 2)}


@pytest.mark.parametrize("seed", range(8))
def test_groups_that_only_overlap_in_part_still_reach_every_side(seed):
    # A has plates 0, 1 and 2, B has 2, 3 and 4: most ways of cutting leave one without a side.
    layout = with_groups(make_fields({"A": 15, "B": 15}), r"plate(\d)")
    fields = [f for f in layout if f.group in ("012" if f.label == "A" else "234")]
    allotted = allot(fields, COUNTS, split_by=r"plate(\d)", seed=seed)
    assert all(min(sides) > 0 for sides in sides_per_class(fields, allotted).values())


@pytest.mark.parametrize(
    ("layout", "split_by", "text"),
    [
        (
            {"A": 16, "B": 2},
            "field",
            r"class 'B' has 2 fields and needs at least 3.*=crop \(crops of one field",
        ),
        (
            {"A/1": 16, "B/1": 8},
            "channel",
            r"class 'A' has 1 channel and needs at least 3.*split_by=field or .*=crop$",
        ),
        ({"A": 10, "B": 10}, r"(plate)", r"1 group of '\(plate\)' and needs at least 3"),
    ],
)
def test_too_few_groups_name_the_class_and_what_would_work(layout, split_by, text):
    fields = with_groups(make_fields(layout), split_by)
    with pytest.raises(Error, match=text):
        allot(fields, COUNTS, split_by=split_by, seed=0)


@pytest.mark.parametrize(
    ("split_by", "text"),
    [
        ("plate", "has no group in parentheses"),
        ("plate(", "is not a valid expression"),
        (r"well(\d)", r"does not match 'A/plate0_0\.png'"),
    ],
)
def test_wrong_expressions(split_by, text):
    with pytest.raises(Error, match=text):
        with_groups(make_fields({"A": 2}), split_by)
