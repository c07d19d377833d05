import collections
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jaxcells import Error
from jaxcells.data.crops import _distinct, draw_crops
from jaxcells.data.fields import Field, find_fields
from jaxcells.data.foreground import foreground_fraction, foreground_map
from jaxcells.data.images import ImageInfo
from jaxcells.data.splits import with_groups
from tests.data.folders import write_image

COUNTS = {"train": 754, "val": 100, "test": 100}


def make_fields(layout: dict[str, int], size=(300, 400)) -> list[Field]:
    info = ImageInfo(height=size[0], width=size[1], channels=1, dtype="uint8", notes=())
    fields = []
    for folder, count in layout.items():
        label, _, channel = folder.partition("/")
        for number in range(count):
            name = f"{folder}/{number}.png"
            fields.append(Field(Path(name), label, channel, name, name, info))
    return fields


def test_exact_counts_and_no_field_on_two_sides():
    crops = draw_crops(make_fields({"A": 16, "B": 7}), COUNTS, 200, seed=0)
    counts = collections.Counter((c.field.label, c.split) for c in crops)
    assert counts == {(label, side): n for label in "AB" for side, n in COUNTS.items()}
    sides = collections.defaultdict(set)
    for crop in crops:
        sides[crop.field.name].add(crop.split)
    assert all(len(s) == 1 for s in sides.values())


def test_channels_and_their_fields_give_equal_shares():
    # One channel has ten times the images of the others and gives no more crops for it.
    crops = draw_crops(make_fields({"A/1": 50, "A/2": 5, "A/3": 5, "B": 9}), COUNTS, 200, seed=0)
    of_a = [c for c in crops if c.field.label == "A"]
    assert collections.Counter(c.field.channel for c in of_a) == {"1": 318, "2": 318, "3": 318}
    for side, total in COUNTS.items():
        shares = collections.Counter(c.field.channel for c in of_a if c.split == side)
        assert sum(shares.values()) == total
        assert max(shares.values()) - min(shares.values()) <= 1
        for channel in "123":
            per_field = collections.Counter(
                c.field.name for c in of_a if (c.split, c.field.channel) == (side, channel)
            )
            assert max(per_field.values()) - min(per_field.values()) <= 1


@pytest.mark.parametrize("seed", range(8))
def test_remainders_of_the_sides_do_not_add_up_in_one_channel(seed):
    # 754 and 100 both leave one crop over when three channels share them.
    crops = draw_crops(make_fields({"A/1": 5, "A/2": 5, "A/3": 5}), COUNTS, 200, seed=seed)
    assert set(collections.Counter(c.field.channel for c in crops).values()) == {318}


def test_every_field_has_positions_of_its_own():
    crops = draw_crops(
        make_fields({"A": 3, "B": 3}), {"train": 9, "val": 9, "test": 9}, 200, seed=0
    )
    places = collections.defaultdict(list)
    for crop in crops:
        places[crop.field.name].append((crop.y, crop.x))
    assert len({tuple(p) for p in places.values()}) == 6


def test_positions_follow_from_seed_class_and_field_alone():
    fields = make_fields({"A": 8, "B": 8})
    both = draw_crops(fields, COUNTS, 200, seed=0)
    alone = draw_crops([f for f in reversed(fields) if f.label == "A"], COUNTS, 200, seed=0)
    assert [c for c in both if c.field.label == "A"] == alone
    assert draw_crops(fields, COUNTS, 200, seed=1) != both


def test_a_larger_share_begins_with_the_same_positions():
    rng = np.random.default_rng
    assert list(_distinct(rng(5), 1000, 30))[:20] == list(_distinct(rng(5), 1000, 20))
    assert list(_distinct(rng(5), 40, 40))[:35] == list(_distinct(rng(5), 40, 35))
    assert sorted(_distinct(rng(5), 41, 41)) == list(range(41))


def test_positions_are_distinct_uniform_and_reach_every_edge():
    fields = [make_fields({"A": 1}, size=(24, 26))[0]]
    fields = [dataclasses.replace(f, split="train") for f in fields]
    crops = draw_crops(fields, {"train": 35}, 20, seed=0)
    assert {(c.y, c.x) for c in crops} == {(y, x) for y in range(5) for x in range(7)}

    fields = [dataclasses.replace(f, split="train") for f in make_fields({"A": 1}, (400, 1000))]
    crops = draw_crops(fields, {"train": 8000}, 200, seed=0)
    y, x = np.array([(c.y, c.x) for c in crops]).T
    assert len(set(zip(y, x, strict=True))) == 8000
    for values, high in ((y, 200), (x, 800)):
        counts = np.histogram(values, bins=8, range=(0, high + 1))[0]
        assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(1000))


def test_crops_stay_inside_the_border():
    crops = draw_crops(make_fields({"A": 5, "B": 5}), COUNTS, 200, seed=0, border=(10, 20, 30, 40))
    assert min(c.y for c in crops) == 10
    assert max(c.y for c in crops) == 300 - 30 - 200
    assert min(c.x for c in crops) == 40
    assert max(c.x for c in crops) == 400 - 20 - 200


def test_too_few_positions_say_how_many_fit():
    with pytest.raises(Error, match=r"image of 202x204, and only 15 distinct ones fit"):
        draw_crops(make_fields({"A": 5, "B": 5}, size=(202, 204)), COUNTS, 200, seed=0)


def test_split_by_crop_shares_fields_and_keeps_exact_counts():
    fields = make_fields({"A": 2, "B": 2})
    crops = draw_crops(fields, COUNTS, 200, seed=0, split_by="crop")
    counts = collections.Counter((c.field.label, c.split) for c in crops)
    assert counts == {(label, side): n for label in "AB" for side, n in COUNTS.items()}
    assert {c.split for c in crops if c.field.name == "A/0.png"} == set(COUNTS)
    assert collections.Counter(c.field.name for c in crops) == dict.fromkeys(
        (f.name for f in fields), 477
    )


def test_whole_images_are_split_in_the_ratio_of_the_counts():
    crops = draw_crops(make_fields({"A": 100, "B": 30}), COUNTS, None, seed=0)
    counts = collections.Counter((c.field.label, c.split) for c in crops)
    assert counts == {
        ("A", "train"): 79,
        ("A", "val"): 10,
        ("A", "test"): 11,
        ("B", "train"): 23,
        ("B", "val"): 3,
        ("B", "test"): 4,
    }
    assert {(c.y, c.x) for c in crops} == {(0, 0)}


def test_a_split_that_came_with_the_folder_is_kept():
    fields = [
        dataclasses.replace(f, split=side)
        for f, side in zip(make_fields({"A": 3}), COUNTS, strict=True)
    ]
    crops = draw_crops(fields, COUNTS, 200, seed=0, split_by="crop")
    assert collections.Counter((c.field.name, c.split) for c in crops) == {
        ("A/0.png", "train"): 754,
        ("A/1.png", "val"): 100,
        ("A/2.png", "test"): 100,
    }


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
    assert foreground_fraction(blocks, 0, 0, 64) == 0
    assert foreground_fraction(blocks, 40, 200, 64) == 1
    assert foreground_fraction(blocks, 0, 128, 64) == 0.5
    assert not foreground_map(np.full((80, 80, 3), 7, np.uint16)).any()


def test_near_empty_crops_are_redrawn(tmp_path):
    for label in "AB":
        for number in range(3):
            write_image(tmp_path / label / f"{number}.png", half_empty())
    fields = with_groups(find_fields(tmp_path), "field")
    counts = {"train": 20, "val": 5, "test": 5}
    free = draw_crops(fields, counts, 64, seed=0)
    full = draw_crops(fields, counts, 64, seed=0, min_foreground=0.5)
    blocks = foreground_map(half_empty()[..., None])
    fractions = [foreground_fraction(blocks, c.y, c.x, 64) for c in full]
    assert len(full) == len(free) == 60
    assert min(fractions) >= 0.5
    assert min(foreground_fraction(blocks, c.y, c.x, 64) for c in free) == 0
    with pytest.raises(Error, match=r"0\.png: only 0 of \d+ random crops.*fullest has 1\.00"):
        draw_crops(fields, counts, 64, seed=0, min_foreground=1.01)


def test_a_side_without_usable_images_is_named():
    fields = [
        dataclasses.replace(f, split=side)
        for f, side in zip(make_fields({"A": 3}), ("train", "train", "test"), strict=True)
    ]
    with pytest.raises(Error, match="class 'A' has no image large enough for a crop in val"):
        draw_crops(fields, COUNTS, 200, seed=0)
