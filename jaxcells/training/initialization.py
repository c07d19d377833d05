"""Where a network's first parameters come from: ImageNet, a file, an earlier run, or chance."""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxcells.data.crop_set import CropSet
from jaxcells.files import Error
from jaxcells.models.fetch import WeightsUnavailableError, fetch_imagenet, file_sha256
from jaxcells.models.weights import (
    Conv1,
    PortError,
    PortReport,
    load_metadata,
    load_pretrained,
    load_safetensors,
    transfer,
)
from jaxcells.training.checkpoints import best_step, read_meta, restore_variables
from jaxcells.training.state import TrainState, with_variables

logger = logging.getLogger("jaxcells")

Seen = dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Initialization:
    """What `config.init` stands for on this machine.

    Attributes:
      kind: "imagenet", "file", "run" or "random".
      path: the file or workdir; None for "random".
      warning: why the run does not begin with what was asked for, or "".
      conv1: "adapt" fits the first convolution to the number of channels, "fresh" leaves it random.
    """

    kind: str
    path: Path | None = None
    warning: str = ""
    conv1: Conv1 = "adapt"


def find_initialization(
    init: str, model_name: str, *, random_if_missing: bool, conv1: Conv1 = "adapt"
) -> Initialization:
    """Finds the weights before anything expensive happens, fetching those of ImageNet.

    Args:
      init: "imagenet", "random", a .safetensors file or a workdir.
      model_name: name of the network, which decides on the ImageNet file.
      random_if_missing: go on from random parameters, with a warning, if the ImageNet weights
        cannot be had. Right for the built-in sample, wrong for anyone's own images.
      conv1: see `Initialization`.

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
        load_safetensors(path)  # a wrong file shows here, before crops are drawn
        return Initialization("file", path, conv1=conv1)
    if best_step(path / "checkpoints") is None:
        raise Error(f"{path}: no validated checkpoint to start from; give the workdir of a run")
    return Initialization("run", path, conv1=conv1)


def seen_images(crop_set: CropSet, init: Initialization) -> Seen:
    """Lists the images that a network started so and trained on these crops has seen.

    Args:
      crop_set: the crops of its training.
      init: where its first parameters come from; what those have seen counts too, and so on back.

    Returns:
      {"train": …, "val": …}: of the images trained on and of those chosen by, the first 16 digits
      of the SHA-256 of their files.
    """
    before = _seen_before(init) or {}
    return {
        side: sorted({*before.get(side, ()), *_images(crop_set, (side,))})
        for side in ("train", "val")
    }


def check_no_leak(init: Initialization, crop_set: CropSet) -> None:
    """Refuses to start from a network that has seen images which are now held out.

    Of a file that `export weights` did not write nothing can be told.

    Raises:
      Error: an image of this run's val or test split was trained on, or one of its test split
        chosen by, for that network or one that it was started from.
    """
    seen = _seen_before(init)
    # On the very same crops and split there is nothing new to hold out.
    if seen is None or _manifest(init) == crop_set.manifest_sha256:
        return
    held_out, tested = _images(crop_set, ("val", "test")), _images(crop_set, ("test",))
    leaked = {*held_out.keys() & set(seen["train"]), *tested.keys() & set(seen["val"])}
    if leaked:
        raise Error(
            f"{init.path}, or a run that it began from, has been trained or chosen by "
            f"{len(leaked)} images that are held out here, such as {held_out[min(leaked)]}; use "
            "the seed and split of that run, or other images"
        )


def _images(crop_set: CropSet, sides: tuple[str, ...]) -> dict[str, str]:
    """Returns the images that some sides of a split were cropped from, by their hash."""
    sources = {record.source for record in crop_set.records if record.split in sides}
    return {crop_set.sources[source]["sha256"][:16]: source for source in sources}


def _seen_before(init: Initialization) -> Seen | None:
    """Returns what the first parameters have seen, as far as their source tells."""
    if init.kind == "run" and init.path is not None:
        seen: Seen = read_meta(init.path / "checkpoints")["seen"]
        return seen
    if init.kind == "file" and init.path is not None:
        with contextlib.suppress(KeyError, ValueError):
            return json.loads(load_metadata(init.path)["seen"])
    return None


def _manifest(init: Initialization) -> str | None:
    if init.path is None:
        return None
    if init.kind == "run":
        return read_meta(init.path / "checkpoints")["manifest_sha256"]
    return load_metadata(init.path).get("manifest_sha256")


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
        if init.warning:
            record["warning"] = init.warning
        return state, record
    record["source"] = str(init.path)
    port: Callable[..., tuple[dict[str, Any], PortReport]]
    if init.kind == "run":
        source, meta = restore_variables(init.path / "checkpoints", "best")
        record["step"] = meta["step"]
        names_there = meta["class_names"]
        port = functools.partial(transfer, source, source=str(init.path))
    else:
        record["sha256"] = file_sha256(init.path)
        names_there = _class_names(init.path)
        port = functools.partial(load_pretrained, init.path)
    try:
        variables, report = port(
            variables=state.variables,
            conv1=init.conv1,
            other_classes=_other_classes(names_there, class_names),
        )
    except PortError as error:
        if (everything := error.report.problems()) not in str(error):
            logger.warning("%s: all that does not fit: %s", init.path, everything)
        raise
    record["tensors"] = report.summary()
    if names_there is None and not report.skipped:
        record["tensors"] += "; the head too, which says nothing of its classes"
    logger.info("weights from %s: %s", init.path, record["tensors"])
    return with_variables(state, variables), record


def _class_names(path: Path) -> list[str] | None:
    """Returns the class names that `export weights` leaves in a file; None for other files."""
    try:
        names = json.loads(load_metadata(path)["class_names"])
    except (KeyError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _other_classes(there: Sequence[str] | None, here: Sequence[str]) -> str:
    """Says how the classes differ; "" if they do not, or if one side is not known."""
    if not there or not here or list(there) == list(here):
        return ""
    if sorted(there) == sorted(here):
        return "the classes stand in another order there"
    others = [name for name in there if name not in here]
    return f"other classes there, such as {others[0]}" if others else "more classes here"
