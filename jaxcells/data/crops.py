"""Draws random crops from fields: which field, where, and for which split."""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxcells.data.fields import SPLITS, Field, num_positions
from jaxcells.data.foreground import foreground_fraction, foreground_map
from jaxcells.data.images import read_image
from jaxcells.data.objects import Places
from jaxcells.data.parallel import parallel_map
from jaxcells.data.rng import named_generator
from jaxcells.data.splits import allot, allot_folds, apportion, num_groups, parse_fold
from jaxcells.files import Error
from jaxcells.text import counted


@dataclasses.dataclass(frozen=True)
class CropSettings:
    """What crops follow from, beside the images; but for the seed, keys of the config below `data`.

    Attributes:
      seed: of the positions and the split.
      crop_size: side of a crop in pixels; 0: every image is one crop.
      crops_per_class: how many crops a class gives, the sum of `split`; or "all": as many as would
        lie side by side in its fields, or as its masks have cells.
      split: exact number of crops per class in (train, val, test), each 1 or more; with "all" or
        images used whole, their ratio.
      split_by: "field", "channel", "crop" or a regular expression, see `with_groups`. "crop" draws
        first and splits the crops at random, as the reference study did.
      border: pixels left out at the (top, right, bottom, left), such as a burnt-in scale bar.
      min_foreground: crops with a smaller fraction of foreground are redrawn, see `foreground`.
      plane: which plane of a stack to read, see `read_image`.
      exclude: regular expression of images to leave out, see `find_fields`.
      mask: ending of the names of masks, on whose cells crops are then centred, see `find_cells`. A
        field gives no more crops than it has cells, so that a class may give fewer than asked for.
      fold: "", or the fold of a cross-validation that this set is, see `parse_fold`: "test" is what
        the fold tests, "val" a part of its training side.
      batch_by: "", or what finds the batch (plate, day) of an image, as `split_by` finds groups.
    """

    seed: int
    crop_size: int
    crops_per_class: int | str
    split: tuple[int, int, int]
    split_by: str = "field"
    border: tuple[int, int, int, int] = (0, 0, 0, 0)
    min_foreground: float = 0.0
    plane: str = ""
    exclude: str = ""
    mask: str = ""
    fold: str = ""
    batch_by: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """Crops per class for each split, by name; what a fold tests has no fixed number."""
        counts = dict(zip(SPLITS, self.split, strict=True))
        return {s: n for s, n in counts.items() if s != "test" or not self.fold}


@dataclasses.dataclass(frozen=True)
class Crop:
    """A square of a field, or the whole field.

    Attributes:
      field: where it is cut from.
      y: row of its upper left pixel.
      x: column of its upper left pixel.
      split: "train", "val" or "test".
    """

    field: Field
    y: int
    x: int
    split: str


def draw_crops(
    fields: Sequence[Field], settings: CropSettings, places: Places | None = None
) -> list[Crop]:
    """Draws crops at random through the channels of every class.

    In each split every channel of a class gives an equal share (to within one crop), and every
    field within a channel likewise; with "all", as many as it has room for. Positions are distinct,
    and uniform over a field or over its cells. The positions in a field follow from (seed, class,
    field name) alone: neither the order of listing nor other classes change them, and a larger
    share begins with the same positions.

    A fold trains and validates on as many crops of a class as any set. For testing, fields give
    what they would of `crops_per_class` divided over all that are tested in some fold (and at
    least one): so each weighs the same, however few stand beside it in its own fold. A class of
    which a fold has a single group left to train on divides that group's crops at random between
    train and val.

    Args:
      fields: usable fields with groups set (`usable_fields`, `with_groups`).
      settings: how many crops of what size, and how they are split.
      places: where crops may lie, see `find_cells`; None: anywhere inside the border.

    Raises:
      Error: too few groups for the policy, too few crops to divide, too few distinct positions, or
        too little foreground.
    """
    fields = sorted(fields, key=lambda field: field.name)
    split_of = _split_of_fields(fields, settings)
    fields = [field for field in fields if field.name in split_of]
    if not settings.crop_size:
        whole = [Crop(field, 0, 0, split_of[field.name]) for field in fields]
        return _split_at_random(whole, settings)
    if settings.crops_per_class != "all":
        shares = _shares(fields, split_of, settings)
    elif places:
        shares = {field.name: len(places[field.name]) for field in fields}
    else:
        size, border = settings.crop_size, settings.border
        shares = {f.name: num_positions(f.info, size, border, step=size) for f in fields}

    def draw(field: Field) -> list[Crop]:
        number, split = shares[field.name], split_of[field.name]
        if places:
            rng = named_generator(settings.seed, "cells", field.label, field.name)
            found = rng.permutation(places[field.name])[:number].tolist()
        else:
            found = _positions(field, number, settings)
        return [Crop(field, y, x, split) for y, x in found]

    crops = [c for drawn in parallel_map(draw, fields, title="drawing crops") for c in drawn]
    return _split_at_random(crops, settings)


def fold_of_fields(fields: Sequence[Field], settings: CropSettings) -> dict[str, int]:
    """Returns the fold, from 1, that tests each field, by name; nothing of a set that is no fold.

    The test split of the set that `settings` would be without a fold is in none of them, unless
    the fold says that all fields are to be tested.

    Raises:
      Error: see `allot_folds`.
    """
    if not settings.fold:
        return {}
    _, of, is_of_all = parse_fold(settings.fold)
    if not is_of_all:
        plain = _split_of_fields(fields, dataclasses.replace(settings, fold=""))
        fields = [field for field in fields if plain[field.name] != "test"]
    policies = {"split_by": settings.split_by, "batch_by": settings.batch_by}
    fold_of = allot_folds(fields, of, **policies, seed=settings.seed)
    return {field.name: fold_of[field.group] for field in fields}


def _split_of_fields(fields: Sequence[Field], settings: CropSettings) -> dict[str, str]:
    """Returns the split of every field by name, "" where its crops are divided instead.

    Those that a fold leaves to the test split are missing.
    """
    if fold_of := fold_of_fields(fields, settings):
        (number, *_), num_folds = parse_fold(settings.fold), max(fold_of.values())
        if number > num_folds:
            raise Error(f"data.fold={settings.fold}: there are {num_folds} folds")
        trained = [field for field in fields if fold_of.get(field.name, number) != number]
        tested = {name: "test" for name, fold in fold_of.items() if fold == number}
        return _split_training_side(trained, settings) | tested
    came = {field.name: field.split for field in fields if field.split}
    counts = {name: n for name, n in settings.counts.items() if name not in came.values()}
    if settings.split_by == "crop" and settings.crop_size and not came:
        return {field.name: "" for field in fields}
    # Used whole, an image is a crop: to split crops is to split images.
    split_by = "field" if settings.split_by == "crop" else settings.split_by
    rest = [field for field in fields if not field.split]
    split_of = allot(rest, counts, split_by=split_by, seed=settings.seed)
    return came | {field.name: split_of[field.group] for field in rest}


def _split_training_side(fields: Sequence[Field], settings: CropSettings) -> dict[str, str]:
    """Divides what a fold trains on: whole groups where there are several, else crops ("")."""
    numbers, seed = num_groups(fields), f"{settings.seed} fold {settings.fold}"
    several = [field for field in fields if numbers[field.label] > 1]
    split_of = {field.name: "" for field in fields}
    with contextlib.suppress(Error):  # the groups that classes share may leave no way
        allotted = allot(several, settings.counts, split_by=settings.split_by, seed=seed)
        split_of |= {field.name: allotted[field.group] for field in several}
    return split_of


def _shares(
    fields: Sequence[Field], split_of: Mapping[str, str], settings: CropSettings
) -> dict[str, int]:
    """Returns how many crops each field gives: equal over channels, then over their fields.

    A remainder goes to the channels, and in them to the fields, that gave least so far, in an order
    shuffled by the seed.
    """
    shares: dict[str, int] = {}
    for label in sorted({field.label for field in fields}):
        of_class = [field for field in fields if field.label == label]
        order = named_generator(settings.seed, "shares", label).permutation(len(of_class))
        in_order = [of_class[i] for i in order]
        if settings.fold:
            tested = _share_out(in_order, sum(settings.split), collections.Counter())
            shares |= {name: max(1, share) for name, share in tested.items()}
        are_divided = any(split_of[field.name] == "" for field in of_class)
        quotas = {"": sum(settings.counts.values())} if are_divided else settings.counts
        given: collections.Counter[str] = collections.Counter()
        for split, total in quotas.items():
            members = [field for field in in_order if split_of[field.name] == split]
            if not members:
                raise Error(
                    f"class {label!r} has no image large enough for a crop in {split}; add one, or "
                    "put the classes directly below the image folder to have them split"
                )
            shares |= _share_out(members, total, given)
    return shares


def _share_out(
    fields: Sequence[Field], total: int, given: collections.Counter[str]
) -> dict[str, int]:
    """Divides `total` crops over the fields; counts in `given` what each channel gave."""
    channels = collections.defaultdict(list)
    for field in fields:
        channels[field.channel].append(field.name)
    shares: dict[str, int] = {}
    least_first = sorted(channels, key=given.__getitem__)
    for channel, share in zip(least_first, _equal(total, len(channels)), strict=True):
        given[channel] += share
        members = channels[channel]
        shares |= dict(zip(members, _equal(share, len(members)), strict=True))
    return shares


def _equal(total: int, number: int) -> list[int]:
    return [total // number + (i < total % number) for i in range(number)]


def _positions(field: Field, number: int, settings: CropSettings) -> list[tuple[int, int]]:
    """Draws `number` distinct positions (y, x), uniform over the field inside its border."""
    size, (top, right, _, left) = settings.crop_size, settings.border
    capacity = num_positions(field.info, size, settings.border)
    if number > capacity:
        raise Error(
            f"{field.path}: {number} crops of {size}x{size} are to come from this image of "
            f"{field.info.height}x{field.info.width}, and only {capacity} distinct ones fit; lower "
            "data.crops_per_class (and data.split) or data.crop_size, add images to class "
            f"{field.label!r}, or set data.crops_per_class=all to take no more than its images hold"
        )
    columns = field.info.width - left - right - size + 1
    rng = named_generator(settings.seed, "positions", field.label, field.name)
    places = ((top + n // columns, left + n % columns) for n in _distinct(rng, capacity))
    least = settings.min_foreground
    if not (least and number):
        return list(itertools.islice(places, number))
    foreground = foreground_map(read_image(field.path, plane=settings.plane))
    # A field with hardly any cells would otherwise be searched pixel by pixel.
    tried = itertools.islice(places, 100 * number + 1000)
    full = (p for p in tried if foreground_fraction(foreground, *p, size, size) >= least)
    found = list(itertools.islice(full, number))
    if len(found) < number:
        raise Error(
            f"{field.path}: {number} crops with the foreground that data.min_foreground={least:g} "
            f"asks for are needed, and {len(found)} were found; lower data.min_foreground or take "
            "this image out"
        )
    return found


def _distinct(rng: np.random.Generator, capacity: int) -> Iterator[int]:
    """Yields all integers below `capacity` in random order, as many as are asked for."""
    taken: set[int] = set()
    # Rejection is quick until most are taken; the few then left are shuffled.
    while len(taken) < (capacity + 1) // 2:
        index = int(rng.integers(capacity))
        if index not in taken:
            taken.add(index)
            yield index
    rest = np.setdiff1d(np.arange(capacity), np.fromiter(taken, int, len(taken)))
    yield from map(int, rng.permutation(rest))


def _split_at_random(crops: Sequence[Crop], settings: CropSettings) -> list[Crop]:
    """Gives each crop without a split one: exact numbers per class, or in that ratio."""
    split_crops = [crop for crop in crops if crop.split]
    for label in sorted({crop.field.label for crop in crops}):
        divided = [crop for crop in crops if crop.field.label == label and not crop.split]
        rng = named_generator(settings.seed, "split", label)
        if 0 < len(divided) < len(settings.counts):
            raise Error(
                f"class {label!r} has {counted(len(divided), 'crop')} left for "
                f"{' and '.join(settings.counts)}; add images, or take more crops of each "
                "(data.crops_per_class=NUMBER, a smaller data.crop_size=PIXELS)"
            )
        numbers = apportion(len(divided), settings.counts, min(1, len(divided)), {})
        splits = rng.permutation(np.repeat(list(numbers), list(numbers.values()))).tolist()
        for crop, split in zip(divided, splits, strict=True):
            split_crops.append(dataclasses.replace(crop, split=split))
    return split_crops
