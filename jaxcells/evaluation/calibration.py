"""What the validation split teaches about a network's probabilities, stored with the run."""

import dataclasses

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from jaxcells.evaluation import metrics
from jaxcells.evaluation.metrics import Score, Split
from jaxcells.evaluation.predictions import Predictions

_KEPT = 0.95
_NUM_BINS = 10


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How to read the outputs of one checkpoint.

    Attributes:
      checkpoint: its step.
      temperature: what logits are divided by (Guo et al. 2017).
      unknown_score: name of the score by which crops of no known class are told.
      unknown_threshold: crops with more are called unknown; 95 % of validation have less.
    """

    checkpoint: int
    temperature: float
    unknown_score: str
    unknown_threshold: float

    def apply(self, predictions: Predictions) -> Predictions:
        """Returns predictions of the same checkpoint with its temperature and unknown scores."""
        return dataclasses.replace(
            predictions,
            temperature=np.full(len(predictions.logits), self.temperature),
            unknown=unknown_scores(predictions) - self.unknown_threshold,
        )


def fit_calibration(validation: Predictions, checkpoint: int) -> Calibration:
    """Fits the temperature and the threshold on crops that were not trained on."""
    logits, labels = validation.logits.astype(np.float64), validation.labels

    def loss(log_temperature: float) -> float:
        log_probabilities = log_softmax(logits / np.exp(log_temperature), axis=1)
        return float(-log_probabilities[np.arange(len(labels)), labels].mean())

    temperature = float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))
    threshold = float(np.quantile(unknown_scores(validation), _KEPT))
    return Calibration(checkpoint, temperature, "largest softmax", threshold)


def unknown_scores(predictions: Predictions) -> npt.NDArray[np.float64]:
    """How little each crop looks like one of the known classes, [N]."""
    return -predictions.probabilities.max(axis=1)


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
    accuracies of small bins scatter.

    Args:
      predictions: of crops that were neither trained nor calibrated on.
      seed: of the replicates of the intervals, see `metrics.classification_metrics`.
    """
    split = Split(predictions.labels, predictions.groups, predictions.class_names, seed=seed)
    right = predictions.predicted == predictions.labels
    found: list[tuple[tuple[Bin, ...], Score]] = []
    for probabilities in (predictions.probabilities, predictions.calibrated):
        confidence = probabilities.max(axis=1)
        inner_edges = np.linspace(0, 1, _NUM_BINS + 1)[1:-1]
        number = np.searchsorted(inner_edges, confidence)
        members = (number == np.arange(_NUM_BINS)[:, None]).astype(np.float64)  # [bins, N]
        gaps = members * (confidence - right)
        errors = [
            np.abs(gaps @ weights).sum(axis=0) / weights.sum(axis=0)
            for weights in (np.ones((len(right), 1)), *metrics.replicate_weights(split))
        ]
        bins = []
        for chosen in members > 0:
            count = int(chosen.sum())
            means = [float(x[chosen].mean()) if count else None for x in (confidence, right)]
            bins.append(Bin(count, *means))
        found.append((tuple(bins), metrics.score(np.concatenate(errors))))
    (bins_raw, ece), (bins_calibrated, ece_calibrated) = found
    return Reliability(bins_raw, bins_calibrated, ece, ece_calibrated)
