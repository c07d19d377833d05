"""TensorFlow Datasets as a source of images and as a form of the crop set, without TensorFlow.

`data.source="tfds:NAME"` exports a prepared data set to image files, and from there on it is a
folder of images like any other. A crop set becomes a data set that others read with TFDS.
"""

import contextlib
import io
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxcells.data.crop_set import open_crop_set, verify_pixels
from jaxcells.data.fields import SPLIT_OF, SPLITS, is_hidden
from jaxcells.data.images import read_image, write_crop
from jaxcells.data.rng import named_generator
from jaxcells.files import Error, logger, read_json, staged, write_json
from jaxcells.text import one_line

_MARKER = ".tfds.json"


def export_images(name: str, root: Path, *, data_dir: str | Path | None = None) -> None:
    """Writes the examples of a prepared TFDS data set as image files, pixel for pixel.

    A data set with a train and a test split becomes `root/{train,val,test}/<class>/`; if it has no
    validation split, a tenth of the training examples, drawn at random, goes to `val`. A data set
    with one split becomes `root/<class>/`. PNG and JPEG files stay as they are stored. A complete
    export of the same name is reused.

    Args:
      name: "NAME", "NAME/CONFIG", "NAME:VERSION" or "NAME/CONFIG:VERSION".
      root: the folder to write.
      data_dir: where TFDS keeps its data sets; None: `$TFDS_DATA_DIR` or ~/tensorflow_datasets.

    Raises:
      Error: no such data set, or not prepared in a format that is read without TensorFlow; it has
        no image and class label, has other splits, has examples without a label or damaged ones;
        or `root` is something else.
    """
    if root.exists():
        there = sum(path.is_file() and not is_hidden(path) for path in root.rglob("*"))
        expected = {"name": name, "num_images": there}
        if (root / _MARKER).is_file() and read_json(root / _MARKER) == expected:
            return
        raise Error(f"{root}: is not all of tfds:{name}; delete it, or choose another workdir")
    builder = _open_builder(name, data_dir)
    our_splits = _our_splits(builder, name)
    number = sum(map(len, our_splits.values()))
    with staged(root) as folder:
        for split, ours in our_splits.items():
            _export_split(builder, name, split, ours, folder)
        write_json(folder / _MARKER, {"name": name, "num_images": number})
    logger.info("exported %d images of %s to %s", number, builder.info.full_name, root)


def prepare_tfds(crop_dir: Path, data_dir: Path) -> Any:
    """Prepares a crop set as the TFDS data set `jaxcells_crops`, or reuses the one there.

    Features: `image` (Image for 8-bit PNG crops, else a zlib Tensor [H, W, C] of the crops' own
    dtype), `label` (ClassLabel with the class names), `crop`, `channel`, `source`, `group` (Text).
    The splits are those of the crop set.

    Args:
      crop_dir: the folder `crops/` with its manifest.csv.
      data_dir: where TFDS keeps its data sets.

    Returns:
      A `tfds.core.DatasetBuilder`; its `as_data_source(split)` reads the examples.

    Raises:
      Error: the crops are not those of the manifest, or another crop set was prepared there.
    """
    tfds, crop_set = _import_tfds(), open_crop_set(crop_dir)
    verify_pixels(crop_set)
    first = read_image(crop_set.directory / crop_set.records[0].crop)  # all crops are alike
    shape = (None, None, first.shape[-1])
    # TFDS takes no other images without TensorFlow.
    is_png = first.dtype == "uint8" and first.shape[-1] in (1, 3)
    if is_png:
        image = tfds.features.Image(shape=shape, encoding_format="png")
    else:
        image = tfds.features.Tensor(shape=shape, dtype=first.dtype, encoding="zlib")
    label = tfds.features.ClassLabel(names=crop_set.class_names)
    texts = dict.fromkeys(("crop", "channel", "source", "group"), tfds.features.Text())
    base: Any = tfds.core.GeneratorBasedBuilder

    class CropSetBuilder(base, skip_registration=True):  # type: ignore[call-arg]
        name = "jaxcells_crops"
        VERSION = tfds.core.Version("1.0.0")
        # Where TFDS looks for checksums of downloads, with a package that it does not install.
        code_path = None

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description="Microscopy crops by class, drawn and split by jaxcells.",
                features=tfds.features.FeaturesDict({"image": image, "label": label, **texts}),
                supervised_keys=("image", "label"),
                metadata=tfds.core.MetadataDict(manifest_sha256=crop_set.manifest_sha256),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
            for record in crop_set.split(split):
                path = crop_set.directory / record.crop
                example = {key: getattr(record, key) for key in ("label", *texts)}
                example["image"] = io.BytesIO(path.read_bytes()) if is_png else read_image(path)
                yield record.crop, example

    builder = CropSetBuilder(data_dir=data_dir, file_format="array_record")
    # TFDS tells its progress on standard output, and makes a folder for downloads.
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=downloads)
    if (builder.info.metadata or {}).get("manifest_sha256") != crop_set.manifest_sha256:
        raise Error(f"{builder.data_dir}: holds other crops; delete it, or choose another folder")
    return builder


def _import_tfds() -> Any:
    """Imports TensorFlow Datasets, when it is wanted and not before, and quietens it."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    # It advises to install OpenCV, and more; its errors arrive as exceptions.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return tfds


def _open_builder(name: str, data_dir: str | Path | None) -> Any:
    """Returns the read-only builder of a prepared data set."""
    tfds = _import_tfds()
    folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=str(folder))
        builder.as_data_source()  # of all splits: fails where TensorFlow alone could read them
        return builder
    except Exception as error:  # Whatever TFDS raises at a damaged file or a strange name.
        found = sorted(path.parent for path in folder.glob("*/**/features.json"))
        there = ", ".join(path.relative_to(folder).as_posix() for path in found) or "none"
        raise Error(
            f"tfds:{name}: cannot be opened in {folder} ({one_line(error):.150}); prepared there: "
            f"{there}; set data.source=tfds:NAME, tfds:NAME/CONFIG or tfds:NAME/CONFIG:VERSION and "
            "data.root=FOLDER, or prepare it with TensorFlow by "
            "`tfds build NAME --overwrite --file_format=array_record --data_dir=FOLDER`"
        ) from error


def _our_splits(builder: Any, name: str) -> dict[str, list[str]]:
    """Returns, by split, our split of each of its examples; "" where we split."""
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    if len(sizes) == 1:
        return {split: [""] * size for split, size in sizes.items()}
    ours = {s: [SPLIT_OF[s]] * size for s, size in sizes.items() if s in SPLIT_OF}
    if not {"train", "test"} <= ours.keys():
        has = f"has the splits {', '.join(sizes)}"
        raise Error(f"tfds:{name}: {has}; needed are train and test, or only one")
    if others := sorted(sizes.keys() - ours.keys()):
        logger.warning("tfds:%s: leaving out the splits %s", name, ", ".join(others))
    if len(ours) == 2:
        logger.warning("tfds:%s: no validation split; a tenth of train is held out for it", name)
        # Not every tenth in turn: the classes may come in turn as well.
        for index in named_generator(0, "validation").permutation(sizes["train"])[::10]:
            ours["train"][index] = "val"
    return ours


def _export_split(builder: Any, name: str, split: str, ours: Sequence[str], folder: Path) -> None:
    """Writes the examples of a split as `<folder>/<our split>/<class>/NNNNNN.png` or `.jpg`."""
    tfds, features = _import_tfds(), dict(builder.info.features.items())
    image, label = builder.info.supervised_keys or ("image", "label")
    is_image = getattr(features.get(image), "np_dtype", None) in (np.uint8, np.uint16, np.float32)
    if not is_image or not isinstance(features.get(label), tfds.features.ClassLabel):
        found = one_line(features)
        raise Error(f"tfds:{name}: {image!r} and {label!r} are not an image and its class: {found}")
    # float32 images are stored as four bytes a pixel, which only TFDS puts together again.
    is_file = isinstance(features[image], tfds.features.Image) and features[image].np_dtype != "f4"
    decoders = {image: tfds.decode.SkipDecoding()} if is_file else None
    source = builder.as_data_source(split, decoders=decoders)
    for index in tqdm(range(len(source)), desc=f"exporting {split}", disable=None, leave=False):
        where = f"tfds:{name}, split {split}, example {index}"
        try:
            example = source[index]
        except (RuntimeError, ImportError, OSError, ValueError) as error:
            raise Error(f"{where}: cannot be read ({one_line(error):.150})") from error
        if example[label] < 0:
            raise Error(f"{where}: has no label; choose a data set with all examples labelled")
        class_name = features[label].int2str(int(example[label]))
        # A slash, and a dot that would hide the folder, become %XX.
        class_name = re.sub(r"^\.|/", lambda match: f"%{ord(match[0]):02X}", class_name)
        stem = folder / ours[index] / class_name / f"{index:06d}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        _write_image(stem, example[image], features[image].shape[-1])


def _write_image(stem: Path, image: bytes | np.ndarray, channels: int) -> None:
    """Writes an image file as it was stored; grey becomes the declared number of channels."""
    if isinstance(image, bytes):
        path = stem.with_suffix(".jpg" if image.startswith(b"\xff\xd8") else ".png")
        path.write_bytes(image)
        pixels = read_image(path)
        if (pixels.shape[2], channels) != (1, 3):
            return
        path.unlink()
        image = np.repeat(pixels, 3, axis=2)
    write_crop(stem, image)
