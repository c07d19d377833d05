"""Crops decoded once into memory-mapped arrays, keyed by the manifest they were made from."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxcells.data.crop_set import CropSet
from jaxcells.data.fields import SPLITS
from jaxcells.data.images import read_image
from jaxcells.data.manifest import CropRecord, pixel_sha256
from jaxcells.data.parallel import parallel_map
from jaxcells.files import Error


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
    """Opens the arrays of a crop set, making them first if they are missing or not of its pixels.

    Args:
      crop_set: the crops.
      directory: where the arrays are or will be.

    Returns:
      The arrays of "train", "val" and "test", every pixel checked against the manifest.

    Raises:
      Error: a crop cannot be read, or its pixels are not those of the manifest.
    """
    arrays = _open(crop_set, directory)
    if arrays is None:
        partial = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for side in SPLITS:
            _write_images(crop_set, side, partial / f"{side}.npy")
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
        arrays = _open(crop_set, directory)
        if arrays is None:
            raise Error(
                f"{directory}: what was written does not read back the same; see to the disk"
            )
    return arrays


def create_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """Creates a memory-mapped .npy file whose space on the disk is reserved.

    Raises:
      OSError: the disk has no room.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        # Writing to a mapped file on a full disk would kill the process without a word.
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _open(crop_set: CropSet, directory: Path) -> Mapping[str, SplitArrays] | None:
    """Returns the arrays, or None if any pixel is not that of the manifest."""
    number = {name: label for label, name in enumerate(crop_set.class_names)}
    arrays = {}
    for side in SPLITS:
        records = crop_set.split(side)
        try:
            images = np.load(directory / f"{side}.npy", mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return None

        def differs(row: int, images: np.ndarray = images, records: list = records) -> bool:
            return pixel_sha256(images[row]) != records[row].sha256

        if len(images) != len(records) or any(
            parallel_map(differs, range(len(records)), title=f"checking {side}")
        ):
            return None
        arrays[side] = SplitArrays(
            images=images,
            labels=np.array([number[record.label] for record in records], np.int32),
            records=tuple(records),
        )
    return arrays


def _write_images(crop_set: CropSet, side: str, path: Path) -> None:
    records = crop_set.split(side)
    first = read_image(crop_set.directory / crop_set.records[0].crop)
    images = create_array(path, (len(records), *first.shape), first.dtype)

    def decode(number: int) -> None:
        record = records[number]
        pixels = read_image(crop_set.directory / record.crop)
        if pixel_sha256(pixels) != record.sha256:
            raise Error(
                f"{crop_set.directory / record.crop}: the pixels are not those of manifest.csv; "
                f"choose another --workdir, or delete {crop_set.directory} to draw again"
            )
        images[number] = pixels

    parallel_map(decode, range(len(records)), title=f"decoding {side}")
    images.flush()
