"""The crop set as a TensorFlow Datasets data set, prepared and read back without TensorFlow."""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxcells.data.images import read_image
from jaxcells.data.manifest import CropRecord, pixel_sha256, read_manifest
from jaxcells.data.tfds_source import export_tfds, import_tfds, read_data_source
from jaxcells.files import Error, file_sha256

__all__ = ["export_tfds", "prepare_tfds", "read_data_source"]

_VERSION = "1.0.0"


def prepare_tfds(
    crop_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    *,
    name: str = "jaxcells_crops",
) -> Any:
    """Prepares a crop set as the TFDS data set `name` under `data_dir`, or reuses the one there.

    Features: `image` (Image for 8-bit PNG crops, else a zlib Tensor [H, W, C] of the crops' own
    dtype), `label` (ClassLabel with the class names), `crop`, `channel`, `source`, `group` (Text).
    The splits are those of the crop set.

    Args:
      crop_dir: the folder `crops/` with its manifest.csv.
      data_dir: where TFDS keeps its data sets.
      name: name of the data set, in lower case with underscores.

    Returns:
      A `tfds.core.DatasetBuilder`; its `as_data_source(split)` reads the examples.

    Raises:
      Error: the crops are not those of the manifest, or of several kinds, or another crop set was
        prepared under this name.
    """
    tfds = import_tfds()
    crop_dir, data_dir = Path(crop_dir), Path(data_dir).expanduser()
    records = read_manifest(crop_dir / "manifest.csv")
    if not records:
        raise Error(f"{crop_dir / 'manifest.csv'}: lists no crops; delete {crop_dir}, draw again")
    manifest_sha256 = file_sha256(crop_dir / "manifest.csv")
    prepared = data_dir / name / _VERSION
    if prepared.exists():
        builder = tfds.builder_from_directory(prepared)
        if (builder.info.metadata or {}).get("manifest_sha256") != manifest_sha256:
            raise Error(
                f"{prepared}: holds another crop set than {crop_dir}; delete that folder, or "
                "choose another data_dir or name"
            )
        return builder

    builder_class = _define_builder(tfds, name, crop_dir, records, manifest_sha256)
    builder = builder_class(data_dir=data_dir, file_format="array_record")
    # TFDS tells its progress on standard output, and makes a folder for downloads.
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=downloads)
    return builder


def _define_builder(
    tfds: Any, name: str, crop_dir: Path, records: Sequence[CropRecord], manifest_sha256: str
) -> type[Any]:
    """Returns the builder's class; made here because its base is imported late."""
    first = read_image(crop_dir / records[0].crop)
    channels, dtype = first.shape[-1], first.dtype
    # Without TensorFlow, TFDS decodes 8-bit images only, and takes them encoded only.
    as_image = dtype == "uint8" and channels in (1, 3) and records[0].crop.endswith(".png")
    shape = (None, None, channels)

    class CropSetBuilder(  # type: ignore[call-arg]
        tfds.core.GeneratorBasedBuilder, skip_registration=True
    ):
        VERSION = tfds.core.Version(_VERSION)
        # Where TFDS looks for checksums of downloads, with a package that it does not install.
        code_path = None

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description="Microscopy crops by class, drawn and split by jaxcells.",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=shape, encoding_format="png")
                        if as_image
                        else tfds.features.Tensor(shape=shape, dtype=dtype, encoding="zlib"),
                        "label": tfds.features.ClassLabel(names=sorted({r.label for r in records})),
                        "crop": tfds.features.Text(),
                        "channel": tfds.features.Text(),
                        "source": tfds.features.Text(),
                        "group": tfds.features.Text(),
                    }
                ),
                supervised_keys=("image", "label"),
                metadata=tfds.core.MetadataDict({"manifest_sha256": manifest_sha256}),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
            del dl_manager
            splits = dict.fromkeys(record.split for record in records)
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
            for record in records:
                if record.split == split:
                    yield record.crop, _example(crop_dir, record, shape[-1], dtype, as_image)

    CropSetBuilder.name = name
    return CropSetBuilder


def _example(
    crop_dir: Path, record: CropRecord, channels: int, dtype: Any, as_image: bool
) -> dict[str, Any]:
    """Returns a crop with its features, checked against the manifest."""
    path = crop_dir / record.crop
    pixels = read_image(path)
    if pixel_sha256(pixels) != record.sha256:
        raise Error(
            f"{path}: the pixels are not those of manifest.csv; delete {crop_dir} to draw again"
        )
    if (pixels.shape[-1], pixels.dtype) != (channels, dtype):
        raise Error(
            f"{path}: {pixels.shape[-1]} channels of {pixels.dtype}, others have {channels} of "
            f"{dtype}; a TFDS data set needs crops of one kind"
        )
    return {
        "image": io.BytesIO(path.read_bytes()) if as_image else pixels,
        "label": record.label,
        "crop": record.crop,
        "channel": record.channel,
        "source": record.source,
        "group": record.group,
    }
