"""Eight lights on a tested network: what can be trusted, what to look at, what is not known."""

import dataclasses
from typing import Literal

from jaxcells.data.audit import Audit
from jaxcells.evaluation.evidence import Evidence
from jaxcells.evaluation.figures import Records
from jaxcells.evaluation.metrics import SplitMetrics
from jaxcells.text import counted

Light = Literal["good", "look", "bad", "unmeasured"]

# What to do about each.
_ADVICE = {
    "independent fields": "take more images; say what they share (slide, day) by data.split_by",
    "leaks": "resized or recompressed copies of images go unnoticed: leave such out yourself",
    "shortcuts": "compare exposure and stain of the classes; test on images of another day or dish",
    "baseline beaten": "train longer; a network that is no better is of no use: report that",
    "calibration": "more validation images and longer training make probabilities better",
    "convergence": "where it still improves, train longer (train.num_epochs)",
    "few crops": "take more images: more crops of the same images help less",
    "unknowns": "predict images of cells that the network does not know, and see what it says",
}
_FEW_FIELDS = 5  # per class: with fewer, intervals do not keep their promise
_FEW_CROPS = 50  # of a class, to train on
_WIDE = 0.2  # interval of the accuracy, from end to end
_CALIBRATED, _MISLEADING = 0.05, 0.10  # expected calibration error
_HOTTEST = 19.9  # temperatures are fitted up to 20
_MANY_UNKNOWN = 0.15  # the threshold asks for 0.05
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
    curves: Records,
    split_by: str,
    temperature: float = 1.0,
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
      temperature: the highest by which probabilities were calibrated.
    """
    chance = 1 / sum(number > 0 for number in evidence.units.values())
    found = {
        "independent fields": _independence(evidence, split_by),
        "leaks": _leaks(audit, split_by),
        "shortcuts": _shortcuts(evidence, audit, chance),
        "baseline beaten": _baselines(evidence),
        "calibration": _calibration(evidence, temperature),
        "convergence": _convergence(curves, chance),
        "few crops": _amounts(test, audit),
        "unknowns": _unknowns(evidence),
    }
    # What goes unnoticed is worth knowing where nothing was found, too.
    advice = {
        name: _ADVICE[name] if light != "good" or name == "leaks" else "nothing"
        for name, (light, _) in found.items()
    }
    return tuple(Check(name, *lit, advice[name]) for name, lit in found.items())


def _independence(evidence: Evidence, split_by: str) -> tuple[Light, str]:
    if split_by == "crop":
        return "bad", "crops of one image stand in training and in test: none is independent"
    number, name = min((number, name) for name, number in evidence.units.items() if number)
    reason = f"{name!r} is tested on {counted(number, 'independent field')}, no class on fewer"
    return "bad" if number == 1 else "look" if number < _FEW_FIELDS else "good", reason


def _leaks(audit: Audit, split_by: str) -> tuple[Light, str]:
    if audit.errors:
        return "bad", audit.errors[0]
    if split_by == "crop":
        shared = f"{audit.shared_pixels['test']:.1%} of the test pixels"
        return "bad", f"training shows {shared}: split whole images (data.split_by=field)"
    if alike := [warning for warning in audit.warnings if "to train and val" in warning]:
        return "look", f"{alike[0]}; of what is tested nothing was seen before"
    return "good", "no image, and no exact copy of one, stands in two splits"


def _shortcuts(evidence: Evidence, audit: Audit, chance: float) -> tuple[Light, str]:
    confounded = [warning for warning in audit.warnings if "confounded" in warning]
    # Groups of one class each are no fault where they are patients; batches of one class are.
    bad = [warning for warning in confounded if "batches" in warning]
    look = [warning for warning in confounded if warning not in bad]
    look += [warning for warning in audit.warnings if "shortcut" in warning]
    clear = []  # measured, and none
    border = evidence.baselines["background"]
    rows = [(border.description, border.score(), chance, look)]
    for subset in evidence.subsets["foreground"]:
        if subset.name == "empty":
            what = f"the network on {counted(subset.num_crops, 'crop')} without cells"
            # From a few fields of a class only, it is no more than a hint.
            found = bad if subset.num_fields * subset.chance >= _FEW_FIELDS else look
            rows.append((what, subset.balanced_accuracy, subset.chance, found))
    for what, score, guessing, found in rows:
        low, _ = score.interval_95
        text = f"{what}: balanced accuracy {score}, guessing {guessing:.3f}"
        if low is not None and low > guessing:
            found.append(f"{text}, so background, lamp or dish tell the classes apart")
        elif low is not None:
            clear.append(text)
    clusters = evidence.clusters
    if clusters and clusters.by_field > max(0, clusters.by_class):
        figures = f"{clusters.by_field:.2f} against {clusters.by_class:.2f}"
        look.append(f"the network groups crops by field more than by class (silhouette {figures})")
    few = "too few fields to look for any"
    if clear and min(filter(None, evidence.units.values())) < _FEW_FIELDS:
        few = "; ".join([*clear, "from so few fields of a class, none found is not none there"])
        clear = []
    light: Light = "bad" if bad else "look" if look else "good" if clear else "unmeasured"
    return light, "; ".join(bad + look or clear or [few])


def _baselines(evidence: Evidence) -> tuple[Light, str]:
    best = max(evidence.baselines.values(), key=lambda baseline: baseline.balanced_accuracy)
    gain = best.difference.score()
    if evidence.unbeaten:
        unknown = gain.interval_95[0] is None and best.difference.balanced_accuracy > 0
        return "unmeasured" if unknown else "bad", evidence.unbeaten
    reason = f"balanced accuracy is {gain} above that of the best, {best.description}"
    return "look" if best.difference.interval_note else "good", reason


def _calibration(evidence: Evidence, temperature: float) -> tuple[Light, str]:
    error = evidence.reliability.ece_calibrated
    low, _ = error.interval_95
    if error.value is None or low is None:
        return "unmeasured", "too few independent fields to measure it"
    reason = f"calibrated probabilities are off by {error} on average"
    if at_limit := temperature > _HOTTEST:
        reason += f"; the temperature of {temperature:.0f} is the highest that is tried"
    if low > _MISLEADING:
        return "bad", reason
    return "look" if at_limit or error.value > _CALIBRATED else "good", reason


def _convergence(curves: Records, chance: float) -> tuple[Light, str]:
    val = [record for record in curves if record["split"] == "val"]
    if len(val) < 2:
        return "unmeasured", "no curves of a single training: see the runs behind these figures"
    best = max(val, key=lambda r: (r["balanced_accuracy"], -r["loss"], r["step"]))
    lowest, last = min(record["loss"] for record in val), val[-1]
    reason = f"validation was best in epoch {best['epoch']} of {last['epoch']}"
    if best["balanced_accuracy"] <= chance:
        return "bad", "on validation the network was never better than guessing"
    if last["balanced_accuracy"] > max(record["balanced_accuracy"] for record in val[:-1]):
        before, after = [r["loss"] for r in curves if r["split"] == "train"][-2:]
        return "look", f"{reason}; training loss went from {before:.3g} to {after:.3g} in it"
    if last["loss"] > _RISEN * lowest:
        rise = f"from {lowest:.3g} to {last['loss']:.3g}"
        found = f"{reason}, which was used; then its loss rose, {rise}"
        return "look", f"{found}: overfitting, or too high a rate"
    return "good", reason


def _amounts(test: SplitMetrics, audit: Audit) -> tuple[Light, str]:
    crops, name = min((count["crops"], name) for name, count in audit.counts["train"].items())
    low, high = test.interval_95["accuracy"]
    reason = f"{name!r} has {counted(crops, 'training crop')}, no class has fewer"
    if low is None or high is None:
        return "look", f"{reason}; the accuracy has no interval"
    reason += f"; the accuracy is known to {100 * (high - low):.0f} percentage points"
    return "good" if crops >= _FEW_CROPS and high - low <= _WIDE else "look", reason


def _unknowns(evidence: Evidence) -> tuple[Light, str]:
    share = evidence.unknown_share
    reason = f"{share:.0%} of the test crops are called unknown, where 5 % are meant to be"
    if share > _MANY_UNKNOWN:
        return "look", f"{reason}: they differ from those of training and validation"
    return "unmeasured", f"{reason}; whether other cells are noticed takes such cells to tell"
