"""The network of a config, on paper: a table of its layers and a drawing, without an image read."""

from pathlib import Path

from ml_collections import ConfigDict

from jaxcells.config import data_source
from jaxcells.data.fields import class_folders
from jaxcells.data.sample import CELL_LINES
from jaxcells.evaluation.diagram import plot_network
from jaxcells.files import Workdir, logger
from jaxcells.models import create_model, require_segments
from jaxcells.models.summary import layer_table, summarize, write_layers_csv


def describe(config: ConfigDict, workdir: Workdir) -> None:
    """Prints a table of a network's layers; leaves layers.csv and network.png in the workdir.

    Args:
      config: a validated config.
      workdir: the run's folder; the files go to its sub-folder `describe`.
    """
    side = config.data.crop_size or 224  # 0 says nothing of the size
    num_classes = _num_classes(config)
    model = create_model(**config.model, num_classes=num_classes or 2)
    require_segments(model, config.model.name, "its description")
    shape = (side, side, 3)  # what ImageNet's networks take; grey crops are repeated to it
    layers = summarize(model, shape)

    print(layer_table(layers))
    folder = workdir.path / "describe"
    folder.mkdir(parents=True, exist_ok=True)
    write_layers_csv(folder / "layers.csv", layers)
    shortcuts = getattr(model, "shortcut", True)
    path, title = folder / "network.png", config.model.name
    plot_network(layers, path, input_shape=shape, shortcuts=shortcuts, title=title)
    if not num_classes:
        source = config.data.root or config.data.sheet or data_source(config)
        logger.info("the classes in %s are not known yet: shown with K=2", source)
    if not config.data.crop_size:
        logger.info("data.crop_size=0 uses images whole: shown for %dx%d pixels", side, side)
    logger.info("the table and a drawing of the network are in %s", folder)


def _num_classes(config: ConfigDict) -> int:
    """Number of classes as far as folders tell it; 0 if the source must be read."""
    source = data_source(config)
    if source == "folder" and not config.data.sheet:
        return len({folder.label for folder in class_folders(Path(config.data.root).expanduser())})
    return len(CELL_LINES) if source == "sample" else 0
