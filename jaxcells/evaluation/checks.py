"""Eight lights on a tested network: what can be trusted, what to look at, what is not known."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from jaxcells.data.audit import Audit
from jaxcells.evaluation.evidence import Evidence
from jaxcells.evaluation.metrics import SplitMetrics

Light = Literal["good", "look", "bad", "unmeasured"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One light.

    Attributes:
      name: what was looked at.
      light: "good", "look" (a reader must know), "bad" (the figures mislead) or "unmeasured".
      reason: a sentence with the figures behind it.
      advice: a sentence on what to do.
    """

    name: str
    light: Light
    reason: str
    advice: str


def run_checks(
    test: SplitMetrics,
    evidence: Evidence,
    audit: Audit,
    curves: Sequence[Mapping[str, Any]],
    split_by: str,
) -> tuple[Check, ...]:
    """Looks at eight things that make figures worthless or modest.

    A light is "good" only where something was measured and found good.

    Args:
      test: figures of the tested crops.
      evidence: of the same crops.
      audit: of the crop set.
      curves: the records of metrics.jsonl, empty where there are several runs.
      split_by: what is never divided between the splits, as `data.split_by` says; "as found" where
        the image folder brought its own split.
    """
