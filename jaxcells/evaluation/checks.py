"""Eight lights on a tested network: what can be trusted, what to look at, what is not known."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxcells.data.audit import Audit
from jaxcells.evaluation.evidence import Evidence
from jaxcells.evaluation.metrics import Interval, SplitMetrics
from jaxcells.text import counted

Light = Literal["good", "look", "bad", "unmeasured"]
_Found = tuple[Light, str, str]  # light, reason, advice

_FEW_FIELDS = 5  # per class: with fewer, intervals do not keep their promise
_FEW_CROPS = 50  # of a class, to train on
_WIDE = 0.2  # interval of the accuracy, from end to end
# Expected calibration error: what nobody would notice, and what misleads.
_CALIBRATED, _MISLEADING = 0.05, 0.10
_MANY_UNKNOWN = 0.15  # where 0.05 is what the threshold asks for
_RISEN = 1.2  # the last validation loss as a multiple of the lowest


@dataclasses.dataclass(frozen=True)
class Check:
    """One light.

    Attributes:
      name: what was looked at.
      light: "good", "look" (a reader must know), "bad" (the figures mislead) or "unmeasured".
      reason: what was found, with its figures.
      advice: what to do.
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
    """Looks at eight things that make figures worthless, or more modest than they seem.

    A light is "good" only where something was measured and nothing was found.

    Args:
      test: figures of the tested crops.
      evidence: of the same crops.
      audit: of the crop set.
      curves: the records of metrics.jsonl; empty where several networks were trained.
      split_by: what is never divided between the splits, as `data.split_by` says; "as found" where
        the image folder brought its own split.
    """
    found = {
        "independent fields": _independence(evidence, split_by),
        "leaks": _leaks(audit, split_by),
        "shortcuts": _shortcuts(evidence, audit),
        "baseline beaten": _baselines(evidence),
        "calibration": _calibration(evidence),
        "convergence": _convergence(curves, _chance(evidence)),
        "few crops": _amounts(test, audit),
        "unknowns": _unknowns(evidence),
    }
    return tuple(Check(name, *check) for name, check in found.items())


def _independence(evidence: Evidence, split_by: str) -> _Found:
    if split_by == "crop":
        reason = "crops of one image stand in training and in test: no field is independent"
        return "bad", reason, "split whole images: data.split_by=field"
    number, name = min((number, name) for name, number in evidence.units.items() if number)
    reason = f"{name!r} is tested on {counted(number, 'independent field')}, no class on fewer"
    if number < _FEW_FIELDS:
        advice = "take more images, or test each of them in turn by cross-validation"
        return ("bad" if number == 1 else "look"), reason, advice
    advice = "fields of one slide, day or patient are not independent: name it by data.split_by"
    return "good", reason, advice


def _leaks(audit: Audit, split_by: str) -> _Found:
    if audit.errors:
        return "bad", audit.errors[0], "mend this first: until then the figures mean nothing"
    if split_by == "crop":
        shared = f"{audit.shared_pixels['test']:.1%}"
        reason = f"training shows other crops of the tested images, with {shared} of their pixels"
        return "bad", reason, "expect less of new images; split whole ones: data.split_by=field"
    advice = "copies that were resized or compressed again go unnoticed: leave such out yourself"
    return "good", "no image, and no exact copy of one, stands in two splits", advice


def _shortcuts(evidence: Evidence, audit: Audit) -> _Found:
    bad = [warning for warning in audit.warnings if "confounded" in warning]
    look = [warning for warning in audit.warnings if "shortcut" in warning]
    clear = []  # what was measured and is none
    for subset in evidence.subsets["foreground"]:
        interval = subset.balanced_accuracy.interval_95
        if subset.name == "empty" and interval[0] is not None:
            few = " (few fields)" if subset.interval_note else ""
            text = (
                f"balanced accuracy on the {subset.num_crops} crops that show no cells is "
                f"{subset.balanced_accuracy.value:.2f} ({_between(interval)}), guessing reaches "
                f"{subset.chance:.2f}{few}"
            )
            if interval[0] <= subset.chance:
                clear.append(text)
            else:
                reads = "the network also reads background, lamp or dish"
                (look if few else bad).append(f"{reads}: {text}")
    background, chance = evidence.baselines.get("background"), _chance(evidence)
    if background and background.interval_95["balanced_accuracy"][0] is not None:
        interval = background.interval_95["balanced_accuracy"]
        text = (
            f"{background.description} give a balanced accuracy of "
            f"{background.balanced_accuracy:.2f} ({_between(interval)}), guessing {chance:.2f}"
        )
        (look if interval[0] > chance else clear).append(text)
    clusters = evidence.clusters
    if clusters and clusters.by_field > max(0, clusters.by_class):
        look.append(
            "in the network's features crops lie by field more than by class (silhouettes "
            f"{clusters.by_field:.2f} and {clusters.by_class:.2f})"
        )
    if bad or look:
        advice = "test on images of another day, dish or microscope before you believe the figures"
        return ("bad" if bad else "look"), "; ".join(bad + look), advice
    if clear:
        advice = "this rules out some shortcuts, not all: images of another day are the better test"
        return "good", "; ".join(clear), advice
    reason = "too few fields, or no crops without cells, to look for shortcuts"
    return "unmeasured", reason, "take more images, also of places without cells"


def _baselines(evidence: Evidence) -> _Found:
    if not evidence.baselines:
        return "unmeasured", "no baseline was computed for these crops", "train again"
    best = max(evidence.baselines.values(), key=lambda baseline: baseline.balanced_accuracy)
    gain = best.difference
    if evidence.unbeaten:
        advice = "the figures do not show that the network looks at cells; take more, varied images"
        unknown = gain.interval_95["balanced_accuracy"][0] is None and gain.balanced_accuracy > 0
        return ("unmeasured" if unknown else "bad"), evidence.unbeaten, advice
    reason = (
        f"balanced accuracy is {gain.balanced_accuracy:.2f} "
        f"({_between(gain.interval_95['balanced_accuracy'])}) above that of the best baseline, "
        f"{best.description}"
    )
    if gain.interval_note:
        return "look", f"{reason}; {gain.interval_note}", "take more images, or cross-validate"
    return "good", reason, "report this baseline beside the network"


def _calibration(evidence: Evidence) -> _Found:
    error = evidence.reliability.ece_calibrated
    low, high = error.interval_95
    if error.value is None or low is None:
        return "unmeasured", "too few independent fields to measure it", "take more images"
    reason = (
        f"calibrated probabilities are off by {100 * error.value:.0f} percentage points on average "
        f"({100 * low:.0f} to {100 * high:.0f})"
    )
    if error.value <= _CALIBRATED:
        return "good", reason, "use the calibrated probabilities, not the raw ones"
    advice = "do not take a probability at its word; more validation images mend this best"
    return ("bad" if low > _MISLEADING else "look"), reason, advice


def _convergence(curves: Sequence[Mapping[str, Any]], chance: float) -> _Found:
    val = [record for record in curves if record["split"] == "val"]
    if len(val) < 2:
        return "unmeasured", "no curves of a single training", "see the runs behind these figures"
    before, last = val[:-1], val[-1]
    lowest = min(record["loss"] for record in val)
    best = max(val, key=lambda r: (r["balanced_accuracy"], -r["loss"], r["step"]))
    reason = f"validation was best in epoch {best['epoch']} of {last['epoch']}"
    if best["balanced_accuracy"] <= chance:
        advice = "try another learning rate (optim.learning_rate) or more epochs (train.num_epochs)"
        return "bad", "on validation the network was never better than guessing", advice
    if last["balanced_accuracy"] > max(record["balanced_accuracy"] for record in before):
        first, second = [r["loss"] for r in curves if r["split"] == "train"][-2:]
        falls = f", and the training loss still fell ({first:.3g} to {second:.3g})"
        reason += falls if second < first else ""
        return "look", reason, "train longer (train.num_epochs): it may gain more"
    if last["loss"] > _RISEN * lowest:
        reason += f"; its loss rose again, from {lowest:.3g} to {last['loss']:.3g}: overfitting"
        return "look", reason, "the best epoch was used; more images or augmentation help"
    return "good", reason, "nothing to do"


def _amounts(test: SplitMetrics, audit: Audit) -> _Found:
    crops = {name: count["crops"] for name, count in audit.counts["train"].items()}
    rarest = min(crops, key=crops.__getitem__)
    low, high = test.interval_95["accuracy"]
    reason = f"{rarest!r} has {counted(crops[rarest], 'training crop')}, no class has fewer"
    if low is not None and high is not None:
        reason += f"; the accuracy is known to {100 * (high - low):.0f} percentage points"
        if crops[rarest] >= _FEW_CROPS and high - low <= _WIDE:
            return "good", reason, "nothing to do"
    return "look", reason, "take more images; more crops of the same images help less"


def _unknowns(evidence: Evidence) -> _Found:
    share = evidence.unknown_share
    reason = f"{share:.0%} of the test crops are called unknown, where 5 % are meant to be"
    if share > _MANY_UNKNOWN:
        advice = "the tested images differ from those of training and validation: look at them"
        return "look", reason, advice
    reason += "; whether other cells are noticed was not measured: every crop is of a known class"
    return "unmeasured", reason, "predict images of cells that the network does not know, and see"


def _chance(evidence: Evidence) -> float:
    """The balanced accuracy of guessing."""
    return 1 / sum(number > 0 for number in evidence.units.values())


def _between(interval: Interval) -> str:
    low, high = interval
    return "no interval" if low is None else f"{low:.2f} to {high:.2f}"
