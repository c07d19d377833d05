"""What classifiers reach that see far less than the network: the figures every result must beat.

The linear classifier is linear discriminant analysis (Hastie, Tibshirani and Friedman 2009, sec.
4.3): one covariance for all classes, slightly regularised, and equal priors. Closed form, no random
number.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from jaxcells.evaluation.bootstrap import Array, Ints

# Names, and what each sees, in words that can stand in a sentence.
BASELINES = {
    "majority": "the most frequent class of the training crops",
    "brightness": "brightness and contrast of the crops alone",
    "background": "brightness and contrast of the crops' border alone",
}
# In units of a feature's total variance: enough to invert the covariance of equal channels.
_RIDGE = 1e-4
_BORDER = 16  # the border is a ring as wide as this part of the shorter side

Images = npt.NDArray[np.generic]


def baseline_predictions(
    train_images: Images, train_labels: npt.ArrayLike, test_images: Images
) -> dict[str, Ints]:
    """What the classifiers of `BASELINES` predict.

    "majority" always names the most frequent class of training, of equal ones the first.

    "brightness" is a linear classifier on each crop's means and deviations per channel. Staining,
    exposure and illumination often differ between the folders of two cell lines, and these figures
    then tell the lines apart without one look at a cell.

    "background" is the same of a ring along the border of each crop, a sixteenth of the side wide,
    which holds no cell where crops are centred on cells or cells lie far apart, and pieces of cells
    elsewhere. The blocks in which `foreground` finds no cells are left out: it chooses them by
    texture, and their brightness and contrast then tell the texture of cells that lie close
    together (on the built-in sample 0.57 of crops beside 0.21 by the ring alone; by chance 0.33).

    Args:
      train_images: [N, H, W, C] of any dtype, memory-mapped or not; one crop at a time is read.
      train_labels: [N] int.
      test_images: [M, H, W, C].

    Returns:
      {name: int [M]}.
    """
    labels = np.asarray(train_labels, np.int64)
    predictions = {"majority": np.full(len(test_images), np.bincount(labels).argmax())}
    for name, statistics in (("brightness", crop_statistics), ("background", border_statistics)):
        train, test = statistics(train_images), statistics(test_images)
        predictions[name] = linear_classifier(train, labels, test)
    return predictions


def linear_classifier(train: Array, labels: Ints, test: Array) -> Ints:
    """Classes [M] by linear discriminants learnt from features [N, F] and labels [N]; test [M, F].

    Sees every feature in units of its deviation in training; a constant one decides nothing.
    """
    center, deviation = train.mean(axis=0), train.std(axis=0)
    scale = np.where(deviation > 0, deviation, 1)
    train, test = (train - center) / scale, (test - center) / scale
    classes, index = np.unique(labels, return_inverse=True)
    means = np.stack([train[index == k].mean(axis=0) for k in range(len(classes))])  # [K, F]
    within = train - means[index]
    covariance = within.T @ within / len(train) + _RIDGE * np.eye(train.shape[1])
    directions = np.linalg.solve(covariance, means.T)  # [F, K]
    scores = test @ directions - 0.5 * np.einsum("kf,fk->k", means, directions)
    return classes[scores.argmax(axis=1)]


def crop_statistics(images: Iterable[Images]) -> Array:
    """Mean and standard deviation of every channel of every crop, [N, H, W, C] to [N, 2C]."""
    rows = []
    for image in images:
        # One contiguous row per channel: several times faster than a reduction over [H, W, 3].
        pixels = np.ascontiguousarray(image.reshape(-1, image.shape[-1]).T, dtype=np.float64)
        rows.append(np.concatenate([pixels.mean(axis=1), pixels.std(axis=1)]))
    return np.stack(rows)


def border_statistics(images: Images) -> Array:
    """The same of a ring along the border of every crop, [N, H, W, C] to [N, 2C]."""
    height, width = images.shape[1:3]
    border = max(1, min(height, width) // _BORDER)
    ring = np.ones((height, width), bool)
    ring[border:-border, border:-border] = False
    return crop_statistics(image[ring] for image in images)
