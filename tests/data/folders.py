"""Small image folders for the tests of the data path."""

from pathlib import Path

import numpy as np
from PIL import Image

from jaxcells.data.fields import Field
from jaxcells.data.images import ImageInfo


def textured(height: int, width: int, seed: int, channels: int = 1) -> np.ndarray:
    """Returns uint8 [H, W] or [H, W, C] noise: no two places of it are alike."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def write_folder(root: Path, layout: dict[str, int], size: tuple[int, int] = (60, 80)) -> Path:
    """Writes `layout[folder]` images into each folder below `root`."""
    for number, (folder, count) in enumerate(sorted(layout.items())):
        for image in range(count):
            pixels = textured(*size, seed=1000 * number + image)
            write_image(root / folder / f"field{image}.png", pixels)
    return root


def make_fields(layout: dict[str, int], size: tuple[int, int] = (300, 400)) -> list[Field]:
    """Returns `layout["class/channel"]` fields of each channel, for which there are no files."""
    info = ImageInfo(*size, channels=1, dtype="uint8", notes=())
    fields = []
    for folder, count in layout.items():
        label, _, channel = folder.partition("/")
        for number in range(count):
            name = f"{folder}/plate{number % 5}_{number}.png"
            fields.append(Field(Path(name), label, channel, name, name, info))
    return fields
