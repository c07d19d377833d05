"""Crops decoded once into memory-mapped arrays, keyed by the manifest they were made from."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxcells.data.crop_set import CropSet, manifest_sha256
from jaxcells.data.fields import SIDES
from jaxcells.data.images import read_image
from jaxcells.data.manifest import CropRecord, pixel_sha256
from jaxcells.data.parallel import parallel_map
from jaxcells.errors import Error


@dataclasses.dataclass(frozen=True)
class SplitArrays:
    """One side of a crop set.

    Attributes:
      images: [N, H, W, C], memory-mapped, in the crops' own dtype.
      labels: int32 [N].
      records: the lines of the manifest, in the same order.
    """

    images: np.ndarray
    labels: np.ndarray
    records: tuple[CropRecord, ...]

    @property
    def groups(self) -> np.ndarray:
        """The independent unit of every crop, str [N]."""
        return np.array([record.group for record in self.records])


def open_arrays(crop_set: CropSet, directory: Path) -> Mapping[str, SplitArrays]:
    """Opens the arrays of a crop set, making them first if they are missing or of another set.

    Pixels are checked against the manifest while they are decoded.

    Args:
      crop_set: the crops.
      directory: where the arrays are or will be.

    Returns:
      The arrays of "train", "val" and "test".

    Raises:
      Error: a crop cannot be read, or its pixels are not those of the manifest.
    """
    key = manifest_sha256(crop_set)
    index = directory / "index.json"
    if not index.is_file() or json.loads(index.read_text())["manifest_sha256"] != key:
        partial = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for side in SIDES:
            _write_images(crop_set, side, partial / f"{side}.npy")
        (partial / "index.json").write_text(json.dumps({"manifest_sha256": key}))
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    number = {name: label for label, name in enumerate(crop_set.class_names)}
    arrays = {}
    for side in SIDES:
        records = crop_set.split(side)
        arrays[side] = SplitArrays(
            images=np.load(directory / f"{side}.npy", mmap_mode="r"),
            labels=np.array([number[record.label] for record in records], np.int32),
            records=tuple(records),
        )
    return arrays


def _write_images(crop_set: CropSet, side: str, path: Path) -> None:
    records = crop_set.split(side)
    first = read_image(crop_set.directory / crop_set.records[0].crop)
    images = np.lib.format.open_memmap(
        path, mode="w+", dtype=first.dtype, shape=(len(records), *first.shape)
    )

    def decode(number: int) -> None:
        record = records[number]
        pixels = read_image(crop_set.directory / record.crop)
        if pixel_sha256(pixels) != record.sha256:
            raise Error(
                f"{crop_set.directory / record.crop}: the pixels are not those of manifest.csv; "
                f"delete {crop_set.directory} to draw again"
            )
        images[number] = pixels

    parallel_map(decode, range(len(records)), title=f"decoding {side}")
    images.flush()
