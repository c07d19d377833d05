"""Crops decoded once into memory-mapped arrays, every pixel checked against the manifest."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxcells.data.crop_set import CropRecord, CropSet, pixel_sha256, read_crop
from jaxcells.data.fields import SPLITS
from jaxcells.data.parallel import parallel_map
from jaxcells.data.rng import named_generator
from jaxcells.files import logger, staged


@dataclasses.dataclass(frozen=True)
class SplitArrays:
    """One split of a crop set.

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
      The arrays of "train", "val" and "test". Each crop's pixels were compared with the manifest:
      those of the arrays, or where these had to be made, those of the file that went into them.

    Raises:
      Error: arrays have to be made, and the pixels of a crop are not those of the manifest.
    """
    directory = directory.resolve()  # a comparison links to its own, which may be gone
    if directory.exists():
        with contextlib.suppress(OSError, ValueError, EOFError):  # missing or not whole
            arrays = _open(crop_set, directory)
            if all(map(_are_those_of_manifest, arrays.values())):
                return arrays
        logger.warning("%s: not the pixels of the manifest; decoding the crops again", directory)
    with staged(directory) as folder:
        for split in SPLITS:
            _write_images(crop_set, split, folder / f"{split}.npy")
    return _open(crop_set, directory)


def with_fraction(arrays: SplitArrays, fraction: float, *, seed: int) -> SplitArrays:
    """Keeps a share of the images of every class, with all their crops, in memory.

    Args:
      arrays: a split.
      fraction: above 0; each class keeps at least one image. What is kept for a smaller fraction is
        kept for a larger one, too.
      seed: of the order in which images are added.
    """
    if fraction == 1:
        return arrays
    kept: set[str] = set()
    for label in {record.label for record in arrays.records}:
        sources = sorted({record.source for record in arrays.records if record.label == label})
        order = named_generator(seed, "fraction", label).permutation(sources).tolist()
        kept.update(order[: max(1, round(fraction * len(order)))])
    rows = [n for n, record in enumerate(arrays.records) if record.source in kept]
    records = tuple(arrays.records[n] for n in rows)
    return SplitArrays(arrays.images[rows], arrays.labels[rows], records)


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


def _open(crop_set: CropSet, directory: Path) -> dict[str, SplitArrays]:
    arrays = {}
    for split in SPLITS:
        records = tuple(crop_set.split(split))
        labels = np.array([crop_set.class_names.index(r.label) for r in records], np.int32)
        images = np.load(directory / f"{split}.npy", mmap_mode="r")
        arrays[split] = SplitArrays(images, labels, records)
    return arrays


def _are_those_of_manifest(arrays: SplitArrays) -> bool:
    hashes = parallel_map(pixel_sha256, arrays.images, title="verifying arrays")
    return hashes == [record.sha256 for record in arrays.records]


def _write_images(crop_set: CropSet, split: str, path: Path) -> None:
    records = crop_set.split(split)
    first = read_crop(crop_set.directory, crop_set.records[0])
    images = create_array(path, (len(records), *first.shape), first.dtype)

    def decode(row: int) -> None:
        images[row] = read_crop(crop_set.directory, records[row])

    parallel_map(decode, range(len(records)), title=f"decoding {split}")
    images.flush()
