"""Checkpoints: written whole or not at all, checked when read, the right ones kept.

    checkpoints/<step>/variables/      params and batch_stats  (orbax, nested dictionaries)
    checkpoints/<step>/optimizer/      step and opt_state      (orbax, nested dictionaries)
    checkpoints/<step>/record/         JSON: `CheckpointMeta`, and the metrics of validation
    checkpoints/<step>/SHA256SUMS      of all these files, as `sha256sum --check` reads it

Arrays are saved from host memory and read back into it: a checkpoint knows of no device, and
`mesh.replicate` puts it on any.

Orbax stores the arrays; which folders count and which stay is settled here, because its
`CheckpointManager` takes any numbered folder for a checkpoint, an empty one and one whose deletion
was interrupted too, and restores a file with a flipped bit without a word.
"""

import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

import flax.serialization
import jax
import orbax.checkpoint as ocp

from jaxcells.data.normalization import Normalization
from jaxcells.files import Error, file_sha256, from_record, logger
from jaxcells.text import one_line
from jaxcells.training import mesh
from jaxcells.training.progress import Progress, check_finite
from jaxcells.training.state import TrainState

Which = int | Literal["latest", "best"]

_SHA256SUMS = "SHA256SUMS"
_UNFINISHED = ".unfinished-"


# Through absl, Orbax reports every small thing that it does. What goes wrong, it raises.
logging.getLogger("absl").addFilter(lambda r: "orbax" not in PurePath(r.pathname).parts)


@dataclasses.dataclass(frozen=True)
class CheckpointMeta:
    """All that resuming, evaluating and predicting need, apart from the arrays.

    Attributes:
      step: number of updates made.
      num_steps: of the whole run.
      progress: times and totals so far.
      normalization: pixels to inputs.
      seed: of initialisation, order and augmentation.
      batch_size: over all devices.
      class_names: the position is the label.
      manifest_sha256: of the crops that were trained on.
      model: arguments of `create_model`.
      init: where the first parameters came from, as in results.json.
      images_by_split: {"train": …, "val": …}, see `initialization.images_by_split`.
    """

    step: int
    num_steps: int
    progress: Progress
    normalization: Normalization
    seed: int
    batch_size: int
    class_names: tuple[str, ...]
    manifest_sha256: str
    model: Mapping[str, Any]
    init: Mapping[str, Any]
    images_by_split: Mapping[str, tuple[str, ...]]


def save(
    directory: Path,
    state: TrainState,
    meta: CheckpointMeta,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Saves a checkpoint of step `state.step`, and returns when it is whole and on disk.

    The newest two checkpoints stay, and the best by validation (see `best_step`). One of the same
    step is replaced: saved on a signal it has no metrics, which the resumed run comes to know. One
    process or job at a time may save to a folder; in several processes of one job, all call this.

    Args:
      directory: made when absent.
      state: local or replicated arrays.
      meta: what goes with them.
      metrics: `{"balanced_accuracy", "loss", ...}` of the validation split at this step; None if
        it was not validated, and then this checkpoint is never the best.

    Raises:
      Error: if a value is NaN or infinite, or the checkpoint could not be written. The
        checkpoints before it are untouched then.
    """
    directory = directory.absolute()
    step = int(state.step)
    tree = flax.serialization.to_state_dict(jax.device_get(state))
    scores = None if metrics is None else {name: float(value) for name, value in metrics.items()}
    check_finite(step, tree | {"validation": scores or {}})
    items = {
        "variables": ocp.args.StandardSave({k: tree[k] for k in ("params", "batch_stats")}),
        "optimizer": ocp.args.StandardSave({k: tree[k] for k in ("step", "opt_state")}),
        "record": ocp.args.JsonSave({"meta": dataclasses.asdict(meta), "metrics": scores}),
    }
    unfinished = directory / f"{_UNFINISHED}{step}"
    try:
        if mesh.is_primary():
            _remove_unfinished(directory)
            directory.mkdir(parents=True, exist_ok=True)
            # A write that fails half way, Orbax reports with a screen of tracebacks.
            needed = sum(array.nbytes for array in jax.tree.leaves(tree))
            if (free := shutil.disk_usage(directory).free) < needed:
                raise OSError(f"it takes {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(unfinished, args=ocp.args.Composite(**items))
        if mesh.is_primary():
            _write_sha256sums(unfinished)
            _discard(directory / str(step))
            unfinished.rename(directory / str(step))
            steps = list_steps(directory)
            for old in set(steps) - {*steps[-2:], best_step(directory)}:
                _discard(directory / str(old))
    except (OSError, ValueError) as error:
        # Most of it: Orbax may still be writing. The next save removes the rest.
        _remove_unfinished(directory)
        raise Error(
            f"cannot write checkpoint {directory / str(step)} ({one_line(error)[:200]}): mend that "
            "and run the same command again; it goes on from the checkpoint before"
        ) from error
    mesh.wait_for_all("checkpoint saved")


def list_steps(directory: Path) -> list[int]:
    """Lists the steps of all whole checkpoints in a folder, in order; none if there is no folder.

    Reading, here and below, is safe while another process trains. A numbered folder that is not a
    whole checkpoint, e.g. from a workdir whose copying stopped half way, is named in a warning.
    """
    steps = []
    for folder in sorted(directory.glob("*")):
        if folder.name.isdecimal():
            names = _read_sha256sums(folder)
            if names and all((folder / name).is_file() for name in names):
                steps.append(int(folder.name))
            else:
                _warn_once(f"{folder} is not a whole checkpoint and is passed over")
    return sorted(steps)


def best_step(directory: Path) -> int | None:
    """Finds the best step by validation: balanced accuracy, then lower loss, then the later.

    Returns:
      The step, or None if no checkpoint was validated.

    Raises:
      Error: if the record of a checkpoint is damaged.
    """
    ranks = []
    for step in list_steps(directory):
        metrics = _read_record(directory / str(step))["metrics"]
        if metrics is not None:
            ranks.append((metrics["balanced_accuracy"], -metrics["loss"], step))
    return max(ranks)[-1] if ranks else None


def restore(
    directory: Path, target: TrainState, which: Which = "latest"
) -> tuple[TrainState, CheckpointMeta]:
    """Reads a whole state, bit for bit as it was saved.

    Args:
      directory: folder of checkpoints.
      target: a state of the same network and optimiser, for its structure, shapes and dtypes;
        `jax.eval_shape` of one will do.
      which: a step, `"latest"` or `"best"`.

    Returns:
      The state, with NumPy arrays: pass it through `mesh.replicate`. And what was saved with it.

    Raises:
      Error: if there is no such checkpoint, or if it is damaged.
    """
    folder = _find(directory, which)
    found = _read_arrays(folder, "variables") | _read_arrays(folder, "optimizer")
    return flax.serialization.from_state_dict(target, found), read_meta(directory, int(folder.name))


def restore_variables(
    directory: Path, which: Which = "best"
) -> tuple[dict[str, Any], CheckpointMeta]:
    """Reads what evaluating and predicting need, and leaves the optimiser's state on disk.

    Args:
      directory: folder of checkpoints.
      which: a step, `"latest"` or `"best"`.

    Returns:
      `{"params", "batch_stats"}` with NumPy arrays, and what was saved with them.

    Raises:
      Error: if there is no such checkpoint, or it is damaged.
    """
    folder = _find(directory, which)
    return _read_arrays(folder, "variables"), read_meta(directory, int(folder.name))


def read_meta(directory: Path, which: Which = "best") -> CheckpointMeta:
    """Reads what was saved beside the arrays of a checkpoint.

    Raises:
      Error: if there is no such checkpoint, or its record is damaged.
    """
    folder = _find(directory, which)
    return from_record(CheckpointMeta, _read_record(folder)["meta"], folder)


# Folders: a checkpoint gets its number by one rename when it is whole, and loses it by one.


def _find(directory: Path, which: Which) -> Path:
    steps = list_steps(directory)
    if not steps:
        raise Error(f"no checkpoint in {directory}: train first, or give the workdir of a run")
    there = ", ".join(map(str, steps))
    step = best_step(directory) if which == "best" else steps[-1] if which == "latest" else which
    if step not in steps:
        what = "no validated checkpoint" if step is None else f"no checkpoint of step {step}"
        raise Error(f"{what} in {directory}: choose a step of {there}")
    return directory / str(step)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _discard(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f"{_UNFINISHED}deletion-{folder.name}")))


def _remove_unfinished(directory: Path) -> None:
    for folder in directory.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)


# Contents


def _write_sha256sums(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / _SHA256SUMS).write_text("".join(lines))


def _read_sha256sums(folder: Path) -> dict[str, str]:
    """Returns what each file should hash to; nothing for a folder without that list."""
    try:
        lines = (folder / _SHA256SUMS).read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _checked(folder: Path, item: str) -> Path:
    """Returns the path of what a checkpoint holds, if it is what was written."""
    for name, digest in _read_sha256sums(folder).items():
        if name.startswith(f"{item}/") and file_sha256(folder / name) != digest:
            raise Error(
                f"checkpoint {folder} is damaged ({name} has changed since it was written): "
                "delete that folder to go on from the one before it, or anew if there is none; "
                "if it was the best, the next best counts as such"
            )
    return folder.absolute() / item


def _read_arrays(folder: Path, item: str) -> dict[str, Any]:
    # Without a target nothing is cast, reshaped or sent to a device.
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(_checked(folder, item))


def _read_record(folder: Path) -> dict[str, Any]:
    return json.loads((_checked(folder, "record") / "metadata").read_bytes())
