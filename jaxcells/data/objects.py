"""Crops centred on cells that a segmentation has outlined: one crop a cell.

A mask lies beside its image and has its name with an ending: `f0.png` and `f0_mask.tif` for the
ending "_mask". Its pixels are whole numbers, 0 being background. With several other values each is
a cell; with one, every connected region (8-connected) is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL.PngImagePlugin import PngImageFile
from scipy import ndimage
from tifffile import TiffFile

from jaxcells.data.fields import Field
from jaxcells.data.images import opened
from jaxcells.data.parallel import parallel_map
from jaxcells.data.picture import Refused
from jaxcells.files import Error
from jaxcells.text import by, some

_SUFFIXES = (".png", ".tif", ".tiff")

Places = Mapping[str, Sequence[tuple[int, int]]]
"""The upper left pixels (y, x) of possible crops, for every field by name."""


def find_cells(
    fields: Sequence[Field], ending: str, crop_size: int, border: tuple[int, int, int, int]
) -> tuple[Places, str]:
    """Returns where the crops of all outlined cells lie.

    A crop has the middle of its cell's bounding box in its centre, or as near as the edges of the
    field inside its border allow. Cells whose middle lies in the border give no crop, and cells
    whose crops would be the same give one.

    Args:
      fields: usable fields.
      ending: of the masks' names.
      crop_size: side of a crop in pixels.
      border: pixels left out at the (top, right, bottom, left).

    Returns:
      The places, and a note for the report.

    Raises:
      Error: images without a mask, or with two; a mask that cannot be read, or has another size; a
        class without a cell.
    """
    masks = {}
    for field in fields:
        beside = [field.path.with_name(f"{field.path.stem}{ending}{s}") for s in _SUFFIXES]
        masks[field.name] = [path for path in beside if path.is_file()]
    if wrong := [name for name, paths in masks.items() if len(paths) != 1]:
        raise Error(
            f"data.mask={ending}: {len(wrong)} of {len(fields)} images have no mask beside them or "
            f"two: {some(wrong)}; add {Path(wrong[0]).stem}{ending}.png or .tif, or leave such "
            "images out with data.exclude"
        )
    top, right, bottom, left = border

    def outline(field: Field) -> tuple[list[tuple[int, int]], int, int]:
        height, width = field.info.height, field.info.width
        labels = read_labels(masks[field.name][0], (height, width))
        is_binary = len(np.unique(labels[labels != 0])) <= 1
        regions = ndimage.label(labels, np.ones((3, 3)))[0] if is_binary else labels
        boxes = [box for box in ndimage.find_objects(regions) if box]
        middle = np.array([[(s.start + s.stop) // 2 for s in box] for box in boxes]).reshape(-1, 2)
        low, high = np.array([top, left]), np.array([height - bottom, width - right])
        middle = middle[((low <= middle) & (middle < high)).all(axis=1)]
        places = np.clip(middle - crop_size // 2, low, high - crop_size).tolist()
        return sorted({(y, x) for y, x in places}), len(boxes), is_binary and len(boxes) > 0

    results = parallel_map(outline, fields, title="reading masks")
    places = {field.name: found for field, (found, *_) in zip(fields, results, strict=True)}
    for label in sorted({field.label for field in fields}):
        if not any(places[field.name] for field in fields if field.label == label):
            raise Error(f"data.mask={ending}: the masks of class {label!r} show no cell")
    num_crops, num_cells, num_binary = np.sum([(len(p), n, b) for p, n, b in results], axis=0)
    touching = f"; touching cells count as one in {num_binary} masks of a single value"
    return places, (
        f"data.mask={ending}: {num_cells} cells in {len(fields)} images, {num_crops} with a crop "
        f"of their own (not in the border, nor with another's crop){touching * bool(num_binary)}"
    )


def read_labels(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Reads a mask, integers or booleans [H, W], as they are stored.

    Args:
      path: a TIFF file of one plane, or a grey or indexed PNG file, whose indices are taken.
      shape: (H, W) of its image.

    Raises:
      ImageError: it cannot be read, has another size, colours or fractions.
    """
    with opened(path) as file:
        if path.suffix == ".png":
            labels = np.array(PngImageFile(file))
        else:
            labels = TiffFile(file).asarray(maxworkers=1).squeeze()
        if labels.shape != shape or labels.dtype.kind not in "uib":
            raise Refused(
                f"has {by(labels.shape)} {labels.dtype} pixels: a mask has whole numbers, and "
                f"{by(shape)} of them like its image"
            )
        return labels
