import collections
import dataclasses
import re

import numpy as np
import pytest

from jaxcells import Error
from jaxcells.data.crops import CropSettings, _distinct, draw_crops, fold_of_fields
from jaxcells.data.fields import SPLITS, find_fields
from jaxcells.data.foreground import foreground_fraction, foreground_map
from jaxcells.data.splits import with_groups
from tests.data.folders import make_fields, write_image
from tests.data.test_splits import random_fields

SETTINGS = CropSettings(seed=0, crop_size=200, crops_per_class=954, split=(754, 100, 100))


def draw(fields, **changes):
    return draw_crops(fields, dataclasses.replace(SETTINGS, **changes))


def with_splits(fields, splits=SPLITS):
    """Returns fields as of a folder that came split."""
    return [dataclasses.replace(f, split=split) for f, split in zip(fields, splits, strict=True)]


def test_exact_counts_and_no_field_in_two_splits():
    crops = draw(make_fields({"A": 16, "B": 7}))
    counts = collections.Counter((c.field.label, c.split) for c in crops)
    assert counts == {(label, s): n for label in "AB" for s, n in SETTINGS.counts.items()}
    assert len({(c.field.name, c.split) for c in crops}) == len({c.field.name for c in crops})


def test_channels_and_their_fields_give_equal_shares():
    # One channel has ten times the images of the others and gives no more crops for it.
    crops = draw(make_fields({"A/1": 50, "A/2": 5, "A/3": 5, "B": 9}))
    of_a = [c for c in crops if c.field.label == "A"]
    assert collections.Counter(c.field.channel for c in of_a) == {"1": 318, "2": 318, "3": 318}
    for split, total in SETTINGS.counts.items():
        fields = [c.field for c in of_a if c.split == split]
        shares = collections.Counter(field.channel for field in fields)
        assert sum(shares.values()) == total
        assert max(shares.values()) - min(shares.values()) <= 1
        for channel in "123":
            per_field = collections.Counter(f.name for f in fields if f.channel == channel)
            assert max(per_field.values()) - min(per_field.values()) <= 1


@pytest.mark.parametrize("seed", range(8))
def test_remainders_of_the_splits_do_not_add_up_in_one_channel(seed):
    # 754 and 100 both leave one crop over when three channels share them.
    crops = draw(make_fields({"A/1": 5, "A/2": 5, "A/3": 5}), seed=seed)
    assert set(collections.Counter(c.field.channel for c in crops).values()) == {318}


def test_positions_follow_from_seed_class_and_field_alone():
    fields = make_fields({"A": 8, "B": 8})
    both = draw(fields)
    alone = draw([f for f in reversed(fields) if f.label == "A"])
    assert [c for c in both if c.field.label == "A"] == alone
    assert draw(fields, seed=1) != both
    places = collections.defaultdict(list)
    for crop in both:
        places[crop.field.name].append((crop.y, crop.x))
    assert len({tuple(p[:9]) for p in places.values()}) == 16


def test_a_larger_share_begins_with_the_same_positions():
    fields = make_fields({"A": 3})
    few, many = (
        [(c.y, c.x) for c in draw(with_splits(fields), split=(number, 1, 1)) if c.split == "train"]
        for number in (20, 30)
    )
    assert many[:20] == few
    assert sorted(_distinct(np.random.default_rng(5), 41)) == list(range(41))


def test_positions_are_distinct_uniform_and_reach_every_edge():
    fields = with_splits(make_fields({"A": 3}, size=(24, 26)))
    crops = draw(fields, crop_size=20, split=(35, 1, 1))
    places = {(c.y, c.x) for c in crops if c.split == "train"}
    assert places == {(y, x) for y in range(5) for x in range(7)}

    crops = draw(with_splits(make_fields({"A": 3}, size=(400, 1000))), split=(8000, 1, 1))
    y, x = np.array([(c.y, c.x) for c in crops if c.split == "train"]).T
    assert len(set(zip(y, x, strict=True))) == 8000
    for values, high in ((y, 200), (x, 800)):
        counts = np.histogram(values, bins=8, range=(0, high + 1))[0]
        assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(1000))


def test_crops_stay_inside_the_border():
    crops = draw(make_fields({"A": 5, "B": 5}), border=(10, 20, 30, 40))
    assert min(c.y for c in crops) == 10
    assert max(c.y for c in crops) == 300 - 30 - 200
    assert min(c.x for c in crops) == 40
    assert max(c.x for c in crops) == 400 - 20 - 200


def test_too_few_positions_say_how_many_fit():
    with pytest.raises(Error, match=r"image of 202x204, and only 15 distinct ones fit"):
        draw(make_fields({"A": 5, "B": 5}, size=(202, 204)))


@pytest.mark.parametrize("split_by", ["field", "crop"])
def test_all_takes_what_lies_side_by_side(split_by):
    fields = make_fields({"A/1": 10, "A/2": 5}, size=(450, 610)) + make_fields({"B": 4})
    crops = draw(fields, crops_per_class="all", split_by=split_by, border=(20, 0, 20, 0))
    per_field = collections.Counter(c.field.name for c in crops)
    # 410x610 pixels hold 2x3 crops of 200x200, and 260x400 hold 1x2.
    assert per_field == {f.name: 6 if f.label == "A" else 2 for f in fields}
    assert len({(c.field.name, c.y, c.x) for c in crops}) == len(crops) == 98
    counts = collections.Counter((c.field.label, c.split) for c in crops)
    if split_by == "crop":  # in the ratio 754:100:100
        assert [counts["A", split] for split in SPLITS] == [71, 9, 10]
    else:  # whole fields
        assert all(counts["A", split] % 6 == 0 for split in SPLITS)


def test_split_by_crop_shares_fields_and_keeps_exact_counts():
    fields = make_fields({"A": 2, "B": 2})
    crops = draw(fields, split_by="crop")
    counts = collections.Counter((c.field.label, c.split) for c in crops)
    assert counts == {(label, s): n for label in "AB" for s, n in SETTINGS.counts.items()}
    assert {c.split for c in crops if c.field == fields[0]} == set(SPLITS)
    per_field = collections.Counter(c.field.name for c in crops)
    assert per_field == dict.fromkeys((f.name for f in fields), 477)


@pytest.mark.parametrize("split_by", ["field", "crop"])
def test_whole_images_are_split_in_the_ratio_of_the_counts(split_by):
    crops = draw(make_fields({"A": 100, "B": 30}), crop_size=0, split_by=split_by)
    counts = collections.Counter((c.field.label, c.split) for c in crops)
    assert [counts["A", split] for split in SPLITS] == [79, 10, 11]
    assert [counts["B", split] for split in SPLITS] == [23, 3, 4]
    assert {(c.y, c.x) for c in crops} == {(0, 0)}


@pytest.mark.parametrize("split_by", ["field", "crop"])
@pytest.mark.parametrize("crop_size", [200, 0])
def test_a_test_split_that_came_alone_is_kept_and_the_rest_divided(split_by, crop_size):
    splits = ["test"] * 3 + [None] * 10
    fields = with_splits(make_fields({"A": 13}), splits) + with_splits(
        make_fields({"B": 13}), splits
    )
    crops = draw(fields, split_by=split_by, crop_size=crop_size)
    came = {field.name: field.split for field in fields}
    found = collections.defaultdict(set)
    for crop in crops:
        assert crop.split == came[crop.field.name] or came[crop.field.name] is None
        found[crop.field.label, crop.split].add(crop.field.name)
    # 10 fields in the ratio 754 to 100.
    numbers = {key: len(names) for key, names in found.items()}
    assert numbers == {(c, s): n for c in "AB" for s, n in zip(SPLITS, (8, 2, 3), strict=True)}
    with pytest.raises(Error, match="class 'A' has 1 field and needs at least 2"):
        draw([field for field in fields if field.split or field.name > "A/plate4_9"])


def test_a_split_that_came_with_the_folder_is_kept():
    fields = make_fields({"A": 3})
    crops = draw(with_splits(fields), split_by="crop")
    assert collections.Counter((c.field.name, c.split) for c in crops) == {
        (fields[0].name, "train"): 754,
        (fields[1].name, "val"): 100,
        (fields[2].name, "test"): 100,
    }
    with pytest.raises(Error, match="class 'A' has no image large enough for a crop in val"):
        draw(with_splits(fields, ("train", "train", "test")))


def half_empty(height=160, width=320) -> np.ndarray:
    """Returns a field whose right half alone shows texture."""
    rng = np.random.default_rng(0)
    field = rng.normal(100, 1, (height, width))
    field[:, width // 2 :] += rng.normal(0, 30, (height, width // 2))
    return field.clip(0, 255).astype(np.uint8)


def test_foreground_is_told_by_texture():
    blocks = foreground_map(half_empty()[..., None])
    assert blocks.shape == (20, 40)
    assert not blocks[:, :20].any()
    assert blocks[:, 20:].all()
    assert foreground_fraction(blocks, 0, 0, 64, 64) == 0
    assert foreground_fraction(blocks, 40, 200, 64, 64) == 1
    assert foreground_fraction(blocks, 0, 128, 64, 64) == 0.5
    assert not foreground_map(np.full((80, 80, 3), 7, np.uint16)).any()


def test_near_empty_crops_are_redrawn(tmp_path):
    for label in "AB":
        for number in range(3):
            write_image(tmp_path / label / f"{number}.png", half_empty())
    fields = find_fields(tmp_path)
    settings = {"crop_size": 64, "split": (20, 5, 5)}
    free, full = draw(fields, **settings), draw(fields, **settings, min_foreground=0.5)
    blocks = foreground_map(half_empty()[..., None])
    fractions = [foreground_fraction(blocks, c.y, c.x, 64, 64) for c in full]
    assert len(full) == len(free) == 60
    assert min(fractions) >= 0.5
    assert min(foreground_fraction(blocks, c.y, c.x, 64, 64) for c in free) == 0
    with pytest.raises(Error, match=r"0\.png: \d+ crops.* 0 were found; lower data\.min"):
        draw(fields, **settings, min_foreground=1.01)


def split_of_fields(crops):
    """{split: names of its fields}."""
    found = {split: set() for split in SPLITS}
    for crop in crops:
        found[crop.split].add(crop.field.name)
    return found


def draw_all(fields, of, ending="", **changes):
    """The crops of every fold."""
    number = len(set(fold_of_fields(fields, settings(f"1/{of}{ending}", **changes)).values()))
    folds = [f"{n}/{of}{ending}" for n in range(1, number + 1)]
    return [draw_crops(fields, settings(fold, **changes)) for fold in folds]


def settings(fold, **changes):
    return dataclasses.replace(SETTINGS, fold=fold, **changes)


@pytest.mark.parametrize(
    ("layout", "of", "split_by"),
    [
        ({"A": 16, "B": 7}, "5", "field"),
        ({"A": 4, "B": 4}, "0", "field"),
        ({"A": 3, "B": 5}, "2", "field"),  # one of A is the test split: two are left
        ({"A/1": 9, "A/2": 4, "B": 6}, "3", "field"),
        ({"A": 10, "B": 10}, "0", r"plate(\d)"),
        ({"A": 15, "B": 10}, "3", r"plate(\d)"),
    ],
)
def test_each_field_is_tested_once_by_what_saw_neither_it_nor_its_group(layout, of, split_by):
    fields = with_groups(make_fields(layout), split_by)
    group = {field.name: field.group for field in fields}
    plain = split_of_fields(draw(fields, split_by=split_by))
    tested, shares = collections.Counter(), collections.Counter()
    for crops in draw_all(fields, of, split_by=split_by):
        found = split_of_fields(crops)
        trained = found["train"] | found["val"]
        assert {group[n] for n in trained}.isdisjoint(group[n] for n in found["test"])
        assert trained | found["test"] == plain["train"] | plain["val"]  # the test split is shut
        tested.update(found["test"])
        shares.update(crop.field.name for crop in crops if crop.split == "test")
        counts = collections.Counter((c.field.label, c.split) for c in crops)
        for label in "AB":
            assert (counts[label, "train"], counts[label, "val"]) == (754, 100)
        places = collections.Counter((c.field.name, c.y, c.x) for c in crops)
        assert max(places.values()) == 1
    assert tested == dict.fromkeys(plain["train"] | plain["val"], 1)
    # Each field of a channel weighs the same, whichever fold it is in.
    for label in "AB":
        of_class = [f for f in fields if f.label == label and f.name in tested]
        assert sum(shares[f.name] for f in of_class) == 954
        for channel in {f.channel for f in of_class}:
            numbers = [shares[f.name] for f in of_class if f.channel == channel]
            assert max(numbers) - min(numbers) <= 1


@pytest.mark.parametrize("of", ["0", "2"])
def test_two_fields_of_a_class_are_enough_without_a_test_split(of):
    fields = make_fields({"A": 2, "B": 3})
    tested = []
    for crops in draw_all(fields, of, " all"):
        found = split_of_fields(crops)
        tested += found["test"]
        assert found["test"].isdisjoint(found["train"] | found["val"])
        counts = collections.Counter((c.field.label, c.split) for c in crops)
        assert all(counts[label, "val"] == 100 for label in "AB")
        left = [n for n in found["train"] | found["val"] if n.startswith("A")]
        if len(left) == 1:  # its crops are divided
            assert set(left) <= found["train"] & found["val"]
    assert sorted(tested) == [field.name for field in fields]


def test_random_groups_shared_by_classes_are_tested_once():
    few = {"crops_per_class": 40, "split": (24, 8, 8)}
    for seed in range(12):
        fields = random_fields(seed)
        try:
            folds = draw_all(fields, "2", " all", **few, seed=seed, split_by=r"(.)")
        except Error as error:
            assert re.search("no way|are needed", str(error))  # noqa: PT017
            continue
        tested = collections.Counter()
        for crops in folds:
            groups = {s: {c.field.group for c in crops if c.split == s} for s in SPLITS}
            assert groups["test"].isdisjoint(groups["train"] | groups["val"])
            tested.update(split_of_fields(crops)["test"])
            for split in ("train", "val"):
                labels = {c.field.label for c in crops if c.split == split}
                assert labels == {field.label for field in fields}
        assert tested == dict.fromkeys((field.name for field in fields), 1)


@pytest.mark.parametrize("changes", [{"crop_size": 0}, {"crops_per_class": "all"}])
def test_one_crop_left_is_not_divided_between_train_and_val(changes):
    fields = make_fields({"A": 2, "B": 3}, size=(300, 300))
    with pytest.raises(Error, match="class 'A' has 1 crop left for train and val; add images"):
        draw_all(fields, "2", " all", **changes)
    fields = make_fields({"A": 2, "B": 3}, size=(300, 400))  # two lie side by side
    for crops in draw_all(fields, "2", " all", crops_per_class="all"):
        counts = collections.Counter((c.field.label, c.split) for c in crops)
        assert all(counts[label, split] for label in "AB" for split in ("train", "val"))


def test_batches_are_left_out_and_groups_stay_whole():
    fields = make_fields({"A": 10, "B": 10})
    plain = split_of_fields(draw(fields))
    for crops in draw_all(fields, "batch", batch_by=r"(plate\d)"):
        found = split_of_fields(crops)
        (batch,) = {name[2:8] for name in found["test"]}
        assert batch not in {name[2:8] for name in found["train"] | found["val"]}
        assert plain["test"].isdisjoint(set().union(*found.values()))


def test_folds_of_a_folder_that_came_split_and_of_whole_images():
    fields = with_splits(make_fields({"A": 6}), ("train", "train", "val", "val", "test", "test"))
    shut = {fields[4].name, fields[5].name}
    for crops in draw_all(fields, "2"):
        assert shut.isdisjoint(set().union(*split_of_fields(crops).values()))
    assert len(draw_all(fields, "0", " all")) == 6
    whole = draw_all(make_fields({"A": 9, "B": 4}), "2", " all", crop_size=0)
    assert sum(crop.split == "test" for crops in whole for crop in crops) == 13
    with pytest.raises(Error, match=r"data\.fold=9/0 all: there are 4 folds"):
        draw_crops(make_fields({"A": 2, "B": 2}), settings("9/0 all"))
