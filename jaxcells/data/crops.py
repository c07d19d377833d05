"""Draws random crops from fields: which field, where, and for which split."""

import collections
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
from jaxcells.data.splits import allot
from jaxcells.files import Error


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

    @property
    def counts(self) -> dict[str, int]:
        """Crops per class for each split, by name."""
        return dict(zip(SPLITS, self.split, strict=True))


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

    Args:
      fields: usable fields with groups set (`usable_fields`, `with_groups`).
      settings: how many crops of what size, and how they are split.
      places: where crops may lie, see `find_cells`; None: anywhere inside the border.

    Raises:
      Error: too few groups for the policy, too few distinct positions, or too little foreground.
    """
    fields = sorted(fields, key=lambda field: field.name)
    split_of = _split_of_fields(fields, settings)
    if not settings.crop_size:
        return [Crop(field, 0, 0, split_of[field.name]) for field in fields]
    if settings.crops_per_class != "all":
        shares = _shares(fields, split_of, settings)
    elif places:
        shares = {field.name: len(places[field.name]) for field in fields}
    else:
        size, border = settings.crop_size, settings.border
        shares = {f.name: num_positions(f.info, size, border, step=size) for f in fields}

    def draw(field: Field) -> list[Crop]:
        number, split = shares[field.name], split_of.get(field.name, "")
        if places:
            rng = named_generator(settings.seed, "cells", field.label, field.name)
            found = rng.permutation(places[field.name])[:number].tolist()
        else:
            found = _positions(field, number, settings)
        return [Crop(field, y, x, split) for y, x in found]

    crops = [c for drawn in parallel_map(draw, fields, title="drawing crops") for c in drawn]
    return crops if split_of else _split_at_random(crops, settings)


def _split_of_fields(fields: Sequence[Field], settings: CropSettings) -> dict[str, str]:
    """Returns the split of every field by name, or nothing where crops are split instead."""
    came = {field.name: field.split for field in fields if field.split}
    counts = {name: n for name, n in settings.counts.items() if name not in came.values()}
    if settings.split_by == "crop" and settings.crop_size and not came:
        return {}
    # Used whole, an image is a crop: to split crops is to split images.
    split_by = "field" if settings.split_by == "crop" else settings.split_by
    rest = [field for field in fields if not field.split]
    split_of = allot(rest, counts, split_by=split_by, seed=settings.seed) if rest else {}
    return came | {field.name: split_of[field.group] for field in rest}


def _shares(
    fields: Sequence[Field], split_of: Mapping[str, str], settings: CropSettings
) -> dict[str, int]:
    """Returns how many crops each field gives: equal over channels, then over their fields.

    A remainder goes to the channels, and in them to the fields, that gave least so far, in an order
    shuffled by the seed.
    """
    shares: dict[str, int] = {}
    quotas = settings.counts if split_of else {"": sum(settings.split)}
    for label in sorted({field.label for field in fields}):
        of_class = [field for field in fields if field.label == label]
        order = named_generator(settings.seed, "shares", label).permutation(len(of_class))
        given: collections.Counter[str] = collections.Counter()
        for split, total in quotas.items():
            channels = collections.defaultdict(list)
            for field in (of_class[i] for i in order):
                if split_of.get(field.name, "") == split:
                    channels[field.channel].append(field.name)
            if not channels:
                raise Error(
                    f"class {label!r} has no image large enough for a crop in {split}; add one, or "
                    "put the classes directly below the image folder to have them split"
                )
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
    full: list[tuple[int, int]] = []
    best = 0.0
    # A field with hardly any cells would otherwise be searched pixel by pixel.
    for y, x in itertools.islice(places, 100 * number + 1000):
        fraction = foreground_fraction(foreground, y, x, size, size)
        best = max(best, fraction)
        if fraction >= least:
            full.append((y, x))
        if len(full) == number:
            return full
    raise Error(
        f"{field.path}: {number} crops with the foreground that data.min_foreground={least:g} asks "
        f"for are needed, and {len(full)} were found (the fullest has {best:.2f}); lower "
        "data.min_foreground or take this image out"
    )


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
    """Gives each crop a split of its own: exact numbers per class, or in that ratio."""
    split_crops = []
    for label in sorted({crop.field.label for crop in crops}):
        of_class = [crop for crop in crops if crop.field.label == label]
        rng = named_generator(settings.seed, "split", label)
        places = np.arange(len(of_class)) * sum(settings.split) // len(of_class)
        splits = rng.permutation(np.repeat(SPLITS, settings.split)[places]).tolist()
        for crop, split in zip(of_class, splits, strict=True):
            split_crops.append(dataclasses.replace(crop, split=split))
    return split_crops
