"""What brightness and contrast alone achieve: the figure every result must beat (NumPy only)."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

# In units of a feature's total variance: enough to invert the covariance of equal channels.
_RIDGE = 1e-4


def mean_std_baseline(
    train_images: Iterable[npt.NDArray[np.generic]],
    train_labels: npt.ArrayLike,
    eval_images: Iterable[npt.NDArray[np.generic]],
    eval_labels: npt.ArrayLike,
) -> float:
    """Accuracy of a linear classifier that sees each crop's channel means and deviations only.

    Staining, exposure and illumination often differ between the folders of two cell lines, and
    these statistics then tell the lines apart without one look at a cell. Linear discriminant
    analysis (Hastie, Tibshirani and Friedman 2009, sec. 4.3): one covariance for all classes,
    slightly regularised, and equal priors. Closed form, no random number.

    Args:
      train_images: [N, H, W, C] of any dtype, memory-mapped or not; one crop at a time is read.
      train_labels: [N] int.
      eval_images: [M, H, W, C].
      eval_labels: [M] int.

    Returns:
      The share of `eval_images` classified rightly.
    """
    train, evaluation = crop_statistics(train_images), crop_statistics(eval_images)
    center, variance = train.mean(axis=0), train.var(axis=0)
    train, evaluation = train - center, evaluation - center
    ridge = _RIDGE * np.diag(np.where(variance > 0, variance, 1))

    classes, index = np.unique(train_labels, return_inverse=True)
    means = np.stack([train[index == k].mean(axis=0) for k in range(len(classes))])  # [K, 2C]
    within = train - means[index]
    directions = np.linalg.solve(within.T @ within / len(train) + ridge, means.T)  # [2C, K]
    scores = evaluation @ directions - 0.5 * np.einsum("kf,fk->k", means, directions)
    return float((classes[scores.argmax(axis=1)] == np.asarray(eval_labels)).mean())


def crop_statistics(images: Iterable[npt.NDArray[np.generic]]) -> npt.NDArray[np.float64]:
    """Mean and standard deviation of every channel of every crop, [N, H, W, C] to [N, 2C]."""
    rows = []
    for image in images:
        # One contiguous row per channel: several times faster than a reduction over [H, W, 3].
        pixels = np.ascontiguousarray(image.reshape(-1, image.shape[-1]).T, dtype=np.float64)
        rows.append(np.concatenate([pixels.mean(axis=1), pixels.std(axis=1)]))
    return np.stack(rows)
