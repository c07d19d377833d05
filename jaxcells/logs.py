"""What a run tells: lines and a bar on the terminal, metrics.jsonl and TensorBoard files."""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorboardX
from tqdm import tqdm

from jaxcells.files import write_whole

logger = logging.getLogger("jaxcells")


class _AboveBars(logging.Handler):
    """Writes to standard error without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"WARNING: {text}"
        tqdm.write(text, file=sys.stderr)


def set_up_logging(*, quiet: bool = False) -> None:
    """Sends our own lines to standard error and keeps other libraries' to warnings.

    Args:
      quiet: warnings only, for all processes of a run but the first.
    """
    logger.handlers = [_AboveBars()]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


def duration(seconds: float) -> str:
    """Returns seconds as people say them: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class MetricWriter:
    """Appends records to metrics.jsonl and to TensorBoard event files.

    Records of later steps than `first_step`, left by a run that was cut off after its last
    checkpoint, are removed first: they will be written again.
    """

    def __init__(self, workdir: Path, first_step: int) -> None:
        self._path = workdir / "metrics.jsonl"
        kept = [record for record in read_metrics(self._path) if record["step"] <= first_step]
        with write_whole(self._path) as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._events = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first_step + 1, write_to_disk=True
        )

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record; it needs "step" and "split", and every float becomes a curve."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if isinstance(value, float):
                self._events.add_scalar(f"{record['split']}/{name}", value, record["step"])

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()


@contextlib.contextmanager
def open_metrics(workdir: Path, *, first_step: int, primary: bool) -> Iterator[MetricWriter | None]:
    """Opens a `MetricWriter` in the process that writes files; None in the others."""
    if not primary:
        yield None
        return
    writer = MetricWriter(workdir, first_step)
    try:
        yield writer
    finally:
        writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; a line that was cut off while it was written is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records
