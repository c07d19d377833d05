"""manifest.csv: where every crop came from, where it went, and the hash of its pixels."""

import csv
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxcells.files import Error

_COLUMNS = ("crop", "class", "channel", "source", "group", "y", "x", "split", "sha256")


@dataclasses.dataclass(frozen=True)
class CropRecord:
    """A line of manifest.csv.

    Attributes:
      crop: path of the crop below `crops/`, with forward slashes.
      label: name of its class (column "class").
      channel: channel of the device, "" where the class is one channel.
      source: path of the field below the image folder.
      group: what must not stand on two sides of the split.
      y: row of the crop's upper left pixel in the field.
      x: column of the crop's upper left pixel in the field.
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
    split: str
    sha256: str


def pixel_sha256(image: np.ndarray) -> str:
    """Returns the SHA-256 of an image's dtype, shape and little-endian pixels, in hexadecimal."""
    little = np.ascontiguousarray(image, image.dtype.newbyteorder("<"))
    digest = hashlib.sha256(f"{image.dtype.name}{image.shape}".encode())
    digest.update(little.data)
    return digest.hexdigest()


def write_manifest(path: Path, records: Sequence[CropRecord]) -> None:
    """Writes manifest.csv."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows(map(dataclasses.astuple, records))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(path: Path) -> list[CropRecord]:
    """Reads manifest.csv.

    Raises:
      Error: the file is missing or not a manifest.
    """
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError:
        raise Error(f"{path}: missing; delete the folder {path.parent} and draw again") from None
    if not rows or tuple(rows[0]) != _COLUMNS:
        raise Error(f"{path}: not a manifest: its first line should be {','.join(_COLUMNS)}")
    try:
        return [
            CropRecord(crop, label, channel, source, group, int(y), int(x), split, sha256)
            for crop, label, channel, source, group, y, x, split, sha256 in rows[1:]
        ]
    except ValueError as error:
        raise Error(
            f"{path}: a line is damaged ({error}); delete {path.parent}, draw again"
        ) from error
