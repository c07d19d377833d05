"""Takes a trained network, or the crops it saw, out of a workdir, for other programs to read."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from jaxcells import __version__
from jaxcells.data.tfds import prepare_tfds
from jaxcells.files import Error, Workdir, logger, write_whole
from jaxcells.models import create_model, require_segments
from jaxcells.models.weights import to_torch
from jaxcells.training.checkpoints import CheckpointMeta, Which, restore_variables

_NORMALIZE = (
    "input = ((pixel - low) / (high - low) - mean) / std, per channel, without clipping; an image "
    "of one channel becomes as many equal ones as mean has values"
)


def export_weights(workdir: Workdir, output: Path | None = None, which: Which = "best") -> Path:
    """Writes a checkpoint as one safetensors file with the names and layouts of timm and torch.

    The file of a residual network loads unchanged into torchvision's and timm's module of the same
    name, with strict=True; torch fills in the batch counters. A plain network has the same names
    without shortcuts; a pre-activation network has names of its own kind, `layer1.1.conv1.weight`
    for what a scan runs too. Neither torchvision nor timm has a module for these two, nor for other
    widths than 64. All load here, as init=FILE.

    Parameters and statistics are float32, whatever the dtype of the computation was. The file's
    metadata hold what using it needs, each value a text: "class_names" (JSON, the position is the
    label), "normalization" (JSON, with a sentence on how to apply it) and "model" (JSON, arguments
    of `create_model`); and where it comes from: "step", "manifest_sha256" of the crops, "init",
    "images_by_split" (JSON, the images that it was trained and chosen by, by hash) and "jaxcells",
    our version.

    Args:
      workdir: of a run.
      output: a file that is not there yet, *.safetensors; None: weights.safetensors in the
        workdir, which replaces the one of an earlier export.
      which: a step, "latest" or "best".

    Returns:
      The path of the file, which is either whole or not there.

    Raises:
      Error: `output` exists or has another suffix, no such checkpoint, or it is damaged; or the
        network is none whose names torch knows.
    """
    path = workdir.path / "weights.safetensors" if output is None else output.expanduser()
    if path.suffix != ".safetensors":
        raise Error(f"{path}: weights are written as safetensors; end it in .safetensors")
    if output is not None and path.exists():
        raise Error(f"{path}: exists already and is kept; choose another name")
    if output is not None and not path.parent.is_dir():
        raise Error(f"{path}: there is no folder {path.parent}; make it first")
    variables, meta = restore_variables(workdir.checkpoints, which)
    require_segments(create_model(**meta.model), meta.model["name"], "the export of weights")
    with write_whole(path) as file:
        file.buffer.write(_serialize(to_torch(variables), _metadata(meta)))
    logger.info(
        "%s of step %d (%.1f MB) is in %s; init=%s starts a run from it",
        *(meta.model["name"], meta.step, path.stat().st_size / 1e6, path, path),
    )
    return path


def export_tfds(workdir: Workdir, output: Path | None = None) -> Path:
    """Prepares the crop set as the TensorFlow Datasets data set `jaxcells_crops`.

    See `jaxcells.data.tfds.prepare_tfds` for its features.

    Args:
      workdir: of a run, or of crops alone.
      output: the folder of TFDS data sets; None: tensorflow_datasets in the workdir.

    Returns:
      The folder of the data set.

    Raises:
      Error: no crops, changed ones, or other crops prepared there.
    """
    data_dir = workdir.path / "tensorflow_datasets" if output is None else output.expanduser()
    builder = prepare_tfds(workdir.crops, data_dir)
    reads = f"tfds.builder_from_directory({builder.data_dir!r}).as_data_source('train')"
    logger.info("TensorFlow Datasets reads the crops by %s", reads)
    return Path(builder.data_dir)


def _metadata(meta: CheckpointMeta) -> dict[str, str]:
    return {
        "format": "pt",  # what timm and transformers look for
        "architecture": meta.model["name"],
        "num_classes": str(meta.model["num_classes"]),
        "class_names": json.dumps(meta.class_names),
        "normalization": json.dumps(
            {**dataclasses.asdict(meta.normalization), "apply": _NORMALIZE}
        ),
        "model": json.dumps(meta.model),
        "step": str(meta.step),
        "manifest_sha256": meta.manifest_sha256,
        "init": meta.init["kind"],
        "images_by_split": json.dumps(meta.images_by_split),
        "jaxcells": __version__,
    }


def _serialize(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file, the same bytes at every call.

    The library alone writes the metadata in an order that changes, and with it the file's hash.
    """
    whole = save(dict(tensors), dict(metadata))
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start]) | {"__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(whole)[start:]))
