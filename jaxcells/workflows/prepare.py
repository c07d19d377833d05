"""From a config to crops, their arrays and the audit: all that happens before training.

Nothing here imports JAX: the verbs `crop` and `check` run on a machine without it.
"""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from jaxcells.config import data_seed, data_source
from jaxcells.data.arrays import SplitArrays, open_arrays
from jaxcells.data.audit import Audit, audit_crops, describe_audit
from jaxcells.data.crop_set import CropSet, open_crop_set, prepare_crop_set, verify_pixels
from jaxcells.data.crops import CropSettings
from jaxcells.data.sample import write_sample
from jaxcells.data.tfds import export_images
from jaxcells.evaluation.figures import plot_examples
from jaxcells.files import Error, Workdir, lock_workdir, logger


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


def crop(config: ConfigDict, workdir: Workdir) -> None:
    """The verb `crop`: makes or reuses the crops and their manifest, no more."""
    check_place(config, workdir)
    with lock_workdir(workdir.path):
        prepare_crops(config, workdir)


def check(config: ConfigDict, workdir: Workdir) -> None:
    """The verb `check`: makes crops or verifies every file, audits them and shows some.

    While nothing is trained in the workdir, it may be repeated with other settings: the crops are
    then drawn again.

    Raises:
      Error: anything wrong with the images or settings, changed crops, and errors of the audit.
    """
    check_place(config, workdir)
    with lock_workdir(workdir.path):
        if workdir.crops.exists():
            crop_set = open_crop_set(workdir.crops)
            # Of a run, or of one in a comparison or cross-validation.
            runs = [workdir, *map(Workdir, workdir.path.glob("*/*/"))]
            if crop_set.settings == crop_settings(config) or any(run.is_trained for run in runs):
                verify_pixels(crop_set)
            else:
                logger.info("other settings, and nothing is trained here: drawing crops again")
                _draw_again(config, workdir)
        data = prepare_data(config, workdir)
        train, path = data.arrays["train"], workdir.figure("crops")
        plot_examples(train.images, train.labels, data.crop_set.class_names, path)
        logger.info("crops of every class are shown in %s", path)
        data.audit.raise_errors()


def _draw_again(config: ConfigDict, workdir: Workdir) -> None:
    """Draws other crops in the place of those that are there, which stay if that fails."""
    before = workdir.crops.with_name("crops.before")
    shutil.rmtree(before, ignore_errors=True)
    workdir.crops.rename(before)
    try:
        prepare_crops(config, workdir)
    except BaseException:
        before.rename(workdir.crops)
        raise
    for folder in (before, workdir.arrays):
        shutil.rmtree(folder, ignore_errors=True)


def prepare_data(config: ConfigDict, workdir: Workdir) -> PreparedData:
    """Makes or reuses crops and arrays, audits them and logs what was found.

    Raises:
      Error: anything wrong with the images or settings. Errors of the audit are not raised here.
    """
    start = time.monotonic()
    crop_set = prepare_crops(config, workdir)
    arrays = open_arrays(crop_set, workdir.arrays)
    audit = audit_crops(crop_set, arrays)
    logger.info("%s", describe_audit(audit, crop_set.class_names))
    return PreparedData(crop_set, arrays, audit, time.monotonic() - start)


def prepare_crops(config: ConfigDict, workdir: Workdir) -> CropSet:
    """Makes or reuses the crop set of a config in `workdir.crops`.

    Raises:
      Error: anything wrong with the images or settings.
    """
    check_place(config, workdir)
    source, root = data_source(config), config.data.root or config.data.sheet
    if source == "sample":
        root = workdir.sample
        logger.info("data.root is not set: using the built-in sample of simulated cells, %s", root)
        write_sample(root, seed=data_seed(config))
    elif source.startswith("tfds:"):
        root = workdir.tfds
        export_images(source.removeprefix("tfds:"), root, data_dir=config.data.root or None)
    return prepare_crop_set(workdir.crops, root, crop_settings(config))


def crop_settings(config: ConfigDict) -> CropSettings:
    """Returns what a config says of crops; but for the seed, the keys have the same names."""
    keys = [field.name for field in dataclasses.fields(CropSettings) if field.name != "seed"]
    return CropSettings(data_seed(config), **{key: config.data[key] for key in keys})


def check_place(config: ConfigDict, workdir: Workdir) -> None:
    """Refuses a workdir inside the image folder, where it would be taken for a class.

    Beside a sheet there may be workdirs, but its folder is none itself.

    To be called before anything is made in the workdir, its lock included.

    Raises:
      Error: the workdir is the image folder, or below it.
    """
    images, folder = Path(config.data.root).expanduser().resolve(), workdir.path.resolve()
    if config.data.sheet and folder == Path(config.data.sheet).expanduser().resolve().parent:
        raise Error(f"{workdir} is the folder of {config.data.sheet}; choose a workdir of its own")
    is_folder = data_source(config) == "folder" and not config.data.sheet
    if is_folder and (folder == images or images in folder.parents):
        raise Error(
            f"{workdir} lies in the image folder {config.data.root}, whose sub-folders are "
            "classes; choose a workdir outside"
        )
