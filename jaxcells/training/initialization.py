"""Where a network's first parameters come from: ImageNet, a file, an earlier run, or chance."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from jaxcells.data.crop_set import CropSet, open_crop_set
from jaxcells.errors import Error
from jaxcells.models.fetch import WeightsUnavailableError, fetch_imagenet, file_sha256
from jaxcells.models.weights import load_pretrained, load_safetensors, transfer
from jaxcells.training.checkpoints import best_step, restore_variables
from jaxcells.training.state import TrainState, with_variables

logger = logging.getLogger("jaxcells")


@dataclasses.dataclass(frozen=True)
class Initialization:
    """What `config.init` stands for on this machine.

    Attributes:
      kind: "imagenet", "file", "run" or "random".
      path: the file or workdir; None for "random".
      warning: why the run does not begin with what was asked for, or "".
    """

    kind: str
    path: Path | None = None
    warning: str = ""


def find_initialization(init: str, model_name: str, *, random_if_missing: bool) -> Initialization:
    """Finds the weights before anything expensive happens, fetching those of ImageNet.

    Args:
      init: "imagenet", "random", a .safetensors file or a workdir.
      model_name: name of the network, which decides on the ImageNet file.
      random_if_missing: go on from random parameters, with a warning, if the ImageNet weights
        cannot be had. Right for the built-in sample, wrong for anyone's own images.

    Raises:
      Error: the weights cannot be had, or the workdir has no checkpoint.
    """
    if init == "random":
        return Initialization("random")
    if init == "imagenet":
        try:
            return Initialization("imagenet", fetch_imagenet(model_name))
        except WeightsUnavailableError as error:
            if not random_if_missing:
                raise
            warning = f"starting from RANDOM parameters instead of ImageNet's: {error}"
            logger.warning("%s", warning)
            return Initialization("random", warning=warning)
    path = Path(init).expanduser()
    if not path.is_dir():
        load_safetensors(path)  # a wrong file shows here, before crops are drawn
        return Initialization("file", path)
    if best_step(path / "checkpoints") is None:
        raise Error(f"{path}: no validated checkpoint to start from; give the workdir of a run")
    return Initialization("run", path)


def check_no_leak(init: Initialization, crop_set: CropSet) -> None:
    """Refuses to start from a run that has seen images which are now held out.

    Raises:
      Error: an image of this run's val or test split was trained on or chosen by in that run.
    """
    if init.kind != "run" or init.path is None:
        return
    earlier = open_crop_set(init.path / "crops")

    def images(of: CropSet, sides: tuple[str, ...]) -> dict[str, str]:
        return {of.sources[r.source]["sha256"]: r.source for r in of.records if r.split in sides}

    seen = images(earlier, ("train",))
    held_out = images(crop_set, ("val", "test"))
    chosen, tested = images(earlier, ("val",)), images(crop_set, ("test",))
    leaked = [*(seen.keys() & held_out.keys()), *(chosen.keys() & tested.keys())]
    if leaked:
        raise Error(
            f"{init.path} has been trained or chosen by {len(set(leaked))} images that are held "
            "out "
            f"here, such as {held_out[leaked[0]]}; use the seed and split of that run, or other "
            "images"
        )


def initialize(state: TrainState, init: Initialization) -> tuple[TrainState, dict[str, Any]]:
    """Puts the weights into a fresh state.

    Args:
      state: a randomly initialised state at step 0.
      init: what `find_initialization` found.

    Returns:
      The state, and for results.json what was loaded: kind, source, sha256, summary.

    Raises:
      Error: the weights do not fit the network; lists every tensor that does not.
    """
    record: dict[str, Any] = {"kind": init.kind, "source": None, "sha256": None}
    if init.path is None:
        if init.warning:
            record["warning"] = init.warning
        return state, record
    record["source"] = str(init.path)
    if init.kind == "run":
        source, _ = restore_variables(init.path / "checkpoints", "best")
        record["step"] = best_step(init.path / "checkpoints")
        variables, report = transfer(source, state.variables)
    else:
        record["sha256"] = file_sha256(init.path)
        variables, report = load_pretrained(init.path, state.variables)
    record["tensors"] = report.summary()
    logger.info("weights from %s: %s", init.path, report.summary())
    return with_variables(state, variables), record
