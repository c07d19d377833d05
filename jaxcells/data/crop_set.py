"""A crop set on disk: `crops/{train,val,test}/<class>/`, manifest.csv and crop_set.json.

It is written once, in `crops.partial` beside it: the rename at the end is what makes it a crop set,
so that an interrupted run leaves nothing that could pass for one. What is opened later is checked:
the files must be those of the manifest, the manifest the one that was written, and the pixels of a
crop that is read those that the manifest has the hash of.
"""

import collections
import csv
import dataclasses
import hashlib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcells.data.crops import Crop, CropSettings, draw_crops, fold_of_fields
from jaxcells.data.fields import SPLITS, Field, find_fields, image_notes, is_hidden, usable_fields
from jaxcells.data.foreground import foreground_fraction, foreground_map
from jaxcells.data.images import read_image, write_crop
from jaxcells.data.objects import find_cells
from jaxcells.data.parallel import parallel_map
from jaxcells.data.sheet import SHEETS, find_in_sheet
from jaxcells.data.siblings import check_siblings
from jaxcells.data.splits import with_groups
from jaxcells.files import (
    Error,
    file_sha256,
    from_record,
    logger,
    read_json,
    staged,
    write_csv,
    write_json,
)
from jaxcells.text import some

_AGAIN = "choose another workdir, or delete that folder to draw again"
_HEADER = "crop,class,channel,source,group,y,x,foreground,split,sha256"


@dataclasses.dataclass(frozen=True)
class CropRecord:
    """A line of manifest.csv.

    Attributes:
      crop: path of the crop below `crops/`, with forward slashes.
      label: name of its class (column "class").
      channel: channel of the device, "" where the class is one channel.
      source: path of the field below the image folder.
      group: what must not stand in two splits.
      y: row of the crop's upper left pixel in the field.
      x: column of the crop's upper left pixel in the field.
      foreground: fraction of the crop that shows cells, see `foreground`.
      split: "train", "val" or "test".
      sha256: hash of the pixels, see `pixel_sha256`.
    """

    crop: str
    label: str
    channel: str
    source: str
    group: str
    y: int
    x: int
    foreground: float
    split: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class CropSet:
    """Crops on disk and where they came from.

    Attributes:
      directory: the folder `crops/`.
      records: the lines of manifest.csv.
      class_names: sorted; the position is the label.
      manifest_sha256: the identity of the set.
      settings: what the set was drawn with.
      root: the image folder, or that of the sheet, absolute.
      sources: for every image: {"bytes": its size, "sha256": hash of its pixels, or None for an
        image that gave no crop, "origin": class, channel, group and split, as found}.
      came_split: whether the image folder or sheet brought its own split.
      split_by: as in `settings`; "field" instead of "crop" where images are used whole, and "group"
        instead of "field" where the groups are those of a sheet.
      field_kinds: for every class, the counts of its images' sizes, channels, dtypes and suffixes.
      notes: what was left out or interpreted on the way.
      num_folds: of the cross-validation whose fold this set is; 0 of any other set.
    """

    directory: Path
    records: tuple[CropRecord, ...]
    class_names: tuple[str, ...]
    manifest_sha256: str
    settings: CropSettings
    root: str
    sources: Mapping[str, Mapping[str, Any]]
    came_split: bool
    split_by: str
    field_kinds: Mapping[str, Mapping[str, Mapping[str, int]]]
    notes: tuple[str, ...]
    num_folds: int

    def split(self, name: str) -> list[CropRecord]:
        """Returns the records of one split, in the order of the manifest."""
        return [record for record in self.records if record.split == name]


def prepare_crop_set(directory: Path, root: str | Path, settings: CropSettings) -> CropSet:
    """Draws and writes the crops of `root`, or reuses those that are there.

    Images that have the size of a crop already are used whole, and then all of them; the split is
    the ratio in which they are divided. What is reused has the files of its manifest; its pixels
    are verified by those who read them.

    Args:
      directory: where the crop set is or will be.
      root: the image folder, see `find_fields`, or a sheet, see `find_in_sheet`.
      settings: how many crops of what size, and how they are split.

    Raises:
      Error: anything wrong with the folder or the settings, or a set that does not match them.
    """
    root = Path(root).expanduser()
    if directory.exists():
        crop_set = open_crop_set(directory)
        before, now = dataclasses.asdict(crop_set.settings), dataclasses.asdict(settings)
        if changed := [key for key in now if now[key] != before[key]]:
            listed = "; ".join(f"data.{k} was {before[k]!r}, now {now[k]!r}" for k in changed)
            raise Error(f"{directory} was drawn with other settings: {listed}; {_AGAIN}")
        _check_same_sources(crop_set, root)
        logger.info("reusing %d crops in %s", len(crop_set.records), directory)
        return crop_set

    fields = _find(root, settings)
    size, split_by = settings.crop_size, settings.split_by
    if not settings.mask and all((f.info.height, f.info.width) == (size, size) for f in fields):
        size = 0
    if split_by == "crop" and not size:  # used whole, an image is a crop
        split_by = "field"
    if split_by == "field" and any(field.group != field.name for field in fields):
        split_by = "group"
    siblings = check_siblings(fields, split_by, settings.plane, settings.fold)
    used, notes = usable_fields(fields, size or None, settings.border)
    if split_by != "group":
        used = with_groups(used, split_by)
    places = None
    if settings.mask:
        places, note = find_cells(used, settings.mask, size, settings.border)
        used = [field for field in used if places[field.name]]
        notes.append(note)
    notes += image_notes(used) + siblings
    if split_by not in ("field", "crop"):
        groups = sorted({field.group for field in used})
        policy = "column group" if split_by == "group" else f"data.split_by={split_by}"
        number = f"{len(groups)} groups in {len(used)} images"
        notes.append(f"{policy}: {number}, such as {some(groups, 3)}")
    for note in notes:
        logger.info("note: %s", note)
    per_class = collections.Counter(field.label for field in used)
    listed = some([f"{label} {number}" for label, number in sorted(per_class.items())])
    logger.info("found %d images: %s", len(used), listed)

    effective = dataclasses.replace(settings, crop_size=size, split_by=split_by)
    crops = draw_crops(used, effective, places)
    with staged(directory) as folder:
        records, hashes = _write_crops(folder, crops, size, settings.plane)
        write_csv(folder / "manifest.csv", _HEADER.split(","), map(dataclasses.astuple, records))
        description = {
            "class_names": sorted(per_class),
            "manifest_sha256": file_sha256(folder / "manifest.csv"),
            "settings": dataclasses.asdict(settings),
            "root": _folder(root),
            "sources": {f.name: {"sha256": hashes.get(f.name), **_source(f)} for f in fields},
            "came_split": any(field.split for field in fields),
            "split_by": split_by,
            "field_kinds": _field_kinds(used),
            "notes": notes,
            "num_folds": max(fold_of_fields(used, effective).values(), default=0),
        }
        write_json(folder / "crop_set.json", description)
    logger.info("wrote %d crops to %s", len(records), directory)
    return open_crop_set(directory)


def open_crop_set(directory: Path) -> CropSet:
    """Opens a crop set and checks that its files are those of its manifest; reads no pixels.

    Raises:
      Error: not a crop set, one of another version, a changed manifest, or files missing or added.
    """
    path, manifest = directory / "crop_set.json", directory / "manifest.csv"
    if not (path.is_file() and manifest.is_file()):
        raise Error(f"{directory}: not a crop set, or a damaged one; {_AGAIN}")
    values = read_json(path)
    if file_sha256(manifest) != values.get("manifest_sha256"):
        raise Error(f"{directory}: manifest.csv is not the one that was written there; {_AGAIN}")
    found = {"directory": directory, "records": tuple(_read_manifest(manifest))}
    crop_set = from_record(CropSet, values | found, path)
    listed = {record.crop for record in crop_set.records}
    files = (path for path in directory.glob("*/**/*") if path.is_file() and not is_hidden(path))
    present = {path.relative_to(directory).as_posix() for path in files}
    if listed != present:
        raise Error(
            f"{directory}: not the files of manifest.csv ({len(listed - present)} missing, "
            f"{len(present - listed)} added: {some(sorted(listed ^ present), 3)}); {_AGAIN}"
        )
    return crop_set


def read_crop(directory: Path, record: CropRecord) -> np.ndarray:
    """Reads a crop, [H, W, C] in its own dtype, and checks its pixels against the manifest.

    Raises:
      Error: they differ, or the file cannot be read.
    """
    pixels = read_image(directory / record.crop)
    if pixel_sha256(pixels) != record.sha256:
        raise Error(f"{directory}: the pixels of {record.crop} differ from manifest.csv; {_AGAIN}")
    return pixels


def verify_pixels(crop_set: CropSet) -> None:
    """Decodes every crop and compares its pixels with the manifest.

    Raises:
      Error: naming the first crop that differs.
    """

    def verify(record: CropRecord) -> None:
        read_crop(crop_set.directory, record)

    parallel_map(verify, crop_set.records, title="verifying crops")


def pixel_sha256(image: np.ndarray) -> str:
    """Returns the SHA-256 of an image's dtype, shape and little-endian pixels, in hexadecimal."""
    little = np.ascontiguousarray(image, image.dtype.newbyteorder("<"))
    digest = hashlib.sha256(f"{image.dtype.name}{image.shape}".encode())
    digest.update(little.data)
    return digest.hexdigest()


def _read_manifest(path: Path) -> list[CropRecord]:
    kinds = typing.get_type_hints(CropRecord).values()  # in the order of the columns
    with open(path, newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    return [CropRecord(*(k(cell) for k, cell in zip(kinds, r, strict=True))) for r in rows]


def _write_crops(
    directory: Path, crops: Sequence[Crop], size: int, plane: str
) -> tuple[list[CropRecord], dict[str, str]]:
    """Cuts crops out of their fields and writes them; each core holds one field at a time.

    Returns:
      The lines of the manifest, and the hash of every field's pixels by its name.
    """
    by_field: dict[str, list[Crop]] = collections.defaultdict(list)
    for crop in crops:
        by_field[crop.field.name].append(crop)
    records: list[CropRecord] = []
    hashes: dict[str, str] = {}

    def write_field(of_field: list[Crop]) -> None:
        field, info = of_field[0].field, of_field[0].field.info
        image = read_image(field.path, plane=plane)
        if (*image.shape, image.dtype) != (info.height, info.width, info.channels, info.dtype):
            raise Error(f"{field.path}: damaged, or changed since its header was read; try again")
        hashes[field.name], foreground = pixel_sha256(image), foreground_map(image)
        for crop in of_field:
            y, x, split = crop.y, crop.x, crop.split
            pixels = image[y : y + size, x : x + size] if size else image
            folder = directory / split / field.label
            folder.mkdir(parents=True, exist_ok=True)
            path = write_crop(folder / _crop_name(crop), pixels).relative_to(directory).as_posix()
            origin = (field.label, field.channel, field.name, field.group, y, x)
            shown = round(foreground_fraction(foreground, y, x, *pixels.shape[:2]), 4)
            records.append(CropRecord(path, *origin, shown, split, pixel_sha256(pixels)))

    parallel_map(write_field, list(by_field.values()), title="writing crops")
    records.sort(key=lambda r: (SPLITS.index(r.split), r.label, r.source, r.y, r.x))
    return records, hashes


def _crop_name(crop: Crop) -> str:
    """Names a crop after its field and place; a hash keeps apart what a legible name cannot."""
    legible = "-".join(filter(None, [crop.field.channel, crop.field.path.stem]))
    legible = re.sub(r"[^\w.-]+", "_", legible).strip("-._")[:40]
    digest = hashlib.sha256(crop.field.name.encode()).hexdigest()[:8]
    return f"{legible}_{digest}_y{crop.y:05d}_x{crop.x:05d}"


def _field_kinds(fields: Sequence[Field]) -> Mapping[str, Mapping[str, Mapping[str, int]]]:
    """Counts by class what a network could tell classes apart by, without looking at a cell."""
    kinds: Any = collections.defaultdict(lambda: collections.defaultdict(collections.Counter))
    for field in fields:
        of_class, info = kinds[field.label], field.info
        of_class["image size"][f"{info.height}x{info.width}"] += 1
        of_class["colour channels"][str(info.channels)] += 1
        of_class["pixel type"][info.dtype] += 1
        of_class["file type"][field.path.suffix.lower()] += 1
    return kinds


def _find(root: Path, settings: CropSettings) -> list[Field]:
    if root.suffix.lower() in SHEETS:
        return find_in_sheet(root, plane=settings.plane, exclude=settings.exclude)
    return find_fields(root, plane=settings.plane, exclude=settings.exclude, mask=settings.mask)


def _folder(root: Path) -> str:
    return str((root.parent if root.suffix.lower() in SHEETS else root).resolve())


def _source(field: Field) -> dict[str, Any]:
    """Returns what is known of an image, and of what a sheet says of it, without its pixels."""
    origin = [field.label, field.channel, field.group, field.split]
    return {"bytes": field.path.stat().st_size, "origin": origin}


def _check_same_sources(crop_set: CropSet, root: Path) -> None:
    """Refuses a crop set whose images are not those of the root any more, as it describes them.

    The same folder may be away meanwhile. Another folder, perhaps the same one moved, is compared
    by its pixels.
    """
    moved, plane = _folder(root) != crop_set.root, crop_set.settings.plane
    if not moved and not root.exists():
        logger.info("%s is not there; going on with the crops drawn from it", root)
        return
    fields = _find(root, crop_set.settings)

    def is_same(field: Field) -> bool:
        source = crop_set.sources.get(field.name, {})
        if {**source, **_source(field)} != source:
            return False
        sha256 = source["sha256"] if moved else None
        return sha256 is None or pixel_sha256(read_image(field.path, plane=plane)) == sha256

    same = parallel_map(is_same, fields, title="comparing images")
    changed = [field.name for field, as_before in zip(fields, same, strict=True) if not as_before]
    gone = sorted(crop_set.sources.keys() - {field.name for field in fields})
    if changed or gone:
        raise Error(
            f"{root}: not the images that {crop_set.directory} was drawn from ({len(changed)} new "
            f"or changed, {len(gone)} gone: {some(changed + gone, 3)}); {_AGAIN}"
        )
