"""Checkpoints: written whole or not at all, checked when read, the right ones kept.

    checkpoints/<step>/variables/      params and batch_stats  (orbax, nested dictionaries)
    checkpoints/<step>/optimizer/      step and opt_state      (orbax, nested dictionaries)
    checkpoints/<step>/record/         JSON: the caller's meta, and the metrics of validation
    checkpoints/<step>/SHA256SUMS      of all these files, as `sha256sum --check` reads it

Arrays are saved from host memory and read back into it: a checkpoint knows of no device, and
`mesh.replicate` puts it on any.

Orbax stores the arrays; which folders count and which stay is settled here, because its
`CheckpointManager` takes any numbered folder for a checkpoint, an empty one and one whose deletion
was interrupted too, and restores a file with a flipped bit without a word.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, Literal

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxcells.files import Error
from jaxcells.training.state import TrainState

Which = int | Literal["latest", "best"]

_SUMS = "SHA256SUMS"
_UNFINISHED = ".unfinished-"

logger = logging.getLogger("jaxcells")


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in pathlib.PurePath(record.pathname).parts


# Through absl, Orbax reports every small thing that it does. What goes wrong, it raises.
logging.getLogger("absl").addFilter(_not_from_orbax)


def save(
    directory: str | pathlib.Path,
    state: TrainState,
    *,
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Saves a checkpoint of step `state.step`, and returns when it is whole and on disk.

    The newest two checkpoints stay, and the best by validation (see `best_step`). One of the same
    step is replaced: saved on a signal it has no metrics, which the resumed run comes to know. One
    process or job at a time may save to a folder; in several processes of one job, all call this.

    Args:
      directory: made when absent.
      state: local or replicated arrays.
      meta: everything else that resuming, evaluating and predicting need; JSON.
      metrics: `{"balanced_accuracy", "loss", ...}` of the validation split at this step; None if
        it was not validated, and then this checkpoint is never the best.

    Raises:
      Error: if a value is NaN or infinite, or the checkpoint could not be written. The
        checkpoints before it are untouched then.
    """
    directory = pathlib.Path(directory).absolute()
    step = int(state.step)
    tree = flax.serialization.to_state_dict(jax.device_get(state))
    scores = None if metrics is None else {name: float(value) for name, value in metrics.items()}
    _check_finite(step, tree, scores or {})
    unfinished = directory / f"{_UNFINISHED}{step}"
    is_first_process = jax.process_index() == 0
    try:
        if is_first_process:
            _remove_unfinished(directory)
            directory.mkdir(parents=True, exist_ok=True)
            _check_space(directory, tree)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(
                unfinished,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardSave(
                        {"params": tree["params"], "batch_stats": tree["batch_stats"]}
                    ),
                    optimizer=ocp.args.StandardSave(
                        {"step": tree["step"], "opt_state": tree["opt_state"]}
                    ),
                    record=ocp.args.JsonSave({"meta": meta, "metrics": scores}),
                ),
            )
        if is_first_process:
            _write_sums(unfinished)
            _discard(directory / str(step))
            unfinished.rename(directory / str(step))
            _discard_old(directory)
    except (OSError, ValueError) as error:
        # Most of it: Orbax may still be writing. The next save removes the rest.
        _remove_unfinished(directory)
        raise Error(
            f"cannot write checkpoint {directory / str(step)} ({_first_line(error)}): mend that "
            "and run the same command again; it goes on from the checkpoint before"
        ) from error
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("checkpoint saved")


def list_steps(directory: str | pathlib.Path) -> list[int]:
    """Lists the steps of all whole checkpoints in a folder, in order; none if there is no folder.

    Reading, here and below, is safe while another process trains. A numbered folder that is not a
    whole checkpoint, e.g. from a workdir whose copying stopped half way, is named in a warning.
    """
    steps = []
    for folder in _numbered(directory):
        if _is_whole(folder):
            steps.append(int(folder.name))
        else:
            _warn_once(f"{folder} is not a whole checkpoint and is passed over")
    return steps


def best_step(directory: str | pathlib.Path) -> int | None:
    """Finds the best step by validation: balanced accuracy, then lower loss, then the later.

    Returns:
      The step, or None if no checkpoint was validated.

    Raises:
      Error: if the record of a checkpoint is damaged.
    """
    ranks = []
    for step in list_steps(directory):
        metrics = _read_record(pathlib.Path(directory) / str(step))["metrics"]
        if metrics is not None:
            ranks.append((metrics["balanced_accuracy"], -metrics["loss"], step))
    return max(ranks)[-1] if ranks else None


def resolve_step(directory: str | pathlib.Path, which: Which) -> int:
    """Turns `"latest"`, `"best"` or a number into the step of a checkpoint that is there.

    Raises:
      Error: if there is none.
    """
    steps = list_steps(directory)
    if not steps:
        raise Error(f"no checkpoint in {directory}: train first, or give the workdir of a run")
    there = ", ".join(map(str, steps))
    if which == "latest":
        return steps[-1]
    if which == "best":
        best = best_step(directory)
        if best is None:
            raise Error(
                f"no checkpoint in {directory} has been validated yet, so none is the best: "
                f"train on, or choose a step of {there}"
            )
        return best
    if which not in steps:
        raise Error(f"no checkpoint of step {which} in {directory}: choose a step of {there}")
    return which


def restore(
    directory: str | pathlib.Path, target: TrainState, which: Which = "latest"
) -> tuple[TrainState, dict[str, Any]]:
    """Reads a whole state, bit for bit as it was saved.

    Args:
      directory: folder of checkpoints.
      target: a state of the same network and optimiser, for its structure, shapes and dtypes;
        `jax.eval_shape` of one will do.
      which: a step, `"latest"` or `"best"`.

    Returns:
      The state, with NumPy arrays: pass it through `mesh.replicate`. And the meta saved with it.

    Raises:
      Error: if there is no such checkpoint, if it is damaged, or if it is of another network or
        optimiser.
    """
    folder = pathlib.Path(directory) / str(resolve_step(directory, which))
    found = {**_read_arrays(folder, "variables"), **_read_arrays(folder, "optimizer")}
    _check_same_arrays(folder, found, flax.serialization.to_state_dict(target))
    return flax.serialization.from_state_dict(target, found), _read_record(folder)["meta"]


def read_meta(directory: str | pathlib.Path, which: Which = "best") -> dict[str, Any]:
    """Reads what was saved beside the arrays of a checkpoint.

    Raises:
      Error: if there is no such checkpoint, or its record is damaged.
    """
    return _read_record(pathlib.Path(directory) / str(resolve_step(directory, which)))["meta"]


def restore_variables(
    directory: str | pathlib.Path, which: Which = "best"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what evaluating and predicting need, and leaves the optimiser's state on disk.

    Args:
      directory: folder of checkpoints.
      which: a step, `"latest"` or `"best"`.

    Returns:
      `{"params", "batch_stats"}` with NumPy arrays, and the meta saved with them.

    Raises:
      Error: if there is no such checkpoint, or it is damaged.
    """
    folder = pathlib.Path(directory) / str(resolve_step(directory, which))
    return _read_arrays(folder, "variables"), _read_record(folder)["meta"]


# Folders: a checkpoint gets its number by one rename when it is whole, and loses it by one.


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _numbered(directory: str | pathlib.Path) -> list[pathlib.Path]:
    folders = (f for f in pathlib.Path(directory).glob("*") if f.name.isdecimal())
    return sorted(folders, key=lambda folder: int(folder.name))


def _is_whole(folder: pathlib.Path) -> bool:
    return bool(sums := _read_sums(folder)) and all((folder / name).is_file() for name in sums)


def _discard(folder: pathlib.Path) -> None:
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f"{_UNFINISHED}deletion-{folder.name}")))


def _discard_old(directory: pathlib.Path) -> None:
    steps = list_steps(directory)
    for step in set(steps) - {*steps[-2:], best_step(directory)}:
        _discard(directory / str(step))


def _remove_unfinished(directory: pathlib.Path) -> None:
    for folder in directory.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)


# Checksums


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_sums(folder: pathlib.Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / _SUMS).write_text("".join(lines))


def _read_sums(folder: pathlib.Path) -> dict[str, str]:
    try:
        lines = (folder / _SUMS).read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _check_sums(folder: pathlib.Path, item: str) -> None:
    for name, digest in _read_sums(folder).items():
        if name.startswith(f"{item}/") and _sha256(folder / name) != digest:
            raise Error(
                f"checkpoint {folder} is damaged ({name} has changed since it was written): "
                "delete that folder to go on from the checkpoint before it"
            )


# Contents


def _read_arrays(folder: pathlib.Path, item: str) -> dict[str, Any]:
    _check_sums(folder, item)
    # Without a target nothing is cast, reshaped or sent to a device.
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute() / item)


def _read_record(folder: pathlib.Path) -> dict[str, Any]:
    _check_sums(folder, "record")
    return json.loads((folder / "record" / "metadata").read_bytes())


def _flatten(tree: dict[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def _check_finite(step: int, tree: dict[str, Any], metrics: Mapping[str, float]) -> None:
    finite = {f"validation {name}": math.isfinite(value) for name, value in metrics.items()}
    finite |= {name: bool(np.isfinite(array).all()) for name, array in _flatten(tree).items()}
    for name in (name for name in finite if not finite[name]):
        raise Error(
            f"training diverged: {name} is not finite at step {step}; "
            "try a lower --config.optim.learning_rate"
        )


def _check_space(directory: pathlib.Path, tree: dict[str, Any]) -> None:
    # A write that fails half way, Orbax reports with a screen of tracebacks.
    needed = sum(array.nbytes for array in _flatten(tree).values())
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(f"it takes {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")


def _check_same_arrays(
    folder: pathlib.Path, found: dict[str, Any], expected: dict[str, Any]
) -> None:
    there, here = (
        {name: f"{array.dtype}{list(array.shape)}" for name, array in _flatten(tree).items()}
        for tree in (found, expected)
    )
    differing = sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
    if differing:
        name = differing[0]
        raise Error(
            f"checkpoint {folder} is of another network or optimiser: {name} is "
            f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} here ("
            f"{len(differing)} arrays differ); use the config of that run"
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
