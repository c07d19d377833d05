"""A crop set on disk: `crops/{train,val,test}/<class>/`, manifest.csv and crop_set.json.

What is opened is checked: files, manifest and pixels must be those that were written.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcells.data.fields import SPLITS, is_hidden
from jaxcells.data.images import read_image
from jaxcells.data.manifest import CropRecord, pixel_sha256, read_manifest
from jaxcells.data.parallel import parallel_map
from jaxcells.files import Error, file_sha256


@dataclasses.dataclass(frozen=True)
class CropSet:
    """Crops on disk and where they came from.

    Attributes:
      directory: the folder `crops/`.
      records: the lines of manifest.csv.
      class_names: sorted; the position is the label.
      manifest_sha256: the identity of the set.
      settings: what the set was drawn with, by config key.
      root: the image folder, absolute.
      sources: for every image below the root: {"bytes": its size, "sha256": hash of its pixels, or
        None for an image that gave no crop}.
      came_split: whether the image folder brought its own split.
      field_kinds: for every class, the counts of its images' sizes, channels, dtypes and suffixes.
      notes: what was left out or interpreted on the way.
    """

    directory: Path
    records: tuple[CropRecord, ...]
    class_names: tuple[str, ...]
    manifest_sha256: str
    settings: Mapping[str, Any]
    root: str
    sources: Mapping[str, Mapping[str, Any]]
    came_split: bool
    field_kinds: Mapping[str, Mapping[str, Mapping[str, int]]]
    notes: tuple[str, ...]

    def split(self, side: str) -> list[CropRecord]:
        """Returns the records of one side, in the order of the manifest."""
        return [record for record in self.records if record.split == side]


def open_crop_set(directory: Path) -> CropSet:
    """Opens a crop set and checks that its files are those of its manifest.

    Raises:
      Error: not a crop set, a changed manifest, or files missing or added.
    """
    again = "choose another --workdir, or delete that folder to draw again"
    path = directory / "crop_set.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        crop_set = CropSet(
            directory=directory,
            records=tuple(read_manifest(directory / "manifest.csv")),
            class_names=tuple(description["class_names"]),
            manifest_sha256=file_sha256(directory / "manifest.csv"),
            settings=description["settings"],
            root=description["root"],
            sources=description["sources"],
            came_split=description["came_split"],
            field_kinds=description["field_kinds"],
            notes=tuple(description["notes"]),
        )
        expected = description["manifest_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Error(
            f"{directory}: not a crop set, or a damaged one ({path.name}: {error}); {again}"
        ) from error
    if crop_set.manifest_sha256 != expected:
        raise Error(f"{directory}: manifest.csv was changed after it was written; {again}")
    listed = {record.crop for record in crop_set.records}
    present = {
        file.relative_to(directory).as_posix()
        for side in SPLITS
        for file in (directory / side).rglob("*")
        if file.is_file() and not is_hidden(file)
    }
    if listed != present:
        missing, added = sorted(listed - present), sorted(present - listed)
        what = [f"{len(missing)} missing, such as {missing[0]}"] if missing else []
        what += [f"{len(added)} not in the manifest, such as {added[0]}"] if added else []
        raise Error(
            f"{directory}: the files are not those of manifest.csv: {'; '.join(what)}; {again}"
        )
    return crop_set


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
            f"({len(changed)} of {len(good)} crops were changed); choose another --workdir, or "
            f"delete {crop_set.directory} to draw again"
        )
