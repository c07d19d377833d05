"""Prepared TensorFlow Datasets data sets as a source of images, read without TensorFlow.

`data.source="tfds:NAME"` exports such a data set to image files, and from there on it is a folder
of images like any other.
"""

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcells.data.images import read_image, write_crop
from jaxcells.data.parallel import parallel_map
from jaxcells.data.rng import named_generator
from jaxcells.files import Error

logger = logging.getLogger("jaxcells")

_SIDE_OF_SPLIT = {
    "train": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "test": "test",
}
_MARKER = ".tfds.json"
_HOW_TO_NAME = (
    "set --config.data.source=tfds:NAME, tfds:NAME/CONFIG or tfds:NAME/CONFIG:VERSION, and "
    "--config.data.root to the folder of TFDS data sets"
)


def read_data_source(
    name: str, *, split: str, data_dir: str | os.PathLike[str] | None = None
) -> Sequence[Mapping[str, Any]]:
    """Opens a split of a prepared TFDS data set for random access.

    Args:
      name: "NAME", "NAME/CONFIG", "NAME:VERSION" or "NAME/CONFIG:VERSION".
      split: its name in the data set, such as "train".
      data_dir: where TFDS keeps its data sets; None: `$TFDS_DATA_DIR` or ~/tensorflow_datasets.

    Returns:
      The examples: dictionaries of NumPy values by feature.

    Raises:
      Error: no such data set or split, or not prepared in a format that is read without TensorFlow.
    """
    return _data_source(_open_builder(name, data_dir), name, split)


def export_tfds(
    name: str, root: str | os.PathLike[str], *, data_dir: str | os.PathLike[str] | None = None
) -> None:
    """Writes the examples of a prepared TFDS data set as image files, pixel for pixel.

    A data set with a train and a test split becomes `root/{train,val,test}/<class>/`; if it has no
    validation split, a tenth of the training examples, drawn at random, goes to `val`. A data set
    with one split becomes `root/<class>/`. A complete export of the same name is reused.

    Args:
      name: see `read_data_source`.
      root: the folder to write.
      data_dir: see `read_data_source`.

    Raises:
      Error: as `read_data_source`; or the data set has no image and class label, has other splits,
        has examples without a label; or `root` is something else.
    """
    root = Path(root)
    if root.exists():
        _check_export(root, name)
        return
    builder = _open_builder(name, data_dir)
    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    num_images = 0
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    for split, sides in _sides(sizes, name).items():
        num_images += _export_split(builder, name, split, sides, partial)
    marker = {"name": name, "data_set": builder.info.full_name, "num_images": num_images}
    (partial / _MARKER).write_text(json.dumps(marker), encoding="utf-8")
    partial.rename(root)
    logger.info("exported %d images of tfds:%s to %s", num_images, name, root)


def import_tfds() -> Any:
    """Imports TensorFlow Datasets, when it is wanted and not before, and quietens it.

    Raises:
      Error: it is not installed.
    """
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise Error(
            f"data sets of TFDS need packages that are not installed here ({error}); "
            "pip install tensorflow-datasets array-record, which Windows does not have"
        ) from error
    tfds.disable_progress_bar()
    logging.getLogger("absl").addFilter(_is_not_chatter)
    return tfds


def _is_not_chatter(record: logging.LogRecord) -> bool:
    """Keeps TFDS's advice (install OpenCV, …) off the terminal; its errors arrive as exceptions."""
    return record.levelno >= logging.ERROR or "tensorflow_datasets" not in record.pathname


def _open_builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """Returns the read-only builder of a prepared data set."""
    tfds = import_tfds()
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    try:
        return builder_from_files(name, data_dir=str(folder))
    except tfds.core.DatasetNotFoundError:
        there = sorted({path.parent.relative_to(folder).as_posix() for path in _prepared(folder)})
        dataset = re.split("[/:]", name)[0]
        known = dataset in tfds.list_builders(with_community_datasets=False)
        raise Error(
            f"tfds:{name}: no such data set is prepared in {folder} (there: "
            f"{', '.join(there) or 'none'}); "
            + (f"prepare it: {_how_to_prepare(name, folder)}" if known else _HOW_TO_NAME)
        ) from None
    except Exception as error:  # Whatever the parsers below it raise at a damaged file or name.
        raise Error(
            f"tfds:{name}: cannot be opened in {folder} ({_first_line(error)}); {_HOW_TO_NAME}"
        ) from error


def _data_source(builder: Any, name: str, split: str, *, encoded: bool = False) -> Sequence[Any]:
    """Returns a split's examples; `encoded`: images as the PNG or JPEG file that TFDS stored."""
    tfds = import_tfds()
    if split not in builder.info.splits:
        raise Error(f"tfds:{name} has no split {split!r}; it has {', '.join(builder.info.splits)}")
    decoders = None
    if encoded:
        # float32 images are stored as four bytes a pixel, which only TFDS puts together again.
        decoders = {
            key: tfds.decode.SkipDecoding()
            for key, feature in builder.info.features.items()
            if isinstance(feature, tfds.features.Image) and feature.np_dtype != np.float32
        }
    try:
        return builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise Error(
            f"tfds:{name}: is prepared as {builder.info.file_format.value} in {builder.data_dir}, "
            "which only TensorFlow reads; delete that folder and prepare it again: "
            + _how_to_prepare(
                name, Path(builder.data_dir).parents[builder.info.full_name.count("/")]
            )
        ) from error
    except (ImportError, OSError, ValueError) as error:
        raise Error(f"tfds:{name}: cannot be read ({_first_line(error)})") from error


def _export_split(builder: Any, name: str, split: str, sides: Sequence[str], folder: Path) -> int:
    """Writes one split as `<folder>/<side>/<class>/NNNNNN.png` and returns its number of images."""
    features = builder.info.features
    image, label = _image_and_label(features, name)
    source = _data_source(builder, name, split, encoded=True)
    # Decoding and writing run on all cores; readers of array_record promise nothing about threads.
    lock = threading.Lock()

    def write(index: int) -> None:
        try:
            with lock:
                example = _read(source, index)
            class_name = _folder_name(_class_name(features[label], int(example[label])))
            stem = folder / sides[index] / class_name / f"{index:06d}"
            stem.parent.mkdir(parents=True, exist_ok=True)
            pixels = example[image]
            if isinstance(pixels, bytes):
                pixels = _decode(pixels, stem, channels=features[image].shape[-1])
            write_crop(stem, pixels)
        except Error as error:
            raise Error(f"tfds:{name}, split {split}, example {index}: {error}") from error

    return len(parallel_map(write, range(len(source)), title=f"exporting {split}"))


def _read(source: Sequence[Any], index: int) -> Any:
    try:
        return source[index]
    except (RuntimeError, ImportError, OSError, ValueError) as error:
        raise Error(f"cannot be read ({_first_line(error)})") from error


def _image_and_label(features: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Returns the names of the one image feature and the one class label of a data set."""
    tfds = import_tfds()

    def is_image(feature: Any) -> bool:
        return isinstance(feature, tfds.features.Image) or (
            isinstance(feature, tfds.features.Tensor)
            and len(feature.shape) == 3
            and feature.np_dtype in (np.uint8, np.uint16, np.float32)
        )

    def is_label(feature: Any) -> bool:
        return isinstance(feature, tfds.features.ClassLabel)

    chosen = []
    for usual, fits, what in (("image", is_image, "image"), ("label", is_label, "class label")):
        fitting = [key for key, feature in features.items() if fits(feature)]
        if usual not in fitting and len(fitting) != 1:
            listed = ", ".join(f"{key}: {' '.join(repr(f).split())}" for key, f in features.items())
            raise Error(
                f"tfds:{name}: has {len(fitting) or 'no'} features that could be the {what}, and "
                f"none called {usual!r}; its features are {listed}; choose a data set of images "
                "with one class each"
            )
        chosen.append(usual if usual in fitting else fitting[0])
    return chosen[0], chosen[1]


def _sides(sizes: Mapping[str, int], name: str) -> dict[str, list[str]]:
    """Returns, by split, the side of ours of each of its examples; "" where we split."""
    if len(sizes) == 1:
        return {split: [""] * size for split, size in sizes.items()}
    by_side = {_SIDE_OF_SPLIT[split]: split for split in sizes if split in _SIDE_OF_SPLIT}
    if not {"train", "test"} <= set(by_side):
        raise Error(
            f"tfds:{name}: has the splits {', '.join(sizes)}; needed are either train, validation "
            "and test, or train and test, or only one; choose another data set or configuration"
        )
    if others := sorted(set(sizes) - set(by_side.values())):
        logger.warning("tfds:%s: leaving out the splits %s", name, ", ".join(others))
    sides = {split: [side] * sizes[split] for side, split in by_side.items()}
    if "val" not in by_side:
        train = sides[by_side["train"]]
        logger.warning("tfds:%s: no validation split; a tenth of train is held out for it", name)
        # Not every tenth in turn: the classes may come in turn as well.
        order = named_generator(0, "validation").permutation(len(train))
        for index in order[: max(1, len(train) // 10)]:
            train[index] = "val"
    return sides


def _check_export(root: Path, name: str) -> None:
    """Accepts a folder that `export_tfds` wrote for `name` and that is still whole."""
    try:
        marker = json.loads((root / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        marker = {}
    if marker.get("name") != name:
        what = f"images of tfds:{marker['name']}" if "name" in marker else "something else"
        raise Error(
            f"{root}: holds {what}, not the images of tfds:{name}; delete or rename the folder, or "
            "choose another --workdir"
        )
    images = [path for path in root.rglob("*") if path.is_file() and path.name[0] != "."]
    if len(images) != marker["num_images"]:
        raise Error(
            f"{root}: has {len(images)} of the {marker['num_images']} images of tfds:{name}; "
            "delete the folder to have them exported again"
        )


def _decode(encoded: bytes, stem: Path, *, channels: int) -> np.ndarray:
    """Decodes as every image of ours is decoded; grey becomes the declared number of channels."""
    path = stem.with_name(f"{stem.name}.encoded")
    path.write_bytes(encoded)
    try:
        pixels = read_image(path)
    except Error as error:
        raise Error(str(error).removeprefix(f"{path}: ")) from error
    path.unlink()
    return np.repeat(pixels, 3, axis=2) if (pixels.shape[2], channels) == (1, 3) else pixels


def _class_name(feature: Any, label: int) -> str:
    if label < 0:
        raise Error("has no label; only data sets with all examples labelled can be used")
    return feature.int2str(label)


def _folder_name(class_name: str) -> str:
    """Returns a class name as a visible folder: what a file system would not take becomes %XX."""
    return re.sub(r'^\.|[\\/:*?"<>|%\x00-\x1f]', lambda match: f"%{ord(match[0]):02X}", class_name)


def _prepared(folder: Path) -> list[Path]:
    return [path for depth in ("*/*", "*/*/*") for path in folder.glob(f"{depth}/features.json")]


def _how_to_prepare(name: str, folder: Path) -> str:
    dataset = name.split(":")[0]
    return (
        f"`tfds build {dataset} --file_format=array_record --data_dir={folder}` where TensorFlow "
        "is installed, or copy the folder from there"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
