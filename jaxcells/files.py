"""Errors, the log, and files: whole or not at all, where those of a run lie, who works there."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import filelock

Record = TypeVar("Record")

logger = logging.getLogger("jaxcells")


class Error(Exception):
    """An expected failure: one line that says what was wrong, where, and what to do next.

    Keys of the config are written as `data.crop_size=0`, which the command line turns into flags;
    it prints the message and exits with code 2. Anything else that is raised is a bug in jaxcells
    and keeps its traceback.
    """


class _Below:
    """An attribute of a workdir: a path below it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, workdir: "Workdir", owner: type) -> Path:
        return workdir.path / self._name


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Where the files of a run lie, and of a comparison its experiments. Nothing is made here.

    Attributes:
      path: the folder.
      sample: images of the built-in sample, where it is used.
      tfds: images exported from a TFDS data set, where one is used.
      crops: crops with their manifest.
      arrays: the crops, decoded.
      features: what the frozen start of a network makes of the crops, while a run needs it.
      checkpoints: a folder for each.
      config: all keys, as JSON.
      environment: versions and devices, as JSON.
      metrics: figures by epoch, a line of JSON each.
      tensorboard: the same as TensorBoard's event files.
      history: a line of JSON for each time that a split was opened.
      calibration: how to read the outputs of the best checkpoint, as JSON.
      results: the figures of a finished run, as JSON.
      report: all of it for people, one page that needs no network.
      experiments: of a comparison, a workdir per run.
      comparison: of a comparison, tables, figures and the choice.
      folds: of a cross-validation, a workdir per fold.
      cross_validation: of a cross-validation, tables and predictions.
    """

    path: Path

    sample = _Below("sample")
    tfds = _Below("tfds")
    crops = _Below("crops")
    arrays = _Below("arrays")
    features = _Below("features")
    checkpoints = _Below("checkpoints")
    config = _Below("config.json")
    environment = _Below("environment.json")
    metrics = _Below("metrics.jsonl")
    tensorboard = _Below("tensorboard")
    history = _Below("history.jsonl")
    calibration = _Below("calibration.json")
    results = _Below("results.json")
    report = _Below("report.html")
    experiments = _Below("experiments")
    comparison = _Below("compare")
    folds = _Below("folds")
    cross_validation = _Below("cross_validation")

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_trained(self) -> bool:
        """Whether a run has begun to leave something that must not be mixed with another's."""
        return self.results.exists() or any(self.checkpoints.glob("[0-9]*"))

    def predictions(self, name: str) -> Path:
        """Predicted classes and probabilities of a split, as CSV."""
        return self.path / f"predictions_{name}.csv"

    def evaluation(self, name: str) -> Path:
        """Figures of a split that `evaluate` opened, as JSON."""
        return self.path / f"evaluation_{name}.json"

    def figure(self, name: str) -> Path:
        """A picture, such as "curves" or "confusion"."""
        return self.path / f"{name}.png"


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[TextIO]:
    """Opens a text file to write, which takes the place of `path` when all is written.

    UTF-8, lines end as they are written, and names that are no UTF-8 come out as they went in. What
    is interrupted leaves `<path>.partial`, and the file that was there before.
    """
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Makes a folder, to be filled, which takes the place of `path` when all is written.

    What is interrupted leaves `<path>.partial`, and the folder that was there before.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table that is either whole or not there; None is an empty cell."""
    with write_whole(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


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
            f"{path}: missing; {path.parent} is not the workdir of a run, give its folder"
        ) from None
    except ValueError as error:
        raise Error(f"{path}: damaged ({error}); restore it, or choose another workdir") from error


def from_record(record_class: type[Record], values: Any, source: object) -> Record:
    """Makes a frozen dataclass from what `dataclasses.asdict` and JSON made of one.

    Fields that are dataclasses themselves are made so too, and lists become tuples where the class
    says so.

    Args:
      record_class: the class.
      values: a dict with its fields, no more and no less.
      source: what messages name, such as a file.

    Raises:
      Error: fields are missing or unknown, as in files of another version.
    """
    fields = {field.name for field in dataclasses.fields(record_class)}  # type: ignore[arg-type]
    found = set(values) if isinstance(values, Mapping) else set()
    if found != fields:
        raise Error(
            f"{source}: written by another version of jaxcells, with other fields "
            f"({', '.join(sorted(found ^ fields))}); use that version, or choose another workdir"
        )
    hints = typing.get_type_hints(record_class)
    return record_class(**{k: _from_json(hints[k], v, source) for k, v in values.items()})


def _from_json(hint: Any, value: Any, source: object) -> Any:
    if isinstance(hint, types.UnionType):  # such as `Record | None`
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if value is None else _from_json(options[0], value, source)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_record(hint, value, source)
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_from_json(inner[0], item, source) for item in value)
    if typing.get_origin(hint) in (dict, Mapping) and isinstance(value, dict):
        return {key: _from_json(inner[1], item, source) for key, item in value.items()}
    return value


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Makes a workdir and keeps other processes out of it; a killed process holds no lock.

    One that was made here and stays empty is removed.

    Raises:
      Error: another process holds it.
    """
    is_new = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(workdir / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise Error(
            f"{workdir}: another process is working there; wait for it, or choose another workdir"
        ) from None
    try:
        yield
    finally:
        if is_new and os.listdir(workdir) == [".lock"]:  # what was asked for was refused
            shutil.rmtree(workdir, ignore_errors=True)
        lock.release()
