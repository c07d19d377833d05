"""The folder of a run: kept by one process at a time, its files written whole."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from jaxcells.errors import Error
from jaxcells.files import write_whole


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Makes a workdir and keeps other processes out of it; a killed process holds no lock.

    Raises:
      Error: another process holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(workdir / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise Error(
            f"{workdir}: another process is working there; wait for it, or choose another --workdir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that is either whole or not there."""
    with write_whole(path) as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
      Error: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Error(
            f"{path}: missing; {path.parent} is not the workdir of a run, give its folder as "
            "--workdir"
        ) from None
    except ValueError as error:
        raise Error(
            f"{path}: damaged ({error}); restore it, or choose another --workdir"
        ) from error
