"""Who goes to train, val and test: whole groups, so that nothing stands on two sides.

A group is a field of view, a channel, or whatever a regular expression finds in the path (a plate,
a patient, a day). Crops of one group share illumination, density and often the very cells; a split
through them measures memory, not recognition.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxcells.data.fields import Field
from jaxcells.data.rng import named_generator
from jaxcells.files import Error

_ATTEMPTS = 2000


def with_groups(fields: Sequence[Field], split_by: str) -> list[Field]:
    """Sets the group of every field.

    Args:
      fields: what `find_fields` found.
      split_by: "field" or "crop": each field is its own group. "channel": the channel of its class.
        Anything else: a regular expression, searched in the path below the root; its group 1 is the
        group, shared by all classes in which it occurs.

    Raises:
      Error: the expression is not valid, has no group 1, or does not match a path.
    """
    if split_by in ("field", "crop"):
        return [dataclasses.replace(field, group=field.name) for field in fields]
    if split_by == "channel":
        return [
            dataclasses.replace(field, group=f"{field.label}/{field.channel}") for field in fields
        ]
    pattern = compile_group_pattern(split_by)
    grouped = []
    for field in fields:
        match = pattern.search(field.name)
        if match is None or not match.group(1):
            raise Error(
                f"{field.path}: data.split_by={split_by!r} does not match {field.name!r}; the "
                "expression must find its group 1 in the path of every image below data.root"
            )
        grouped.append(dataclasses.replace(field, group=match.group(1)))
    return grouped


def compile_group_pattern(split_by: str) -> re.Pattern[str]:
    """Compiles a regular expression for `split_by` and checks that it has a group 1.

    Raises:
      Error: it does not compile or has no group.
    """
    known = '"field", "channel", "crop" or a regular expression whose group 1 is the group'
    try:
        pattern = re.compile(split_by)
    except re.error as error:
        raise Error(
            f"data.split_by={split_by!r} is not a valid expression ({error}); use {known}"
        ) from error
    if pattern.groups < 1:
        raise Error(
            f"data.split_by={split_by!r} is none of {known}: it has no group in parentheses"
        )
    return pattern


def allot(
    fields: Sequence[Field], counts: Mapping[str, int], *, split_by: str, seed: int
) -> dict[str, str]:
    """Allots whole groups to the sides at random, in the ratio of the counts.

    Every class gets at least one group on each side that has a count. Fields are allotted channel
    by channel where channels have enough of them, so that each side sees each channel.

    Args:
      fields: usable fields with their groups set.
      counts: crops (or their ratio) for each side, such as {"train": 754, "val": 100, "test": 100}.
      split_by: the policy, named in errors; decides whether channels are strata.
      seed: the run's seed.

    Returns:
      The side of every group.

    Raises:
      Error: a class has fewer groups than there are sides.
    """
    sides = [side for side, count in counts.items() if count > 0]
    _check_enough_groups(fields, len(sides), split_by)
    if split_by == "field":
        return _allot_by_channel(fields, counts, seed)
    allotted: dict[str, str] = {}
    for members in _connected_groups(fields):
        allotted |= _allot_jointly(members, counts, split_by, seed)
    return allotted


def _allot_by_channel(
    fields: Sequence[Field], counts: Mapping[str, int], seed: int
) -> dict[str, str]:
    sides = [side for side, count in counts.items() if count > 0]
    allotted: dict[str, str] = {}
    for label in sorted({field.label for field in fields}):
        strata = collections.defaultdict(list)
        of_class = [field for field in fields if field.label == label]
        per_channel = collections.Counter(field.channel for field in of_class)
        for field in of_class:
            # Channels too small to reach every side are allotted together.
            large = per_channel[field.channel] >= len(sides)
            strata[field.channel if large else None].append(field.group)
        large_channels = any(channel is not None for channel in strata)
        given: collections.Counter[str] = collections.Counter()
        for channel in sorted(strata, key=str):
            minimum = 1 if channel is not None or not large_channels else 0
            rng = named_generator(seed, "allot", label, channel)
            sides_of = _cut(strata[channel], counts, minimum, rng, given)
            given.update(sides_of.values())
            allotted |= sides_of
    return allotted


def _allot_jointly(
    fields: list[Field], counts: Mapping[str, int], split_by: str, seed: int
) -> dict[str, str]:
    """Allots groups that share classes with one another, until every class is on every side."""
    sides = [side for side, count in counts.items() if count > 0]
    labels = sorted({field.label for field in fields})
    groups = sorted({field.group for field in fields})
    rng = named_generator(seed, "allot", *labels)

    def reaches_every_side(allotted: Mapping[str, str]) -> bool:
        reached = {(field.label, allotted[field.group]) for field in fields}
        return len(reached) == len(labels) * len(sides)

    for _ in range(_ATTEMPTS):
        allotted = _cut(groups, counts, 1, rng)
        if reaches_every_side(allotted):
            return allotted
    # Where the ratio leaves no way, any numbers of groups do; the most for the first side is best.
    others = [
        dict(zip(groups, rng.choice(sides, len(groups)).tolist(), strict=True))
        for _ in range(_ATTEMPTS)
    ]
    possible = [allotted for allotted in others if reaches_every_side(allotted)]
    if possible:
        return max(possible, key=lambda allotted: list(allotted.values()).count(sides[0]))
    raise Error(
        f"data.split_by={split_by!r}: found no way to give each of the classes "
        f"{', '.join(labels)} a group on every side, with {len(groups)} groups shared between "
        "them; use a finer group or --config.data.split_by=field"
    )


def _cut(
    groups: Sequence[str],
    counts: Mapping[str, int],
    minimum: int,
    rng: np.random.Generator,
    given: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Shuffles groups and cuts them into sides in the ratio of the counts."""
    order = rng.permutation(sorted(groups)).tolist()
    numbers = apportion(len(order), counts, minimum, given or {})
    sides = np.repeat(list(numbers), list(numbers.values())).tolist()
    return dict(zip(order, sides, strict=True))


def apportion(
    total: int, counts: Mapping[str, int], minimum: int, given: Mapping[str, int]
) -> dict[str, int]:
    """Divides `total` groups over the sides in the ratio of the counts.

    What whole numbers leave over goes to val and test before train: intervals are only as narrow
    as their independent groups allow.

    Args:
      total: number of groups.
      counts: the ratio; a side with 0 gets 0.
      minimum: the least that every other side gets, if `total` allows it for all.
      given: what the sides have from earlier strata; the ratio is that of the sums.
    """
    whole = total + sum(given.values())
    quota = {
        side: count / sum(counts.values()) * whole - given.get(side, 0)
        for side, count in counts.items()
    }
    share = {side: max(int(quota[side]), minimum if counts[side] else 0) for side in counts}
    while sum(share.values()) < total:
        rest = {side: quota[side] - share[side] for side in counts}
        held_out = [side for side in ("test", "val") if rest.get(side, 0) > 1e-9]
        share[max(held_out or rest, key=rest.__getitem__)] += 1
    while sum(share.values()) > total:
        excess = {s: share[s] - quota[s] for s in counts if share[s] > minimum}
        share[max(excess, key=excess.__getitem__)] -= 1
    return share


def _connected_groups(fields: Sequence[Field]) -> list[list[Field]]:
    """Divides fields into sets that share neither a class nor a group."""
    component: dict[str, str] = {}

    def find(node: str) -> str:
        while component.setdefault(node, node) != node:
            node = component[node]
        return node

    for field in fields:
        component[find(f"group {field.group}")] = find(f"class {field.label}")
    members = collections.defaultdict(list)
    for field in fields:
        members[find(f"class {field.label}")].append(field)
    return list(members.values())


def _check_enough_groups(fields: Sequence[Field], num_sides: int, split_by: str) -> None:
    def fewest(policy: str) -> tuple[int, str]:
        groups: dict[str, set[str]] = collections.defaultdict(set)
        for field in with_groups(fields, policy):
            groups[field.label].add(field.group)
        return min((len(names), label) for label, names in groups.items())

    number, label = fewest(split_by)
    if number < num_sides:
        others = [p for p in ("field", "channel") if fewest(p)[0] >= num_sides] + ["crop"]
        unit = split_by if split_by in ("field", "channel") else f"group of {split_by!r}"
        raise Error(
            f"class {label!r} has {number} {unit}{'s' if number != 1 else ''} and needs at least "
            f"{num_sides}, one for each side of the split; add images or use "
            + " or ".join(f"--config.data.split_by={policy}" for policy in others)
            + ("" if "field" in others else " (crops of one field then stand on several sides)")
        )
