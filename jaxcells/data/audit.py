"""The leakage audit: what a sceptical reviewer would look for in a crop set before believing it."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcells.data.arrays import SplitArrays
from jaxcells.data.crop_set import CropSet
from jaxcells.data.fields import SPLITS
from jaxcells.data.manifest import CropRecord
from jaxcells.files import Error

FEW_FIELDS = 5
_NEAR_CONSTANT = 0.005
_IMBALANCE = 2.0


@dataclasses.dataclass(frozen=True)
class Audit:
    """What the audit found.

    Attributes:
      errors: findings that make test figures worthless; training refuses.
      warnings: findings that a reader of the figures must know.
      counts: {side: {class: {"crops": n, "fields": n}}}, fields being independent groups.
      shared_pixels: {side: fraction of its pixels that training crops show too}, for val and test.
    """

    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    counts: Mapping[str, Mapping[str, Mapping[str, int]]]
    shared_pixels: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-serialisable form."""
        return dataclasses.asdict(self)

    def raise_errors(self) -> None:
        """Raises an Error that lists the findings which forbid training, if there are any."""
        if self.errors:
            raise Error(f"the audit found {len(self.errors)} errors: {'; '.join(self.errors)}")


def audit_crops(crop_set: CropSet, arrays: Mapping[str, SplitArrays]) -> Audit:
    """Looks for leaks between the sides, and for shortcuts between the classes.

    Args:
      crop_set: the crops with their manifest.
      arrays: their pixels.
    """
    records = crop_set.records
    # The study's plain random split shares fields: there that is what was asked for.
    split_crops = crop_set.settings["data.split_by"] == "crop" and not crop_set.came_split
    flat = {
        record.crop
        for split in arrays.values()
        for record, is_flat in zip(split.records, _near_constant(split.images), strict=True)
        if is_flat
    }
    shared_pixels = _shared_pixels(records, arrays["train"].images.shape[1:3])
    counts = _counts(records, crop_set.class_names)
    errors = _empty_sides(counts)
    warnings: list[str] = []

    shares_fields = split_crops and _clashes(records, lambda r: r.source, lambda r: r.split)
    if shares_fields:
        warnings.append(
            f"split_by=crop: {len(shares_fields)} images give crops to two or more sides; training "
            f"crops show {shared_pixels['val']:.1%} of the validation pixels and "
            f"{shared_pixels['test']:.1%} of the test pixels: the figures overstate how well new "
            "images are told apart"
        )
    elif not split_crops:
        for what, key in (("images", lambda r: r.source), ("groups", lambda r: r.group)):
            clashes = _clashes(records, key, lambda r: r.split)
            if clashes:
                errors.append(
                    f"{len(clashes)} {what} on two sides of the split, such as {key(clashes[0][0])}"
                )
    # Copies under other names are known by their pixels: whole images first, then crops.
    distinctive = [record for record in records if record.crop not in flat]
    image_sha256 = {name: source["sha256"] for name, source in crop_set.sources.items()}
    for what, value in (("sides of the split", lambda r: r.split), ("classes", lambda r: r.label)):
        copies = _clashes(distinctive, lambda r: image_sha256[r.source], value)
        copies = [(a, b) for a, b in copies if a.source != b.source]
        crops = _clashes(distinctive, lambda r: r.sha256, value)
        if copies and not (split_crops and "split" in what):
            first, second = copies[0]
            errors.append(
                f"{len(copies)} images are there twice, under two names on two {what}, such as "
                f"{first.source} and {second.source}; remove one of each pair"
            )
        elif crops:
            first, second = crops[0]
            errors.append(
                f"{len(crops)} crops are identical on two {what}, such as {first.crop} and "
                f"{second.crop}"
            )

    warnings += _few_fields(counts) + _imbalance(counts["train"])
    if flat:
        warnings.append(
            f"{len(flat)} of {len(records)} crops are nearly constant, such as {min(flat)}; "
            "--config.data.min_foreground=0.1 redraws empty crops"
        )
    warnings += _kinds(crop_set.field_kinds)
    return Audit(tuple(errors), tuple(warnings), counts, shared_pixels)


def describe_audit(audit: Audit, class_names: Sequence[str]) -> str:
    """Returns the audit as lines for the terminal: a table of counts, then the findings."""
    width = max(len(name[:40]) for name in (*class_names, "class"))
    lines = [f"{'class':{width}}" + "".join(f"  {side:>16}" for side in SPLITS)]
    for name in class_names:
        cells = (audit.counts[side][name] for side in SPLITS)
        lines.append(
            f"{name[:40]:{width}}" + "".join(f"  {c['crops']:>7} / {c['fields']:<6}" for c in cells)
        )
    lines.append(f"{'':{width}}  (crops / independent fields)")
    lines += [f"ERROR: {text}" for text in audit.errors]
    lines += [f"warning: {text}" for text in audit.warnings]
    if not audit.errors:
        lines.append(
            "audit passed: nothing stands on two sides of the split"
            if not any(audit.shared_pixels.values())
            else "audit passed with shared pixels, as data.split_by=crop asks for"
        )
    return "\n".join(lines)


def _clashes(
    records: Iterable[CropRecord],
    key: Callable[[CropRecord], str | None],
    value: Callable[[CropRecord], str],
) -> list[tuple[CropRecord, CropRecord]]:
    """Returns two records with different values for every key that has such."""
    first: dict[str | None, CropRecord] = {}
    clashes: dict[str | None, tuple[CropRecord, CropRecord]] = {}
    for record in records:
        other = first.setdefault(key(record), record)
        if value(other) != value(record):
            clashes.setdefault(key(record), (other, record))
    return list(clashes.values())


def _empty_sides(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    return [
        f"class {name!r} has no crops in {side}"
        for side, of_side in counts.items()
        for name, count in of_side.items()
        if not count["crops"]
    ]


def _near_constant(images: np.ndarray) -> np.ndarray:
    """Returns for each crop whether all channels' deviations are under 0.5 % of the set's range."""
    deviation = np.array([image.std(axis=(0, 1), dtype=np.float64).max() for image in images])
    span = max(float(image.max()) for image in images) - min(float(i.min()) for i in images)
    return deviation <= _NEAR_CONSTANT * span


def _shared_pixels(records: Sequence[CropRecord], shape: tuple[int, ...]) -> dict[str, float]:
    """Returns the fraction of val and test pixels that lie in a training crop of the same image."""
    height, width = shape
    by_source = collections.defaultdict(list)
    for record in records:
        by_source[record.source].append(record)
    shared, total = collections.Counter[str](), collections.Counter[str]()
    for of_source in by_source.values():
        for record in of_source:
            total[record.split] += height * width
        if len({record.split for record in of_source}) == 1:
            continue
        rows = max(record.y for record in of_source) + height
        columns = max(record.x for record in of_source) + width
        trained = np.zeros((rows, columns), bool)
        for record in of_source:
            if record.split == "train":
                trained[record.y : record.y + height, record.x : record.x + width] = True
        for record in of_source:
            window = trained[record.y : record.y + height, record.x : record.x + width]
            shared[record.split] += int(window.sum())
    return {side: shared[side] / total[side] for side in ("val", "test")}


def _counts(
    records: Sequence[CropRecord], class_names: Sequence[str]
) -> dict[str, dict[str, dict[str, int]]]:
    crops = collections.Counter((r.split, r.label) for r in records)
    groups = {(r.split, r.label, r.group) for r in records}
    fields = collections.Counter((split, label) for split, label, _ in groups)
    return {
        side: {
            name: {"crops": crops[side, name], "fields": fields[side, name]} for name in class_names
        }
        for side in SPLITS
    }


def _few_fields(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    found = []
    for side in ("val", "test"):
        few = {n: c["fields"] for n, c in counts[side].items() if c["fields"] < FEW_FIELDS}
        if few:
            listed = ", ".join(f"{name} {number}" for name, number in few.items())
            found.append(
                f"few independent fields in {side} ({listed}): crops of one field are alike, so "
                "its intervals are wide or cannot be trusted"
            )
    return found


def _imbalance(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    crops = {name: c["crops"] for name, c in counts.items()}
    most, least = max(crops, key=crops.__getitem__), min(crops, key=crops.__getitem__)
    if crops[most] <= _IMBALANCE * crops[least]:
        return []
    return [
        f"classes are unequal: {most} has {crops[most]} training crops, {least} {crops[least]}; "
        "read balanced accuracy, and consider --config.optim.class_weights=balanced"
    ]


def _kinds(field_kinds: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """Warns where classes differ in something that has nothing to do with cells."""
    found = []
    for kind in next(iter(field_kinds.values())):
        shares = {
            label: {v: n / sum(kinds[kind].values()) for v, n in kinds[kind].items()}
            for label, kinds in field_kinds.items()
        }
        values = {value for share in shares.values() for value in share}
        spread = {
            value: max(s.get(value, 0) for s in shares.values())
            - min(s.get(value, 0) for s in shares.values())
            for value in values
        }
        if max(spread.values()) > 0.25:
            listed = "; ".join(
                f"{label}: {', '.join(kinds[kind])}" for label, kinds in field_kinds.items()
            )
            found.append(
                f"classes differ in {kind} ({listed}): a shortcut by which a network can tell them "
                "apart without looking at cells"
            )
    return found
