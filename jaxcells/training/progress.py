"""What a run has added up so far, and what it tells: metrics.jsonl and TensorBoard files."""

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import tensorboardX

from jaxcells.files import Error, write_whole


@dataclasses.dataclass
class Progress:
    """What a run has done, apart from its state; stored with every checkpoint.

    Attributes:
      sums: loss, correct and count over the steps of the epoch under way.
      epoch_s: seconds of training in the epoch under way.
      train_s: seconds of training in finished epochs.
      epochs_s: seconds of training in each of them.
      validate_s: seconds of validation.
      checkpoint_s: seconds of saving.
      compile_s: seconds of compilation.
      activations_s: seconds of computing what the frozen start of a network makes of the crops.
      prepare_s: seconds that crops, arrays and audit took when the run began.
      total_s: seconds of all processes that worked on the run, one after another.
      images: training images seen in finished epochs.
      step_bytes: device memory that a training step needs: state, batch and temporary arrays.
    """

    sums: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"loss": 0.0, "correct": 0, "count": 0}
    )
    epoch_s: float = 0.0
    train_s: float = 0.0
    epochs_s: list[float] = dataclasses.field(default_factory=list)
    validate_s: float = 0.0
    checkpoint_s: float = 0.0
    compile_s: float = 0.0
    activations_s: float = 0.0
    prepare_s: float = 0.0
    total_s: float = 0.0
    images: int = 0
    step_bytes: int = 0

    def typical_train_s(self, freeze_epochs: int) -> float:
        """Returns what training takes on an idle machine, compilation apart.

        The clock alone also measures what else the machine did meanwhile, which `compare` must not
        choose by: every epoch counts as the median one of its phase.

        Args:
          freeze_epochs: number of epochs in a first phase, or 0.
        """
        phases = self.epochs_s[:freeze_epochs], self.epochs_s[freeze_epochs:]
        epochs_s = sum(len(phase) * statistics.median(phase) for phase in phases if phase)
        return self.activations_s + epochs_s

    def finish_epoch(self) -> dict[str, Any]:
        """Returns the exact means of the epoch under way and begins the next one."""
        count = self.sums["count"]
        means = {
            "loss": self.sums["loss"] / count,
            "accuracy": self.sums["correct"] / count,
            "images_per_second": count / self.epoch_s,
        }
        self.train_s += self.epoch_s
        self.epochs_s.append(self.epoch_s)
        self.images += int(count)
        self.epoch_s, self.sums = 0.0, Progress().sums
        return means


class Meter:
    """Reads the sums of training steps some steps later, so that the device never waits for it."""

    def __init__(self, progress: Progress, *, window: int) -> None:
        """Makes a meter.

        Args:
          progress: what to add to.
          window: how many steps the host may run ahead of the device.
        """
        self._progress = progress
        self._window = window
        self._pending: deque[tuple[int, dict[str, jax.Array]]] = deque()
        self.restart()

    def restart(self) -> None:
        """Leaves out of the training time what happened since the last call."""
        self._clock = time.monotonic()

    def add(self, step: int, sums: dict[str, jax.Array]) -> None:
        """Takes the sums that training to `step` gave, still being computed."""
        self._pending.append((step, sums))
        if len(self._pending) > self._window:
            self.read(keep=self._window // 2)

    def read(self, keep: int = 0) -> None:
        """Adds the pending sums to the progress, all but the newest `keep`.

        Raises:
          Error: a loss is not finite; names its step.
        """
        while len(self._pending) > keep:
            step, sums = self._pending.popleft()
            values = jax.device_get(sums)
            check_finite(float(values["loss"]), step)
            for name in self._progress.sums:
                self._progress.sums[name] += values[name].item()
        now = time.monotonic()
        self._progress.epoch_s += now - self._clock
        self._clock = now


def check_finite(loss: float, step: int) -> None:
    """Raises an Error that names the step if the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise Error(
            f"the loss is {loss} at step {step}, and nothing of it was saved; try a lower "
            "--config.optim.learning_rate in a new --workdir, or look for broken pixels"
        )


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
