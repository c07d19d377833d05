"""What a run has added up so far, and what it tells: metrics.jsonl and TensorBoard files."""

import contextlib
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorboardX
from flax.traverse_util import flatten_dict

from jaxcells.files import Error, Workdir, write_whole
from jaxcells.training import mesh

Record = dict[str, Any]


@dataclasses.dataclass
class Progress:
    """What a run has done, apart from its state; stored with every checkpoint.

    Attributes:
      totals: loss, correct and count over the steps of the epoch under way.
      epoch_s: seconds of training in the epoch under way.
      train_s: seconds of training in finished epochs.
      epochs_s: seconds of training in each of them.
      compile_s: seconds of compilation.
      features_s: seconds of computing what the frozen start of a network makes of the crops.
      prepare_s: seconds that crops, arrays and audit took when the run began.
      total_s: seconds of all processes that worked on the run, one after another.
      images: training images seen in finished epochs.
      step_bytes: device memory that a training step needs: state, batch and temporary arrays.
    """

    totals: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"loss": 0.0, "correct": 0, "count": 0}
    )
    epoch_s: float = 0.0
    train_s: float = 0.0
    epochs_s: list[float] = dataclasses.field(default_factory=list)
    compile_s: float = 0.0
    features_s: float = 0.0
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
        return self.features_s + epochs_s

    def finish_epoch(self) -> dict[str, float]:
        """Returns the exact means of the epoch under way and begins the next one."""
        count = self.totals["count"]
        means = {
            "loss": self.totals["loss"] / count,
            "accuracy": self.totals["correct"] / count,
            "images_per_second": count / self.epoch_s,
        }
        self.train_s += self.epoch_s
        self.epochs_s.append(self.epoch_s)
        self.images += int(count)
        self.epoch_s, self.totals = 0.0, Progress().totals
        return means


def check_finite(step: int, values: Mapping[str, Any]) -> None:
    """Raises an Error that names what of a nested mapping is NaN or infinite."""
    for name, value in flatten_dict(values, sep="/").items():
        if not np.isfinite(value).all():
            raise Error(
                f"training diverged: {name} is not finite at step {step}, which was not saved; try "
                "a lower optim.learning_rate in a new workdir, or look for broken pixels"
            )


@contextlib.contextmanager
def open_metrics(workdir: Workdir, *, first_step: int) -> Iterator[Callable[[Record], None]]:
    """Yields a function that appends a record to metrics.jsonl and to TensorBoard's event files.

    A record needs "step" and "split", and every float in it becomes a curve. Records of later steps
    than `first_step`, left by a run that was cut off after its last checkpoint, are removed first:
    they will be written again. Only the primary process writes.
    """
    if not mesh.is_primary():
        yield lambda record: None
        return
    before = [record for record in read_metrics(workdir.metrics) if record["step"] <= first_step]
    with write_whole(workdir.metrics) as file:
        file.writelines(json.dumps(record) + "\n" for record in before)
    with (
        open(workdir.metrics, "a", encoding="utf-8") as file,
        tensorboardX.SummaryWriter(str(workdir.tensorboard), purge_step=first_step + 1) as events,
    ):

        def write(record: Record) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()
            for name, value in record.items():
                if isinstance(value, float):
                    events.add_scalar(f"{record['split']}/{name}", value, record["step"])

        yield write


def read_metrics(path: Path) -> list[Record]:
    """Reads metrics.jsonl; a line that was cut off while it was written is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records
