"""From a config to verified crops, their arrays and the audit: all that happens before training.

Nothing here imports JAX: the verbs `crop` and `check` run on a machine without it.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from jaxcells.config import data_seed, data_source
from jaxcells.data import synthetic
from jaxcells.data.arrays import SplitArrays, open_arrays
from jaxcells.data.audit import Audit, audit_crops, describe_audit
from jaxcells.data.crop_set import CropSet
from jaxcells.data.crop_writer import prepare_crop_set
from jaxcells.data.tfds_source import export_tfds
from jaxcells.files import Error

logger = logging.getLogger("jaxcells")


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """What training and evaluation need of the images.

    Attributes:
      crop_set: the crops with their manifest.
      arrays: pixels and labels of "train", "val" and "test".
      audit: what the audit found.
      seconds: how long it all took.
    """

    crop_set: CropSet
    arrays: Mapping[str, SplitArrays]
    audit: Audit
    seconds: float


def prepare_crops(config: ConfigDict, workdir: Path) -> CropSet:
    """Makes, or verifies and reuses, the crop set of a config in `workdir/crops`."""
    source, root = data_source(config), config.data.root
    if source == "sample":
        root = workdir / "sample"
        logger.info("data.root is not set: using the built-in sample of simulated cells, %s", root)
        synthetic.write_sample(root, seed=data_seed(config))
    elif source.startswith("tfds:"):
        root = workdir / "tfds"
        export_tfds(source.removeprefix("tfds:"), root, data_dir=config.data.root or None)
    folder, images = workdir.resolve(), Path(root).expanduser().resolve()
    if source == "folder" and (folder == images or images in folder.parents):
        raise Error(
            f"--workdir {workdir} lies in the image folder {root}, whose sub-folders are classes; "
            "choose a workdir outside"
        )
    return prepare_crop_set(
        workdir / "crops",
        root,
        seed=data_seed(config),
        crop_size=config.data.crop_size,
        crops_per_class=config.data.crops_per_class,
        split=tuple(config.data.split),
        split_by=config.data.split_by,
        border=tuple(config.data.border),
        min_foreground=config.data.min_foreground,
        plane=config.data.plane,
    )


def prepare_data(config: ConfigDict, workdir: Path) -> PreparedData:
    """Makes or reuses crops and arrays, audits them and prints what was found.

    Raises:
      Error: anything wrong with the images or settings. Errors of the audit are not raised here.
    """
    start = time.monotonic()
    crop_set = prepare_crops(config, workdir)
    arrays = open_arrays(crop_set, workdir / "arrays")
    audit = audit_crops(crop_set, arrays)
    logger.info("%s", describe_audit(audit, crop_set.class_names))
    return PreparedData(crop_set, arrays, audit, time.monotonic() - start)
