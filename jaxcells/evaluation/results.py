"""The results of a run: what results.json holds, by `dataclasses.asdict`."""

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

from jaxcells.evaluation import prose
from jaxcells.evaluation.calibration import Calibration
from jaxcells.evaluation.evidence import Evidence
from jaxcells.evaluation.metrics import SplitMetrics, summary_table

_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the whole run, resumed or not, and images per second.

    Attributes:
      crop_s: of crops, arrays and audit.
      compile_s: of compilation.
      features_s: of computing what the frozen start of the network makes of the crops.
      train_s: of training.
      typical_train_s: of training on an idle machine, see `Progress.typical_train_s`.
      evaluate_s: of the final evaluation of both splits.
      total_s: of everything.
      train_images_per_second: over all epochs.
      eval_images_per_second: in the final evaluation.
    """

    crop_s: float
    compile_s: float
    features_s: float
    train_s: float
    typical_train_s: float
    evaluate_s: float
    total_s: float
    train_images_per_second: float
    eval_images_per_second: float


@dataclasses.dataclass(frozen=True)
class RunResults:
    """What is known of a finished run.

    Attributes:
      validation: figures of the validation split, by which the best checkpoint was chosen.
      test: figures of the test split.
      test_opened: how often the test split of this workdir had been opened then.
      evidence: what stands beside the figures of the test split.
      calibration: how to read the network's outputs, by the validation split; the bank of features
        that belongs to it stands in calibration.json alone.
      init: where the first parameters came from, see `initialization.initialize`.
      data: the images, crops and split, and what the audit found.
      timing: seconds.
      memory: {"train_step_bytes": of each device, by the compiler's account}.
      best_step: of the checkpoint that was evaluated.
      num_steps: of the run.
      num_epochs: of the run.
      model: arguments of `create_model`.
      environment: versions and devices.
    """

    validation: SplitMetrics
    test: SplitMetrics
    test_opened: int
    evidence: Evidence
    calibration: Calibration
    init: Mapping[str, Any]
    data: Mapping[str, Any]
    timing: Timing
    memory: Mapping[str, int]
    best_step: int
    num_steps: int
    num_epochs: int
    model: Mapping[str, Any]
    environment: Mapping[str, Any]

    def summary(self) -> str:
        """Returns the table and the lines that the terminal shows at the end of a run."""
        audited = self.data["audit"]["warnings"]
        warnings = [text for text in audited if "=crop:" in text or "confounded" in text]
        warnings += [self.init["warning"]] if "warning" in self.init else []
        table = summary_table(self.test, f"test split, best checkpoint (step {self.best_step})")
        lines = prose.paragraphs("summary", warnings=warnings, **vars(self))
        return "\n".join(table if x == "[table]" else textwrap.fill(x, _WIDTH) for x in lines)
