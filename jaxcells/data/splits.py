"""Who goes to train, val and test: whole groups, so that nothing stands in two splits.

A group is a field of view, a channel, or whatever a regular expression finds in the path (a plate,
a patient, a day). Crops of one group share illumination, density and often the very cells; dividing
them measures memory, not recognition.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxcells.data.fields import Field
from jaxcells.data.rng import named_generator
from jaxcells.files import Error
from jaxcells.text import counted, some

_ATTEMPTS = 2000
_FOLD = re.compile(r"([1-9]\d*)/([2-9]|[1-9]\d+|0|batch)( all)?")


def with_groups(fields: Sequence[Field], split_by: str, key: str = "data.split_by") -> list[Field]:
    """Sets the group of every field.

    Args:
      fields: what `find_fields` found.
      split_by: "field" or "crop": each field is its own group. "channel": the channel of its class.
        Anything else: a regular expression, searched in the path below the root; its group 1 is the
        group, shared by all classes in which it occurs.
      key: of the config, named in errors.

    Raises:
      Error: the expression finds no group 1 in a path.
    """
    if split_by in ("field", "crop"):
        groups = [field.name for field in fields]
    elif split_by == "channel":
        groups = [f"{field.label}/{field.channel}" for field in fields]
    else:
        groups = find_groups([field.name for field in fields], split_by, key)
    return [dataclasses.replace(f, group=group) for f, group in zip(fields, groups, strict=True)]


def find_groups(sources: Sequence[str], pattern: str, key: str) -> list[str]:
    """Returns the group of every image, or its batch (plate, day, donor); "" without a pattern.

    Args:
      sources: paths below the image folder, as in the manifest.
      pattern: regular expression, searched in them; its group 1 names the group. Or empty.
      key: of the config, named in errors.

    Raises:
      Error: it finds no group 1 in a path.
    """
    if not pattern:
        return [""] * len(sources)
    matches = map(re.compile(pattern).search, sources)
    groups = [match[1] or "" if match else "" for match in matches]
    if missing := [s for s, group in zip(sources, groups, strict=True) if not group]:
        raise Error(f"{key}={pattern!r} finds no group 1 in the path of {some(sorted({*missing}))}")
    return groups


def allot(
    fields: Sequence[Field], counts: Mapping[str, int], *, split_by: str, seed: int | str
) -> dict[str, str]:
    """Allots whole groups to the splits at random, in the ratio of the counts.

    Every class gets at least one group in each split. Fields are allotted channel by channel where
    channels have enough of them, so that each split sees each channel.

    Args:
      fields: usable fields with their groups set.
      counts: crops (or their ratio) for each split, such as {"train": 754, "val": 100, "test":
        100}; each 1 or more.
      split_by: the policy, named in errors; decides whether channels are strata.
      seed: the run's seed; with a word behind it, for draws that are independent of others.

    Returns:
      The split of every group.

    Raises:
      Error: a class has fewer groups than there are splits, or they are shared with other classes
        in such a way that some split gets none.
    """
    allotted: dict[str, str] = {}
    if fields:
        _check_enough_groups(fields, len(counts), split_by)
    for connected in _connected_fields(fields):
        if split_by == "field":  # each a group of its own: those of one class
            allotted |= _allot_by_channel(connected, counts, seed)
        else:
            allotted |= _allot_jointly(connected, counts, split_by, seed)
    return allotted


def parse_fold(text: str) -> tuple[int, str, bool]:
    """Reads `data.fold`, such as "2/5", "2/0", "2/batch" or "2/5 all".

    Returns:
      Which fold, from 1; of how many, "0" for one of each group and "batch" for one of each batch;
      and whether all fields are tested by some fold, and no test split is set aside.

    Raises:
      Error: it names no fold.
    """
    match = _FOLD.fullmatch(text)
    if not match:
        raise Error(
            f"data.fold={text!r} must be such as 2/5 (the second of five), 2/0 (the second group) "
            "or 2/batch (the second batch), with ' all' behind it if no test split is set aside"
        )
    return int(match[1]), match[2], bool(match[3])


def allot_folds(
    fields: Sequence[Field], of: str, *, split_by: str, batch_by: str, seed: int
) -> dict[str, int]:
    """Allots whole groups to folds: each is tested by one of them, and every class trains in all.

    Args:
      fields: what is to be tested, with their groups set.
      of: see `parse_fold`. Of a number of folds each tests every class, and they are as equal as
        whole groups allow; otherwise each tests a group or a batch, in the order of their names.
      split_by: the policy of the groups.
      batch_by: what finds the batch of a field, as `split_by` finds groups.
      seed: the run's seed.

    Returns:
      The fold of every group, from 1.

    Raises:
      Error: a class has too few groups or batches, or a group is in two batches.
    """
    units = with_groups(fields, batch_by, "data.batch_by") if of == "batch" else fields
    number, label = _fewest_groups(units)
    needed = 2 if of in ("0", "batch") else int(of)
    if number < needed:
        what = "batches" if of == "batch" else f"groups (data.split_by={split_by})"
        fewer = f", or use folds={number} or folds=0 (each left out once)" if number > 1 else ""
        raise Error(
            f"class {label!r} has {number} {what} to test, and {needed} are needed; add images"
            f"{fewer}"
        )
    if of not in ("0", "batch"):
        counts = dict.fromkeys(map(str, range(1, needed + 1)), 1)
        allotted = allot(fields, counts, split_by=split_by, seed=f"{seed} folds")
        return {group: int(fold) for group, fold in allotted.items()}
    names = sorted({unit.group for unit in units})
    fold_of: dict[str, int] = {}
    for field, unit in zip(fields, units, strict=True):
        if fold_of.setdefault(field.group, fold := names.index(unit.group) + 1) != fold:
            raise Error(f"group {field.group!r} (data.split_by={split_by}) is in two batches")
    return fold_of


def _allot_by_channel(
    fields: Sequence[Field], counts: Mapping[str, int], seed: int | str
) -> dict[str, str]:
    """Allots the fields of one class, each a group of its own."""
    num_fields = collections.Counter(field.channel for field in fields)
    strata = collections.defaultdict(list)
    for field in fields:
        # Channels too small to reach every split are allotted together.
        large = num_fields[field.channel] >= len(counts)
        strata[field.channel if large else None].append(field.group)
    allotted: dict[str, str] = {}
    for channel in sorted(strata, key=str):
        minimum = 0 if channel is None and len(strata) > 1 else 1
        rng = named_generator(seed, "allot", fields[0].label, channel)
        given = collections.Counter(allotted.values())
        numbers = apportion(len(strata[channel]), counts, minimum, given)
        allotted |= _cut(strata[channel], numbers, rng)
    return allotted


def _allot_jointly(
    fields: Sequence[Field], counts: Mapping[str, int], split_by: str, seed: int | str
) -> dict[str, str]:
    """Allots groups that share classes with one another, until every class is in every split."""
    labels = sorted({field.label for field in fields})
    groups = sorted({field.group for field in fields})
    rng = named_generator(seed, "allot", *labels)

    def reaches_every_split(allotted: Mapping[str, str]) -> bool:
        reached = {(field.label, allotted[field.group]) for field in fields}
        return len(reached) == len(labels) * len(counts)

    numbers = apportion(len(groups), counts, 1, {})
    cuts = (_cut(groups, numbers, rng) for _ in range(_ATTEMPTS))
    if allotted := next(filter(reaches_every_split, cuts), None):
        return allotted
    # The ratio leaves no way. Of any other numbers, the most for training are best; of folds, which
    # are none of them for training, the most equal.
    draws = (rng.choice(list(counts), len(groups)).tolist() for _ in range(_ATTEMPTS))
    others = (dict(zip(groups, splits, strict=True)) for splits in draws)
    if possible := list(filter(reaches_every_split, others)):
        sizes = [collections.Counter(allotted.values()) for allotted in possible]
        ranks = [(size["train"], -max(size.values())) for size in sizes]
        return possible[ranks.index(max(ranks))]
    raise Error(
        f"data.split_by={split_by!r}: found no way to give each of the classes {some(labels)} "
        f"a group in every split, with {len(groups)} groups shared between them; use a finer "
        "group or data.split_by=field"
    )


def _cut(
    groups: Sequence[str], numbers: Mapping[str, int], rng: np.random.Generator
) -> dict[str, str]:
    """Shuffles groups and gives so many to each split."""
    splits = np.repeat(list(numbers), list(numbers.values())).tolist()
    return dict(zip(rng.permutation(sorted(groups)).tolist(), splits, strict=True))


def apportion(
    total: int, counts: Mapping[str, int], minimum: int, given: Mapping[str, int]
) -> dict[str, int]:
    """Divides `total` groups over the splits in the ratio of the counts.

    What whole numbers leave over goes to val and test before train: intervals are only as narrow
    as their independent groups allow.

    Args:
      total: number of groups.
      counts: the ratio.
      minimum: the least that every split gets, if `total` allows it for all.
      given: what the splits have from earlier strata; the ratio is that of the sums.
    """
    whole, parts = total + sum(given.values()), sum(counts.values())
    quota = {name: count / parts * whole - given.get(name, 0) for name, count in counts.items()}
    share = {split: max(int(quota[split]), minimum) for split in counts}
    while sum(share.values()) < total:
        rest = {split: quota[split] - share[split] for split in counts}
        held_out = [split for split in ("test", "val") if rest.get(split, 0) > 1e-9]
        share[max(held_out or rest, key=rest.__getitem__)] += 1
    while sum(share.values()) > total:
        excess = {split: share[split] - quota[split] for split in counts if share[split] > minimum}
        share[max(excess, key=excess.__getitem__)] -= 1
    return share


def _connected_fields(fields: Sequence[Field]) -> list[list[Field]]:
    """Divides fields into sets that share neither a class nor a group."""
    connected: list[list[Field]] = []
    for label in sorted({field.label for field in fields}):
        members = [field for field in fields if field.label == label]
        for others in list(connected):
            if {field.group for field in members} & {field.group for field in others}:
                members += others
                connected.remove(others)
        connected.append(members)
    return connected


def _check_enough_groups(fields: Sequence[Field], num_splits: int, split_by: str) -> None:
    number, label = _fewest_groups(fields)
    if number < num_splits:
        unit = split_by if split_by in ("field", "channel") else "group"
        finer = "" if split_by == "field" else ", or use data.split_by=field"
        # With two, each can be tested by what was trained on the other.
        folds = ", or run `cross_validate` with keep_test=False, for which two are enough"
        raise Error(
            f"data.split_by={split_by}: class {label!r} has {counted(number, unit)} and "
            f"needs at least {num_splits}, one for each split; add images"
            f"{finer}{folds if number > 1 else ''}"
        )


def num_groups(fields: Sequence[Field]) -> collections.Counter[str]:
    """Returns how many groups each class has."""
    return collections.Counter(label for label, _ in {(f.label, f.group) for f in fields})


def _fewest_groups(fields: Sequence[Field]) -> tuple[int, str]:
    return min((number, label) for label, number in num_groups(fields).items())
