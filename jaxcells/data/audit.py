"""The leakage audit: what a sceptical reviewer would look for in a crop set before believing it."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxcells.data.arrays import SplitArrays
from jaxcells.data.crop_set import CropRecord, CropSet
from jaxcells.data.fields import SPLITS
from jaxcells.data.parallel import parallel_map
from jaxcells.data.splits import find_groups
from jaxcells.files import Error
from jaxcells.text import digits, shortened, some, text_table

Counts = Mapping[str, Mapping[str, Mapping[str, int]]]

_FEW_FIELDS = 5
_NEAR_CONSTANT = 0.005
_IMBALANCE = 2.0
_DIFFERENT = 0.25
_RANGE_RATIO = 8  # 16-bit beside 12-bit pixels are 16-fold


@dataclasses.dataclass(frozen=True)
class Audit:
    """What the audit found.

    Attributes:
      errors: findings that make test figures worthless; training refuses.
      warnings: findings that a reader of the figures must know.
      counts: {split: {class: {"crops": n, "fields": n}}}, fields being independent groups.
      shared_pixels: {split: fraction of its pixels that training crops show too}, for val and test.
    """

    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    counts: Counts
    shared_pixels: Mapping[str, float]

    def raise_errors(self) -> None:
        """Raises an Error that lists the findings which forbid training, if there are any."""
        if self.errors:
            raise Error(f"the audit found {len(self.errors)} errors: {'; '.join(self.errors)}")


def audit_crops(crop_set: CropSet, arrays: Mapping[str, SplitArrays]) -> Audit:
    """Looks for leaks between the splits, and for shortcuts between the classes.

    Batches and classes are confounded where a batch lacks a class, for a network may then learn the
    batch. The groups of an expression as `split_by` are looked at as batches are, if they have five
    images each: those are plates or days, smaller ones rather the pictures of a field.

    Args:
      crop_set: the crops with their manifest.
      arrays: their pixels.

    Raises:
      Error: `batch_by` of the settings does not fit the paths.
    """
    records = crop_set.records
    names = crop_set.class_names
    counts = {split: count_crops(crop_set.split(split), names) for split in SPLITS}
    warnings, is_fold = [], bool(crop_set.settings.fold)
    errors = [
        f"class {name!r} has no crops in {split}"
        for split in SPLITS[: 2 if is_fold else 3]  # a fold need not test every class
        for name, count in counts[split].items()
        if not count["crops"]
    ]
    if not all(split.records for split in arrays.values()):
        return Audit(tuple(errors), (), counts, {"val": 0, "test": 0})
    shared_pixels = _shared_pixels(records, arrays["train"].images.shape[1:3])
    flat = {record.crop for split in arrays.values() for record in _near_constant(split)}

    if is_fold:
        # With one group of a class to train on, train and val share it: no figure rests on that.
        if shared := _clashes(records, [record.group for record in records], "split"):
            warnings.append(
                f"{len(shared)} groups give crops to train and val of this fold, too few to part "
                f"them, such as {shared[0][0].group}: only the choice of the epoch rests on that"
            )
        records = tuple(
            dataclasses.replace(r, split="train") if r.split == "val" else r for r in records
        )
    # The study's plain random split shares fields: there that is what was asked for.
    split_crops = crop_set.split_by == "crop" and not crop_set.came_split
    clashes = _clashes(records, [record.group for record in records], "split")
    if clashes and not split_crops:
        errors.append(f"{len(clashes)} groups in two splits, such as {clashes[0][0].group}")
    elif clashes:
        warnings.append(
            f"data.split_by=crop: {len(clashes)} images give crops to two or more splits; training "
            f"crops show {shared_pixels['val']:.1%} of the validation pixels and "
            f"{shared_pixels['test']:.1%} of the test pixels: the figures overstate how well new "
            "images are told apart"
        )
    # Copies under other names are known by their pixels: whole images first, then crops.
    distinctive = [record for record in records if record.crop not in flat]
    images = [crop_set.sources[record.source]["sha256"] for record in distinctive]
    pixels = [record.sha256 for record in distinctive]
    for what, attribute in (("splits", "split"), ("classes", "label")):
        clashes = _clashes(distinctive, images, attribute)
        copies = [(a.source, b.source) for a, b in clashes if a.source != b.source]
        same_crops = [(a.crop, b.crop) for a, b in _clashes(distinctive, pixels, attribute)]
        if copies and not (split_crops and what == "splits"):
            errors.append(
                f"{len(copies)} images are there twice, under two names in two {what}, such as "
                f"{' and '.join(copies[0])}; remove one of each pair"
            )
        elif same_crops:
            example = " and ".join(same_crops[0])
            errors.append(f"{len(same_crops)} crops are identical in two {what}, such as {example}")

    if flat:
        warnings.append(
            f"{len(flat)} of {len(records)} crops are nearly constant, such as {min(flat)}; "
            f"a data.min_foreground above {crop_set.settings.min_foreground:g} redraws empty crops"
        )
    for split in SPLITS[: 1 if is_fold else 3]:  # its others are few by design, and pooled
        fields = {name: count["fields"] for name, count in counts[split].items()}
        if few := [f"{name} {number}" for name, number in fields.items() if number < _FEW_FIELDS]:
            trust = "its intervals are wide or cannot be trusted"
            if split == "train":
                trust = "what is learnt of these classes rests on so many"
            what = f"few independent fields in {split} ({some(few)})"
            warnings.append(f"{what}: crops of one field are alike, so {trust}")
    crops = {name: count["crops"] for name, count in counts["train"].items()}
    most, least = max(crops, key=crops.__getitem__), min(crops, key=crops.__getitem__)
    if crops[most] > _IMBALANCE * crops[least]:
        warnings.append(
            f"classes are unequal: {most} has {crops[most]} training crops, {least} "
            f"{crops[least]}; read balanced accuracy, and consider optim.class_weights=balanced"
        )
    warnings += _shortcuts(crop_set.field_kinds)
    labels, groups, sources = zip(*((r.label, r.group, r.source) for r in records), strict=True)
    batches = find_groups(sources, crop_set.settings.batch_by, "data.batch_by")
    warnings += _confounded("data.batch_by: batches", batches, labels)
    if len(set(sources)) >= _FEW_FIELDS * len(set(groups)):
        warnings += _confounded(
            f"data.split_by={crop_set.settings.split_by}: groups", groups, labels
        )
    warnings += _ranges(arrays["train"])
    return Audit(tuple(errors), tuple(warnings), counts, shared_pixels)


def describe_audit(audit: Audit, class_names: Sequence[str]) -> str:
    """Returns the audit as lines for the terminal: a table of counts, then the findings."""
    rows = []
    for name in class_names:
        cells = [audit.counts[split][name] for split in SPLITS]
        rows.append([shortened(name, 40), *(f"{c['crops']} / {c['fields']}" for c in cells)])
    lines = [text_table(["class", *SPLITS], rows), "(crops / independent fields)"]
    lines += [f"ERROR: {text}" for text in audit.errors]
    lines += [f"warning: {text}" for text in audit.warnings]
    if not audit.errors:
        shared = [name for name, fraction in audit.shared_pixels.items() if fraction]
        found = f", with pixels of {' and '.join(shared)} in training crops too" if shared else ""
        lines.append(f"audit passed{found or ': nothing stands in two splits'}")
    return "\n".join(lines)


def _clashes(
    records: Sequence[CropRecord], keys: Sequence[str | None], attribute: str
) -> list[tuple[CropRecord, CropRecord]]:
    """Returns, for every key that has such, two records in which the attribute differs."""
    first: dict[str | None, CropRecord] = {}
    clashes: dict[str | None, tuple[CropRecord, CropRecord]] = {}
    for record, key in zip(records, keys, strict=True):
        other = first.setdefault(key, record)
        if getattr(other, attribute) != getattr(record, attribute):
            clashes.setdefault(key, (other, record))
    return list(clashes.values())


def _near_constant(split: SplitArrays) -> list[CropRecord]:
    """Returns the crops of which all channels' deviations are under 0.5 % of the split's range."""

    def deviation(image: np.ndarray) -> float:
        # With channels first, ten times as fast.
        return float(image.T.astype(np.float32, order="C").std(axis=(1, 2)).max())

    deviations = np.array(parallel_map(deviation, split.images, title="auditing"))
    flat = deviations <= _NEAR_CONSTANT * float(np.ptp(split.images))
    return [record for record, is_flat in zip(split.records, flat, strict=True) if is_flat]


def _shared_pixels(records: Sequence[CropRecord], shape: tuple[int, ...]) -> dict[str, float]:
    """Returns the fraction of val and test pixels that lie in a training crop of the same image."""
    height, width = shape
    by_source = collections.defaultdict(list)
    for record in records:
        by_source[record.source].append(record)
    shared = collections.Counter[str]()
    for of_source in by_source.values():
        if len({record.split for record in of_source}) == 1:
            continue
        rows, columns = (max(r.y for r in of_source), max(r.x for r in of_source))
        trained = np.zeros((rows + height, columns + width), bool)
        for record in of_source:  # those for training come first
            window = trained[record.y : record.y + height, record.x : record.x + width]
            window |= record.split == "train"
            shared[record.split] += int(window.sum())
    num_crops = collections.Counter(record.split for record in records)
    return {name: shared[name] / (num_crops[name] * height * width) for name in ("val", "test")}


def count_crops(
    records: Sequence[CropRecord], class_names: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Returns {class: {"crops": n, "fields": n}} of some crops, fields being independent groups."""
    groups = {name: [r.group for r in records if r.label == name] for name in class_names}
    return {name: {"crops": len(of), "fields": len(set(of))} for name, of in groups.items()}


def _shortcuts(field_kinds: Counts) -> Iterator[str]:
    """Warns where classes differ in something that has nothing to do with cells."""
    for kind in next(iter(field_kinds.values())):
        counts = {label: kinds[kind] for label, kinds in field_kinds.items()}
        values = sorted(set().union(*counts.values()))
        table = np.array([[count.get(value, 0) for value in values] for count in counts.values()])
        shares = table / table.sum(axis=1, keepdims=True)  # [class, value]
        if np.ptp(shares, axis=0).max() > _DIFFERENT:
            listed = "; ".join(f"{label}: {', '.join(sorted(c))}" for label, c in counts.items())
            yield (
                f"classes differ in {kind} ({shortened(listed, 400)}): a shortcut by which a "
                "network can tell them apart without looking at cells"
            )


def _confounded(what: str, units: Sequence[str], labels: Sequence[str]) -> Iterator[str]:
    """Warns where plates or days do not show every class, from the unit and class of each crop."""
    pairs = sorted(set(zip(units, labels, strict=True)))
    shown = {unit: [label for other, label in pairs if other == unit] for unit, _ in pairs}
    if any(len(names) < len(set(labels)) for names in shown.values()):
        listed = some([f"{unit}: {'+'.join(names)}" for unit, names in shown.items()], 8)
        outcome = "may tell these apart instead of cells"
        if all(len(names) == 1 for names in shown.values()):
            outcome = "need not look at cells at all, and no figure of this study could show it"
        yield f"{what} and classes are confounded ({listed}): a network {outcome}"


def _ranges(train: SplitArrays) -> Iterator[str]:
    """Warns where the brightest pixels of classes are on scales that differ."""
    high = {}
    for name in sorted({record.label for record in train.records}):
        rows = [row for row, record in enumerate(train.records) if record.label == name][:500]
        high[name] = np.percentile(train.images[rows, ::4, ::4], 99.9)
    if max(high.values()) > _RANGE_RATIO * min(high.values()):
        listed = some([f"{name}: {digits(value)}" for name, value in high.items()], 8)
        yield (
            f"classes differ in the range of their pixels (99.9 % are below: {listed}): 12-bit "
            "beside 16-bit images, or another exposure? A shortcut by which a network can tell them"
        )
