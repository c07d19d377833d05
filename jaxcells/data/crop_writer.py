"""Writes the crop folders of a run, once: from an image folder and settings to a crop set.

Writing happens in `crops.partial` beside it; the rename at the end is what makes it a crop set, so
an interrupted run leaves nothing that could pass for one. A rerun verifies every pixel and reuses.
"""

import collections
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

from jaxcells.data.crop_set import CropSet, open_crop_set, verify_pixels
from jaxcells.data.crops import Border, Crop, draw_crops
from jaxcells.data.fields import SPLITS, Field, find_fields, image_notes, usable_fields
from jaxcells.data.images import read_image, write_crop
from jaxcells.data.manifest import CropRecord, pixel_sha256, write_manifest
from jaxcells.data.parallel import parallel_map
from jaxcells.data.splits import with_groups
from jaxcells.files import Error, file_sha256

logger = logging.getLogger("jaxcells")


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
        crop_set = open_crop_set(directory)
        _check_same_settings(crop_set, settings)
        _check_same_sources(crop_set, Path(root).expanduser(), plane)
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
        if split_by in ("field", "crop"):
            notes.append(
                "each image counts as a field of its own: if several were cut from one image, name "
                "that with --config.data.split_by='EXPRESSION', or test and training share images"
            )
    kept = with_groups(kept, split_by)
    if split_by not in ("field", "crop"):
        groups = sorted({field.group for field in kept})
        alone = " (each image alone)" if len(groups) == len(kept) else ""
        notes.append(
            f"split_by={split_by!r}: {len(groups)} groups in {len(kept)} images{alone}, such as "
            f"{', '.join(groups[:3])}"
        )
    for note in notes:
        logger.info("note: %s", note)
    logger.info(
        "found %d images: %s",
        len(kept),
        ", ".join(f"{label} {number}" for label, number in sorted(per_class.items())),
    )
    crops = draw_crops(
        kept,
        dict(zip(SPLITS, split, strict=True)),
        size,
        seed=seed,
        split_by=split_by,
        border=border,
        min_foreground=min_foreground,
        plane=plane,
    )
    description = {
        "settings": settings,
        "root": str(Path(root).expanduser().resolve()),
        "class_names": sorted(per_class),
        "sources": {field.name: {"bytes": field.path.stat().st_size} for field in fields},
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
    for side in SPLITS:
        for label in {crop.field.label for crop in crops}:
            (partial / side / label).mkdir(parents=True)

    by_field: dict[str, list[Crop]] = collections.defaultdict(list)
    for crop in crops:
        by_field[crop.field.name].append(crop)

    def write_field(of_field: list[Crop]) -> tuple[str, list[CropRecord]]:
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
        return pixel_sha256(image), records

    written = parallel_map(write_field, list(by_field.values()), title="writing crops")
    records = sorted(
        (record for _, of_field in written for record in of_field),
        key=lambda r: (SPLITS.index(r.split), r.label, r.source, r.y, r.x),
    )
    write_manifest(partial / "manifest.csv", records)
    hashes = {name: sha256 for name, (sha256, _) in zip(by_field, written, strict=True)}
    sources = {
        name: source | {"sha256": hashes.get(name)}
        for name, source in description["sources"].items()
    }
    description = {
        **description,
        "sources": sources,
        "manifest_sha256": file_sha256(partial / "manifest.csv"),
    }
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


def _check_same_settings(crop_set: CropSet, settings: Mapping[str, Any]) -> None:
    differences = [
        f"{key} was {crop_set.settings.get(key)!r}, now {value!r}"
        for key, value in settings.items()
        if crop_set.settings.get(key) != value
    ]
    if differences:
        raise Error(
            f"{crop_set.directory} was drawn with other settings: {'; '.join(differences)}; choose "
            "another --workdir, or delete that folder to draw again"
        )


def _check_same_sources(crop_set: CropSet, root: Path, plane: str) -> None:
    """Refuses a crop set whose images are not those below the root any more.

    The same folder may be away meanwhile. Another folder, perhaps the same one moved, is compared
    by its pixels.
    """
    moved = str(root.resolve()) != crop_set.root
    if not moved and not root.is_dir():
        logger.info("%s is not there; going on with the crops drawn from it", root)
        return
    fields = find_fields(root, plane=plane)

    def unchanged(field: Field) -> bool:
        source = crop_set.sources.get(field.name)
        if source is None or source["bytes"] != field.path.stat().st_size:
            return False
        sha256 = source["sha256"] if moved else None
        return sha256 is None or pixel_sha256(read_image(field.path, plane=plane)) == sha256

    same = parallel_map(unchanged, fields, title="comparing images")
    changed = [field.name for field, is_same in zip(fields, same, strict=True) if not is_same]
    gone = sorted(crop_set.sources.keys() - {field.name for field in fields})
    if changed or gone:
        examples = ", ".join((changed + gone)[:3])
        raise Error(
            f"{root}: not the images that {crop_set.directory} was drawn from ({len(changed)} new "
            f"or changed, {len(gone)} gone: {examples}); choose another --workdir, or delete that "
            "folder to draw again"
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
