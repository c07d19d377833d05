"""The crop folders of a run: `crops/{train,val,test}/<class>/` with manifest.csv, written once.

Writing happens in `crops.partial` beside it; the rename at the end is what makes it a crop set, so
an interrupted run leaves nothing that could pass for one. A rerun verifies every pixel and reuses.
"""

import collections
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcells.data.crops import Border, Crop, draw_crops
from jaxcells.data.fields import SIDES, Field, find_fields, image_notes, usable_fields
from jaxcells.data.images import read_image, write_crop
from jaxcells.data.manifest import CropRecord, pixel_sha256, read_manifest, write_manifest
from jaxcells.data.parallel import parallel_map
from jaxcells.data.splits import with_groups
from jaxcells.errors import Error

logger = logging.getLogger("jaxcells")


@dataclasses.dataclass(frozen=True)
class CropSet:
    """Crops on disk and where they came from.

    Attributes:
      directory: the folder `crops/`.
      records: the lines of manifest.csv.
      class_names: sorted; the position is the label.
      settings: what the set was drawn with, by config key.
      came_split: whether the image folder brought its own split.
      field_kinds: for every class, the counts of its images' sizes, channels, dtypes and suffixes.
      notes: what was left out or interpreted on the way.
    """

    directory: Path
    records: tuple[CropRecord, ...]
    class_names: tuple[str, ...]
    settings: Mapping[str, Any]
    came_split: bool
    field_kinds: Mapping[str, Mapping[str, Mapping[str, int]]]
    notes: tuple[str, ...]

    def split(self, side: str) -> list[CropRecord]:
        """Returns the records of one side, in the order of the manifest."""
        return [record for record in self.records if record.split == side]


def prepare_crop_set(
    directory: Path,
    root: str | os.PathLike[str],
    *,
    seed: int,
    crop_size: int | None,
    crops_per_class: int,
    split: tuple[int, int, int],
    split_by: str,
    border: Border = (0, 0, 0, 0),
    min_foreground: float = 0.0,
    plane: str = "",
) -> CropSet:
    """Draws and writes the crops of `root`, or verifies and reuses those that are there.

    Images that have the size of a crop already are used whole, and then all of them; `split` is
    the ratio in which they are divided.

    Args:
      directory: where the crop set is or will be.
      root: the image folder, see `find_fields`.
      seed: the run's seed.
      crop_size: side of a crop in pixels; None or 0: images are used whole.
      crops_per_class: how many crops a class gives; the sum of `split`.
      split: crops per class on the (train, val, test) side.
      split_by: "field", "channel", "crop" or a regular expression, see `with_groups`.
      border: pixels left out at the (top, right, bottom, left).
      min_foreground: see `draw_crops`.
      plane: see `read_image`.

    Raises:
      Error: anything wrong with the folder or the settings, or a set that does not match them.
    """
    settings: dict[str, Any] = {
        "seed": seed,
        "data.crop_size": crop_size or 0,
        "data.crops_per_class": crops_per_class,
        "data.split": list(split),
        "data.split_by": split_by,
        "data.border": list(border),
        "data.min_foreground": min_foreground,
        "data.plane": plane,
    }
    if directory.exists():
        crop_set = open_crop_set(directory, settings=settings)
        _check_same_sources(crop_set, root, plane)
        verify_pixels(crop_set)
        logger.info("reusing %d verified crops in %s", len(crop_set.records), directory)
        return crop_set

    fields = find_fields(root, plane=plane)
    whole = not crop_size or all(
        (f.info.height, f.info.width) == (crop_size, crop_size) for f in fields
    )
    size = None if whole or not crop_size else crop_size
    kept, notes = usable_fields(fields, size, border)
    notes += image_notes(kept)
    per_class = collections.Counter(field.label for field in kept)
    if whole:
        notes.append("images are used whole, as crops that were made elsewhere")
    for note in notes:
        logger.info("note: %s", note)
    logger.info(
        "found %d images: %s",
        len(kept),
        ", ".join(f"{label} {number}" for label, number in sorted(per_class.items())),
    )
    crops = draw_crops(
        with_groups(kept, split_by),
        dict(zip(SIDES, split, strict=True)),
        size,
        seed=seed,
        split_by=split_by,
        border=border,
        min_foreground=min_foreground,
        plane=plane,
    )
    description = {
        "settings": settings,
        "sources": sorted(f"{field.name}\t{field.path.stat().st_size}" for field in fields),
        "came_split": any(field.split for field in fields),
        "field_kinds": _field_kinds(kept),
        "notes": notes,
    }
    return write_crop_set(directory, crops, size, description=description, plane=plane)


def write_crop_set(
    directory: Path,
    crops: Sequence[Crop],
    size: int | None,
    *,
    description: Mapping[str, Any],
    plane: str = "",
) -> CropSet:
    """Cuts crops out of their fields and writes them with their manifest, all or nothing.

    Each core holds one field at a time, however many there are.

    Raises:
      Error: a field cannot be read, or changed since its header was read.
    """
    start = time.monotonic()
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for side in SIDES:
        for label in {crop.field.label for crop in crops}:
            (partial / side / label).mkdir(parents=True)

    by_field: dict[str, list[Crop]] = collections.defaultdict(list)
    for crop in crops:
        by_field[crop.field.name].append(crop)

    def write_field(of_field: list[Crop]) -> list[CropRecord]:
        field = of_field[0].field
        image = read_image(field.path, plane=plane)
        expected = (field.info.height, field.info.width, field.info.channels)
        if image.shape != expected or image.dtype.name != field.info.dtype:
            raise Error(
                f"{field.path}: read as {image.shape} {image.dtype}, its header says {expected} "
                f"{field.info.dtype}; the file is damaged or was changed meanwhile"
            )
        records = []
        for crop in of_field:
            height, width = (size, size) if size else image.shape[:2]
            pixels = image[crop.y : crop.y + height, crop.x : crop.x + width]
            path = write_crop(partial / crop.split / field.label / _crop_name(crop), pixels)
            records.append(
                CropRecord(
                    crop=path.relative_to(partial).as_posix(),
                    label=field.label,
                    channel=field.channel,
                    source=field.name,
                    group=field.group,
                    y=crop.y,
                    x=crop.x,
                    split=crop.split,
                    sha256=pixel_sha256(pixels),
                )
            )
        return records

    written = parallel_map(write_field, list(by_field.values()), title="writing crops")
    records = sorted(
        (record for of_field in written for record in of_field),
        key=lambda r: (SIDES.index(r.split), r.label, r.source, r.y, r.x),
    )
    write_manifest(partial / "manifest.csv", records)
    (partial / "crop_set.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
    partial.rename(directory)
    seconds = time.monotonic() - start
    logger.info(
        "wrote %d crops to %s in %.1f s (%.0f crops/s)",
        len(records),
        directory,
        seconds,
        len(records) / seconds,
    )
    return open_crop_set(directory)


def open_crop_set(directory: Path, *, settings: Mapping[str, Any] | None = None) -> CropSet:
    """Opens a crop set and checks that its files are those of its manifest.

    Args:
      directory: the folder `crops/`.
      settings: what the set should have been drawn with, by config key; None: anything.

    Raises:
      Error: not a crop set, drawn with other settings (names each), or files missing or added.
    """
    path = directory / "crop_set.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Error(
            f"{directory}: not a crop set ({path.name}: {error}); delete or rename the folder, or "
            "choose another --workdir"
        ) from error
    drawn = description["settings"]
    differences = [
        f"{key} was {drawn.get(key)!r}, now {value!r}"
        for key, value in (settings or {}).items()
        if drawn.get(key) != value
    ]
    if differences:
        raise Error(
            f"{directory} was drawn with other settings: {'; '.join(differences)}; choose another "
            "--workdir, or delete that folder to draw again"
        )
    records = read_manifest(directory / "manifest.csv")
    listed = {record.crop for record in records}
    present = {
        file.relative_to(directory).as_posix()
        for side in SIDES
        for file in (directory / side).rglob("*")
        if file.is_file()
    }
    if listed != present:
        missing, added = sorted(listed - present), sorted(present - listed)
        what = [f"{len(missing)} missing, such as {missing[0]}"] if missing else []
        what += [f"{len(added)} not in the manifest, such as {added[0]}"] if added else []
        raise Error(
            f"{directory}: the files are not those of manifest.csv: {'; '.join(what)}; "
            "delete the folder to draw again"
        )
    return CropSet(
        directory=directory,
        records=tuple(records),
        class_names=tuple(sorted({record.label for record in records})),
        settings=drawn,
        came_split=description["came_split"],
        field_kinds=description["field_kinds"],
        notes=tuple(description["notes"]),
    )


def verify_pixels(crop_set: CropSet) -> None:
    """Decodes every crop and compares its pixels with the manifest.

    Raises:
      Error: naming the first crop that differs and how many do.
    """

    def matches(record: CropRecord) -> bool:
        return pixel_sha256(read_image(crop_set.directory / record.crop)) == record.sha256

    good = parallel_map(matches, crop_set.records, title="verifying crops")
    changed = [r.crop for r, ok in zip(crop_set.records, good, strict=True) if not ok]
    if changed:
        raise Error(
            f"{crop_set.directory / changed[0]}: the pixels are not those of manifest.csv "
            f"({len(changed)} of {len(good)} crops were changed); delete {crop_set.directory} to "
            "draw "
            "again"
        )


def manifest_sha256(crop_set: CropSet) -> str:
    """Returns the SHA-256 of manifest.csv: the identity of the crop set."""
    return hashlib.sha256((crop_set.directory / "manifest.csv").read_bytes()).hexdigest()


def _check_same_sources(crop_set: CropSet, root: str | os.PathLike[str], plane: str) -> None:
    """Refuses a crop set whose image folder changed since; a folder that is away is no fault."""
    root = Path(root).expanduser()
    if not root.is_dir():
        logger.info("%s is not there; going on with the crops drawn from it", root)
        return
    path = crop_set.directory / "crop_set.json"
    drawn = set(json.loads(path.read_text(encoding="utf-8"))["sources"])
    present = {f"{f.name}\t{f.path.stat().st_size}" for f in find_fields(root, plane=plane)}
    if drawn != present:
        gone, new = sorted(drawn - present), sorted(present - drawn)
        names = ", ".join(line.split("\t")[0] for line in (new + gone)[:3])
        raise Error(
            f"{root}: images changed since {crop_set.directory} was drawn ({len(new)} new or "
            "changed, "
            f"{len(gone)} gone or changed: {names}); choose another --workdir, or delete that "
            "folder "
            "to draw again"
        )


def _field_kinds(fields: Sequence[Field]) -> dict[str, dict[str, dict[str, int]]]:
    """Counts by class what a network could tell classes apart by, without looking at a cell."""
    kinds: dict[str, dict[str, collections.Counter[str]]] = {}
    for field in fields:
        of_class = kinds.setdefault(field.label, collections.defaultdict(collections.Counter))
        of_class["image size"][f"{field.info.height}x{field.info.width}"] += 1
        of_class["colour channels"][str(field.info.channels)] += 1
        of_class["pixel type"][field.info.dtype] += 1
        of_class["file type"][field.path.suffix.lower()] += 1
    return {
        label: {kind: dict(sorted(counts.items())) for kind, counts in of_class.items()}
        for label, of_class in kinds.items()
    }


def _crop_name(crop: Crop) -> str:
    """Names a crop after its field and place; a hash keeps apart what a legible name cannot."""
    name = crop.field.name
    legible = "-".join(filter(None, [crop.field.channel, crop.field.path.stem]))
    legible = re.sub(r"[^\w.-]+", "_", legible).strip("-._")[:40]
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{legible}_{digest}_y{crop.y:05d}_x{crop.x:05d}"
