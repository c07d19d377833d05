"""What the validation split teaches about a network's probabilities, stored with the run."""

import base64
import dataclasses

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.preprocessing import normalize

from jaxcells.evaluation.bootstrap import NO_INTERVAL, Array, Bools, Split, weights_of
from jaxcells.evaluation.metrics import Score
from jaxcells.evaluation.predictions import Predictions

_KEPT = 0.95
_UPPER = 0.975  # end of a 95 % interval
_NUM_BINS = 10
_TEMPERATURES = 0.25, 20.0
# So many crops of a class do nearly as well as all 100: areas of 0.75 and 0.76 (benchmarks).
_BANK = 50


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How to read the outputs of one checkpoint.

    Attributes:
      checkpoint: its step.
      temperature: what logits are divided by (Guo et al. 2017).
      unknown_score: name of the score by which crops of no known class are told.
      unknown_threshold: crops with more are called unknown; 95 % of validation have less.
      unknown_bank: features of the validation crops that it measures distances to, scaled to
        length 1: float16 [B, D] in base64.
    """

    checkpoint: int
    temperature: float
    unknown_score: str
    unknown_threshold: float
    unknown_bank: str

    def apply(self, predictions: Predictions) -> Predictions:
        """Returns predictions of the same checkpoint with its temperature and unknown scores."""
        bank = np.frombuffer(base64.b64decode(self.unknown_bank), "<f2")
        features = _directions(predictions)
        cosines = features @ bank.reshape(-1, features.shape[1]).T.astype(np.float64)
        distances = 1 - cosines.max(axis=1)
        return dataclasses.replace(
            predictions,
            temperature=np.full(len(distances), self.temperature),
            unknown=distances - self.unknown_threshold,
        )


def fit_calibration(validation: Predictions, checkpoint: int) -> Calibration:
    """Fits the temperature and the threshold on crops that were not trained on.

    The temperature is the likeliest one between 0.25 and 20 (Guo et al. 2017, section 4.2). Where
    no validation crop is wrong, the likelihood rises without end with confidence, and would ask for
    a certainty that so few crops cannot vouch for: the temperature is then 1, the network's own.

    A crop is called unknown by the cosine distance of its pooled features to the nearest of at most
    50 validation crops of each class (Sun et al. 2022, with k = 1). The threshold keeps 95 % of the
    validation crops, each measured to the crops of other fields (groups), as a new field is.
    On average over seven trainings of a small network, each without one class, neighbours told the
    left-out class better than largest softmax, energy and distances to class means
    (benchmarks/RESULTS.md), but not well: areas under ROC of 0.69 to 0.80. Of the left-out crops 1
    to 65 % were called unknown, and of known ones 3 to 14 %. What is called unknown is worth a
    look; what is not may be unknown all the same. Of a single group nothing can be learnt, and
    nothing is called unknown.
    """
    logits, labels = validation.logits.astype(np.float64), validation.labels

    def loss(log_temperature: float) -> float:
        log_probabilities = log_softmax(logits / np.exp(log_temperature), axis=1)
        return float(-log_probabilities[np.arange(len(labels)), labels].mean())

    temperature = 1.0
    if (validation.predicted != labels).any():
        bounds = np.log(_TEMPERATURES)
        temperature = float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))
    of_classes = (np.flatnonzero(labels == k) for k in np.unique(labels))
    # Evenly over the order of the manifest, and so over fields.
    chosen = np.concatenate([crops[:: -(-len(crops) // _BANK)] for crops in of_classes])
    features = _directions(validation)
    bank = features[chosen].astype("<f2")
    own = validation.groups[:, None] == validation.groups[chosen]
    # Opposite vectors are the farthest: where there is no other group, nothing is unknown.
    cosines = np.where(own, -1, features @ bank.T.astype(np.float64))
    threshold = float(np.quantile(1 - cosines.max(axis=1), _KEPT))
    stored = base64.b64encode(bank.tobytes()).decode()
    return Calibration(checkpoint, temperature, "nearest neighbour", threshold, stored)


def _directions(predictions: Predictions) -> Array:
    """The features of every crop, scaled to length 1, [N, D]."""
    assert predictions.features is not None, "networks of several folds share no features"
    return normalize(predictions.features.astype(np.float64))


@dataclasses.dataclass(frozen=True)
class Bin:
    """Crops whose predicted class is about equally probable; a point of a reliability diagram.

    Attributes:
      count: number of crops.
      confidence: mean probability of their predicted classes; None of no crop.
      accuracy: share of them that is right; None of no crop.
    """

    count: int
    confidence: float | None
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class Reliability:
    """How far probabilities can be taken at their word.

    Attributes:
      bins: ten of equal width, from 0 to 1, by the probabilities of the network as trained.
      bins_calibrated: ten by the calibrated probabilities.
      ece: expected calibration error of the former, see `reliability`.
      ece_calibrated: of the latter.
    """

    bins: tuple[Bin, ...]
    bins_calibrated: tuple[Bin, ...]
    ece: Score
    ece_calibrated: Score


def reliability(predictions: Predictions, *, seed: int) -> Reliability:
    """Compares the probability of the predicted class with how often it is right.

    The expected calibration error is the mean of |confidence - accuracy| over ten bins of equal
    width, (0, 0.1] to (0.9, 1], weighted by their crops (Guo et al. 2017, section 2). It is never
    below 0 and biased upwards: perfectly calibrated probabilities of few crops have one too, for
    accuracies of small bins scatter (0.04 on average with 30 fields of five crops in each of two
    classes, 0.08 with 6). Replicates of a bootstrap are biased once more, and their percentiles
    would always rule out 0. So the lower end is the error less the 97.5 % quantile of the sum over
    bins of |gap of a replicate - gap of the split|: by the triangle inequality that bounds what
    chance adds. The upper end is the percentile of the replicates less twice their bias.

    How often that holds the truth, simulated with two classes, five crops a unit and a correlation
    of 0.3 within units: of calibrated probabilities 98 % with 30 units a class, 96 % with 12 or 6,
    90 % with 3; 94 to 99 % where the true error is 0.05 or 0.08. The price is that such intervals
    often reach down to 0: of a true error of 0.05 two of three do with 30 units a class.

    Args:
      predictions: of crops that were neither trained nor calibrated on.
      seed: of the replicates, see `metrics.classification_metrics`.
    """
    split, right = predictions.split(seed), predictions.predicted == predictions.labels
    raw = _binned(predictions.probabilities.max(axis=1), right, split)
    calibrated = _binned(predictions.calibrated.max(axis=1), right, split)
    return Reliability(raw[0], calibrated[0], raw[1], calibrated[1])


def _binned(confidence: Array, right: Bools, split: Split) -> tuple[tuple[Bin, ...], Score]:
    """The bins of a reliability diagram, and the expected calibration error."""
    inner_edges = np.linspace(0, 1, _NUM_BINS + 1)[1:-1]
    members = np.searchsorted(inner_edges, confidence) == np.arange(_NUM_BINS)[:, None]
    bins = []
    for chosen in members:
        means = [float(x[chosen].mean()) if chosen.any() else None for x in (confidence, right)]
        bins.append(Bin(int(chosen.sum()), *means))
    gap = members * (confidence - right)
    # [bins, 1 + replicates]
    gaps = np.hstack([gap @ drawn / drawn.sum(axis=0) for drawn in weights_of(split)])
    error, *errors = np.abs(gaps).sum(axis=0).tolist()
    if not errors:
        return tuple(bins), Score(error, NO_INTERVAL)
    chance = np.quantile(np.abs(gaps[:, 1:] - gaps[:, :1]).sum(axis=0), _UPPER)
    high = np.quantile(errors, _UPPER) - 2 * (np.mean(errors) - error)
    return tuple(bins), Score(error, (max(0.0, float(error - chance)), max(error, float(high))))
