"""The network of a config, on paper: a table of its layers and a drawing, without an image read."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from jaxcells.config import data_source
from jaxcells.data.fields import SPLITS, is_hidden
from jaxcells.data.synthetic import CELL_LINES
from jaxcells.evaluation.diagram import plot_network
from jaxcells.models import create_model
from jaxcells.models.summary import layer_table, summarize, write_layers_csv

logger = logging.getLogger("jaxcells")

_CHANNELS = 3  # what ImageNet's networks take; grey crops are repeated to it
_WHOLE_IMAGE = 224  # data.crop_size=0 says nothing of the size
_UNKNOWN_CLASSES = 2


def describe(config: ConfigDict, workdir: Path) -> None:
    """Prints a table of a network's layers; leaves layers.csv and network.png in the workdir.

    Args:
      config: a validated config.
      workdir: the run's folder; the files go to its sub-folder `describe`.
    """
    side = config.data.crop_size or _WHOLE_IMAGE
    classes = _class_names(config)
    num_classes = len(classes) or _UNKNOWN_CLASSES
    model = create_model(**dict(config.model, num_classes=num_classes))
    shape = (side, side, _CHANNELS)
    layers = summarize(model, shape)

    print(layer_table(layers))
    folder = workdir / "describe"
    folder.mkdir(parents=True, exist_ok=True)
    write_layers_csv(folder / "layers.csv", layers)
    plot_network(
        layers,
        folder / "network.png",
        input_shape=shape,
        shortcuts=getattr(model, "shortcut", True),
        title=config.model.name,
    )
    if not classes:
        source = config.data.root or data_source(config)
        logger.info("the classes in %s are not known yet: shown with K=%d", source, num_classes)
    if not config.data.crop_size:
        logger.info("data.crop_size=0 uses images whole: shown for %dx%d pixels", side, side)
    logger.info("the table and a drawing of the network are in %s", folder)


def _class_names(config: ConfigDict) -> list[str]:
    """Class names as far as folders tell them; none if the images or their source must be read."""
    source = data_source(config)
    if source == "sample":
        return [line.name for line in CELL_LINES]
    if source != "folder":
        return []
    folders = _sub_folders(Path(config.data.root).expanduser())
    training = [folder for folder in folders if folder.name.lower() in ("train", "training")]
    if training and len(folders) == len(SPLITS):  # comes split
        folders = _sub_folders(training[0])
    return [folder.name for folder in folders]


def _sub_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path))
