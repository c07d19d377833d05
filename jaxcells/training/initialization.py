"""Where a network's first parameters come from: ImageNet, a file, an earlier run, or chance."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcells.data.crop_set import CropSet
from jaxcells.files import Error, Workdir, file_sha256, logger
from jaxcells.models import weights
from jaxcells.models.fetch import WeightsUnavailableError, fetch_imagenet
from jaxcells.training.checkpoints import best_step, read_meta, restore_variables
from jaxcells.training.state import TrainState, state_of


@dataclasses.dataclass(frozen=True)
class Initialization:
    """What the key `init` of a config stands for on this machine.

    Attributes:
      kind: "imagenet", "file", "run" or "random".
      path: the file or workdir; None for "random".
      warning: why the run does not begin with what was asked for, or "".
      conv1: "adapt" fits the first convolution to the number of channels, "fresh" leaves it random.
    """

    kind: str
    path: Path | None = None
    warning: str = ""
    conv1: weights.Conv1 = "adapt"


def find_initialization(
    init: str, model_name: str, conv1: weights.Conv1 = "adapt", *, random_if_missing: bool
) -> Initialization:
    """Finds the weights before anything expensive happens, fetching those of ImageNet.

    Args:
      init: "imagenet", "random", a .safetensors file or a workdir.
      model_name: name of the network, which decides on the ImageNet file.
      conv1: see `Initialization`.
      random_if_missing: go on from random parameters, with a warning, if the ImageNet weights
        cannot be had. Right for the built-in sample, wrong for anyone's own images.

    Raises:
      Error: the weights cannot be had, or the workdir has no checkpoint.
    """
    if init == "random":
        return Initialization("random")
    if init == "imagenet":
        try:
            return Initialization("imagenet", fetch_imagenet(model_name), conv1=conv1)
        except WeightsUnavailableError as error:
            if not random_if_missing:
                raise
            warning = f"starting from RANDOM parameters instead of ImageNet's: {error}"
            logger.warning("%s", warning)
            return Initialization("random", warning=warning)
    path = Path(init).expanduser()
    if not path.is_dir():
        weights.load_safetensors(path)  # a wrong file shows here, before crops are drawn
        return Initialization("file", path, conv1=conv1)
    if best_step(Workdir(path).checkpoints) is None:
        raise Error(f"{path}: no validated checkpoint to start from; give the workdir of a run")
    return Initialization("run", path, conv1=conv1)


def _origin(init: Initialization) -> Mapping[str, Any]:
    """Returns class_names, manifest_sha256 and images_by_split of the training, as far as known."""
    if init.path is None or init.kind == "imagenet":
        return {}
    if init.kind == "run":
        return vars(read_meta(Workdir(init.path).checkpoints))
    metadata = weights.load_metadata(init.path)
    if "jaxcells" not in metadata:  # not of `export weights`
        return {}
    known = metadata.keys() & {"class_names", "images_by_split"}
    return metadata | {key: json.loads(metadata[key]) for key in known}


def images_by_split(crop_set: CropSet, init: Initialization) -> dict[str, tuple[str, ...]]:
    """Lists the images that a network started so and trained on these crops was made with.

    Args:
      crop_set: the crops of its training.
      init: where its first parameters come from; the images of that training count too, and so on
        back.

    Returns:
      {"train": …, "val": …}: of the images trained on and of those chosen by, the first 16 digits
      of the SHA-256 of their files.
    """
    before = _origin(init).get("images_by_split", {})
    return {
        split: tuple(sorted({*before.get(split, ()), *_images(crop_set, split)}))
        for split in ("train", "val")
    }


def check_no_leak(init: Initialization, crop_set: CropSet) -> None:
    """Refuses to start from a network that was made with images which are now held out.

    Of a file that `export weights` did not write nothing can be told.

    Raises:
      Error: an image of this run's val or test split was trained on, or one of its test split
        chosen by, for that network or one that it was started from.
    """
    origin = _origin(init)
    before = origin.get("images_by_split")
    # On the very same crops and split there is nothing new to hold out.
    if not before or origin.get("manifest_sha256") == crop_set.manifest_sha256:
        return
    tested = _images(crop_set, "test")
    held_out = tested | _images(crop_set, "val")
    leaked = held_out.keys() & set(before["train"])
    leaked |= tested.keys() & set(before["val"])
    if leaked:
        raise Error(
            f"{init.path}, or a run that it began from, has been trained or chosen by "
            f"{len(leaked)} images that are held out here, such as {held_out[min(leaked)]}; use "
            "the seed and split of that run, or other images"
        )


def _images(crop_set: CropSet, split: str) -> dict[str, str]:
    """Returns the images that a split was cropped from, by their hash."""
    sources = {record.source for record in crop_set.split(split)}
    return {crop_set.sources[source]["sha256"][:16]: source for source in sources}


def initialize(
    state: TrainState, init: Initialization, *, class_names: Sequence[str] = ()
) -> tuple[TrainState, dict[str, Any]]:
    """Puts the weights into a fresh state.

    The head is taken over only from a network that tells the same classes apart, in the same order.

    Args:
      state: a randomly initialised state at step 0.
      init: what `find_initialization` found.
      class_names: of this run; the position is the label.

    Returns:
      The state, and for results.json what was loaded: kind, source, sha256, summary.

    Raises:
      Error: the weights do not fit the network; lists every tensor that does not.
    """
    record: dict[str, Any] = {"kind": init.kind, "source": None, "sha256": None}
    if init.path is None:
        return state, record | ({"warning": init.warning} if init.warning else {})
    record["source"] = str(init.path)
    names_there = _origin(init).get("class_names")
    if init.kind == "run":
        variables, meta = restore_variables(Workdir(init.path).checkpoints, "best")
        tensors, record["step"] = weights.to_torch(variables), meta.step
    else:
        tensors, record["sha256"] = weights.load_safetensors(init.path), file_sha256(init.path)
    variables, report = weights.load_pretrained(
        tensors,
        state.variables,
        conv1=init.conv1,
        other_classes=_other_classes(names_there, class_names),
        called=str(init.path),
    )
    record["tensors"] = report.summary()
    if names_there is None and not report.skipped:
        record["tensors"] += "; the head too, which says nothing of its classes"
    logger.info("weights from %s: %s", init.path, record["tensors"])
    return state_of(state.apply_fn, state.tx, variables), record


def _other_classes(there: Sequence[str] | None, here: Sequence[str]) -> str:
    """Says how as many classes differ; "" if they do not, or if one side is not known."""
    if not there or not here or list(there) == list(here):
        return ""
    if others := [name for name in there if name not in here]:
        return f"other classes there, such as {others[0]}"
    return "the classes stand in another order there"
