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
_MORE = "take more images, or test each of them in turn by cross-validation"
_WHOLE = "expect less of new images; split whole ones: data.split_by=field"


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
        return (
            "bad",
            "crops of one image stand in training and in test: none is independent",
            _WHOLE,
        )
    number, name = min((number, name) for name, number in evidence.units.items() if number)
    reason = f"{name!r} is tested on {counted(number, 'independent field')}, no class on fewer"
    if number < _FEW_FIELDS:
        return ("bad" if number == 1 else "look"), reason, _MORE
    advice = "fields of one slide, day or patient are not independent: name it by data.split_by"
    return "good", reason, advice


def _leaks(audit: Audit, split_by: str) -> _Found:
    if audit.errors:
        return "bad", audit.errors[0], "mend this first: until then the figures mean nothing"
    if split_by == "crop":
        shared = f"{audit.shared_pixels['test']:.1%}"
        reason = f"training shows other crops of the tested images, with {shared} of their pixels"
        return "bad", reason, _WHOLE
    advice = "copies that were resized or compressed again go unnoticed: leave such out yourself"
    return "good", "no image, and no exact copy of one, stands in two splits", advice


def _shortcuts(evidence: Evidence, audit: Audit) -> _Found:
    bad = [warning for warning in audit.warnings if "confounded" in warning]
    look = [warning for warning in audit.warnings if "shortcut" in warning]
    clear = []  # measured, and none
    for subset in evidence.subsets["foreground"]:
        interval = subset.balanced_accuracy.interval_95
        if subset.name == "empty" and interval[0] is not None:
            text = (
                f"balanced accuracy on {subset.num_crops} crops that show no cells is "
                f"{_figure(subset.balanced_accuracy.value, interval)}, guessing {subset.chance:.2f}"
            )
            if interval[0] <= subset.chance:
                clear.append(text)
            else:
                text += ": the network reads background, lamp or dish"
                (look if subset.interval_note else bad).append(text)
    background, clusters = evidence.baselines.get("background"), evidence.clusters
    if background and (interval := background.interval_95["balanced_accuracy"])[0] is not None:
        figure = _figure(background.balanced_accuracy, interval)
        text = f"{background.description} give {figure}, guessing {_chance(evidence):.2f}"
        (look if interval[0] > _chance(evidence) else clear).append(text)
    if clusters and clusters.by_field > max(0, clusters.by_class):
        figures = f"{clusters.by_field:.2f} against {clusters.by_class:.2f}"
        look.append(f"the network groups crops by field more than by class (silhouette {figures})")
    if bad or look:
        advice = "test on images of another day, dish or microscope before you believe the figures"
        return ("bad" if bad else "look"), "; ".join(bad + look), advice
    if not clear:
        return "unmeasured", "too few fields with places without cells to look for any", _MORE
    advice = "this rules out some shortcuts, not all: images of another day are the better test"
    return "good", "; ".join(clear), advice


def _baselines(evidence: Evidence) -> _Found:
    best = max(evidence.baselines.values(), key=lambda baseline: baseline.balanced_accuracy)
    gain, interval = best.difference.balanced_accuracy, best.difference.interval_95
    if evidence.unbeaten:
        unknown = interval["balanced_accuracy"][0] is None and gain > 0
        return ("unmeasured" if unknown else "bad"), evidence.unbeaten, _MORE
    figure = _figure(gain, interval["balanced_accuracy"])
    reason = f"balanced accuracy is {figure} above that of the best, {best.description}"
    if best.difference.interval_note:
        return "look", f"{reason}; {best.difference.interval_note}", _MORE
    return "good", reason, "report it beside the network"


def _calibration(evidence: Evidence) -> _Found:
    error = evidence.reliability.ece_calibrated
    low = error.interval_95[0]
    if error.value is None or low is None:
        return "unmeasured", "too few independent fields to measure it", _MORE
    reason = f"stated probabilities are off by {_figure(error.value, error.interval_95)} on average"
    if error.value <= _CALIBRATED:
        return "good", reason, "use the calibrated probabilities, not the raw ones"
    advice = "do not take probabilities at their word; more validation images mend this best"
    return ("bad" if low > _MISLEADING else "look"), reason, advice


def _convergence(curves: Sequence[Mapping[str, Any]], chance: float) -> _Found:
    val = [record for record in curves if record["split"] == "val"]
    if len(val) < 2:
        return "unmeasured", "no curves of a single training", "see the runs behind these figures"
    best = max(val, key=lambda r: (r["balanced_accuracy"], -r["loss"], r["step"]))
    lowest, last = min(record["loss"] for record in val), val[-1]
    reason = f"validation was best in epoch {best['epoch']} of {last['epoch']}"
    if best["balanced_accuracy"] <= chance:
        advice = "try another optim.learning_rate, or more epochs (train.num_epochs)"
        return "bad", "on validation the network was never better than guessing", advice
    if last["balanced_accuracy"] > max(record["balanced_accuracy"] for record in val[:-1]):
        before, after = [r["loss"] for r in curves if r["split"] == "train"][-2:]
        reason += f"; training loss went from {before:.3g} to {after:.3g} in it"
        return "look", reason, "train longer (train.num_epochs): it may gain more"
    if last["loss"] > _RISEN * lowest:
        reason += f"; its loss rose from {lowest:.3g} to {last['loss']:.3g}: overfitting"
        return "look", reason, "the best epoch was used; more images or augmentation help"
    return "good", reason, "nothing to do"


def _amounts(test: SplitMetrics, audit: Audit) -> _Found:
    crops, name = min((count["crops"], name) for name, count in audit.counts["train"].items())
    low, high = test.interval_95["accuracy"]
    reason = f"{name!r} has {counted(crops, 'training crop')}, no class has fewer"
    if low is not None and high is not None:
        reason += f"; the accuracy is known to {100 * (high - low):.0f} percentage points"
        if crops >= _FEW_CROPS and high - low <= _WIDE:
            return "good", reason, "nothing to do"
    return "look", reason, _MORE


def _unknowns(evidence: Evidence) -> _Found:
    share = evidence.unknown_share
    reason = f"{share:.0%} of the test crops are called unknown, where 5 % are meant to be"
    if share > _MANY_UNKNOWN:
        return "look", reason, "test images differ from those of training and validation: look why"
    reason += "; whether cells of other kinds are noticed cannot be told without any"
    return "unmeasured", reason, "predict images of cells that the network does not know, and see"


def _chance(evidence: Evidence) -> float:
    """The balanced accuracy of guessing."""
    return 1 / sum(number > 0 for number in evidence.units.values())


def _figure(value: float | None, interval: Interval) -> str:
    """0.91 (0.85 to 0.95)."""
    return f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"
