"""Draws random crops from fields: which field, where, and on which side of the split."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxcells.data.fields import SPLITS, Field, num_positions
from jaxcells.data.foreground import foreground_fraction, foreground_map
from jaxcells.data.images import read_image
from jaxcells.data.parallel import parallel_map
from jaxcells.data.rng import named_generator
from jaxcells.data.splits import allot
from jaxcells.files import Error

Border = tuple[int, int, int, int]


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
    fields: Sequence[Field],
    counts: Mapping[str, int],
    size: int | None,
    *,
    seed: int,
    split_by: str = "field",
    border: Border = (0, 0, 0, 0),
    min_foreground: float = 0.0,
    plane: str = "",
) -> list[Crop]:
    """Draws crops at random through the channels of every class.

    On each side of the split every channel of a class gives an equal share (to within one crop),
    and every field within a channel likewise. Positions are uniform over a field and distinct. The
    positions in a field follow from (seed, class, field name) alone: neither the order of listing
    nor other classes change them, and a larger share begins with the same positions.

    Args:
      fields: usable fields with groups set (`usable_fields`, `with_groups`).
      counts: exact number of crops per class on each side; with `size=None`, their ratio.
      size: side of a crop in pixels; None: every image is one crop.
      seed: the run's seed.
      split_by: policy of the split, see `allot`. "crop" draws first and splits the crops at random,
        as the reference study did.
      border: pixels left out at the (top, right, bottom, left), such as a burnt-in scale bar.
      min_foreground: crops with a smaller fraction of foreground are redrawn, see `foreground`.
      plane: which plane of a stack to read, see `read_image`.

    Returns:
      The crops, ordered by split, class and field name.

    Raises:
      Error: too few groups for the policy, too few distinct positions, or too little foreground.
    """
    fields = sorted(fields, key=lambda field: field.name)
    came_split = all(field.split is not None for field in fields)
    split_crops = split_by == "crop" and not came_split

    side_of: dict[str, str] = {}
    if came_split:
        side_of = {field.name: field.split or "" for field in fields}
    elif not split_crops or size is None:
        # Used whole, an image is a crop: to split crops is to split images.
        side_of_group = allot(
            fields,
            counts,
            split_by="field" if size is None and split_crops else split_by,
            seed=seed,
        )
        side_of = {field.name: side_of_group[field.group] for field in fields}

    if size is None:
        crops = [Crop(field, 0, 0, side_of[field.name]) for field in fields]
    else:
        shares = _shares(fields, side_of, counts, seed)

        def draw(field: Field) -> list[tuple[int, int]]:
            return _positions(field, shares[field.name], size, seed, border, min_foreground, plane)

        if min_foreground > 0:
            positions = parallel_map(draw, fields, title="looking for foreground")
        else:
            positions = [draw(field) for field in fields]
        drawn = [(f, y, x) for f, places in zip(fields, positions, strict=True) for y, x in places]
        if split_crops:
            crops = _split_at_random(drawn, counts, seed)
        else:
            crops = [Crop(field, y, x, side_of[field.name]) for field, y, x in drawn]
    return sorted(
        crops, key=lambda c: (SPLITS.index(c.split), c.field.label, c.field.name, c.y, c.x)
    )


def _shares(
    fields: Sequence[Field], side_of: Mapping[str, str], counts: Mapping[str, int], seed: int
) -> dict[str, int]:
    """Returns how many crops each field gives: equal over channels, then over their fields.

    A remainder goes to the channels, and in them to the fields, that gave least so far, in an order
    shuffled by the seed.
    """
    shares: dict[str, int] = {}
    for label in sorted({field.label for field in fields}):
        of_class = [field for field in fields if field.label == label]
        shuffled = named_generator(seed, "shares", label).permutation(len(of_class))
        rank = {of_class[i].name: n for n, i in enumerate(shuffled)}
        given: collections.Counter[str] = collections.Counter()
        quotas = counts if side_of else {"": sum(counts.values())}
        for side, total in quotas.items():
            channels = collections.defaultdict(list)
            for field in of_class:
                if side_of.get(field.name, "") == side:
                    channels[field.channel].append(field.name)
            if not channels:
                raise Error(
                    f"class {label!r} has no image large enough for a crop in {side}; add one, or "
                    "put the classes directly below the image folder to have them split"
                )
            names = sorted(channels, key=lambda c: (given[c], min(rank[n] for n in channels[c])))
            for channel, channel_share in zip(names, _equal(total, len(names)), strict=True):
                given[channel] += channel_share
                members = sorted(channels[channel], key=rank.__getitem__)
                shares |= dict(zip(members, _equal(channel_share, len(members)), strict=True))
    return shares


def _equal(total: int, number: int) -> list[int]:
    return [total // number + (i < total % number) for i in range(number)]


def _positions(
    field: Field,
    number: int,
    size: int,
    seed: int,
    border: Border,
    min_foreground: float,
    plane: str,
) -> list[tuple[int, int]]:
    """Draws `number` distinct positions (y, x), uniform over the field inside its border."""
    capacity = num_positions(field.info, size, border)
    if number > capacity:
        raise Error(
            f"{field.path}: {number} crops of {size}x{size} are to come from this image of "
            f"{field.info.height}x{field.info.width}, and only {capacity} distinct ones fit; lower "
            "--config.data.crops_per_class (and data.split), use a smaller "
            "--config.data.crop_size, "
            f"or add images to class {field.label!r}"
        )
    top, right, _, left = border
    columns = field.info.width - left - right - size + 1
    rng = named_generator(seed, "positions", field.label, field.name)
    sampler = _distinct(rng, capacity, number if min_foreground <= 0 else capacity)
    places: list[tuple[int, int]] = []
    if min_foreground <= 0:
        for index in sampler:
            places.append((top + index // columns, left + index % columns))
        return places

    textured = foreground_map(read_image(field.path, plane=plane))
    tried, best = 0, 0.0
    # A field with hardly any cells would otherwise be searched pixel by pixel.
    for index in sampler:
        if len(places) == number or tried >= 100 * number + 1000:
            break
        y, x = top + index // columns, left + index % columns
        fraction = foreground_fraction(textured, y, x, size)
        tried, best = tried + 1, max(best, fraction)
        if fraction >= min_foreground:
            places.append((y, x))
    if len(places) < number:
        raise Error(
            f"{field.path}: only {len(places)} of {tried} random crops have the foreground that "
            f"data.min_foreground={min_foreground:g} asks for, and {number} are needed (the "
            f"fullest has {best:.2f}); lower --config.data.min_foreground or take this image out"
        )
    return places


def _distinct(rng: np.random.Generator, capacity: int, number: int) -> Iterator[int]:
    """Yields up to `number` distinct integers below `capacity`, uniformly.

    The first n of them are the same for every `number`.
    """
    seen: set[int] = set()
    # Rejection is quick until most are taken; the few then left are shuffled.
    while len(seen) < min(number, (capacity + 1) // 2):
        index = int(rng.integers(capacity))
        if index not in seen:
            seen.add(index)
            yield index
    if len(seen) < number:
        rest = np.setdiff1d(np.arange(capacity), np.fromiter(seen, int, len(seen)))
        yield from map(int, rng.permutation(rest)[: number - len(seen)])


def _split_at_random(
    drawn: Sequence[tuple[Field, int, int]], counts: Mapping[str, int], seed: int
) -> list[Crop]:
    crops = []
    for label in sorted({field.label for field, _, _ in drawn}):
        of_class = [place for place in drawn if place[0].label == label]
        sides = np.repeat(list(counts), list(counts.values()))
        sides = named_generator(seed, "split", label).permutation(sides).tolist()
        crops += [Crop(*place, side) for place, side in zip(of_class, sides, strict=True)]
    return crops
