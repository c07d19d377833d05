"""What the validation split teaches about a network's probabilities, stored with the run."""

import dataclasses

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from jaxcells.evaluation.predictions import Predictions

_KEPT = 0.95


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
