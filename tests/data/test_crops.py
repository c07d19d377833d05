import collections
import dataclasses

import numpy as np
import pytest

from jaxcells import Error
from jaxcells.data.crops import CropSettings, _distinct, draw_crops
from jaxcells.data.fields import SPLITS, find_fields
from jaxcells.data.foreground import foreground_fraction, foreground_map
from tests.data.folders import make_fields, write_image

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
        assert [counts["A", split] for split in SPLITS] == [72, 9, 9]
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
    with pytest.raises(Error, match=r"0\.png: \d+ crops.* 0 were found \(the fullest has 1\.00"):
        draw(fields, **settings, min_foreground=1.01)
