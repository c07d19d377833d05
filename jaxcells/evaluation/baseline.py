"""What classifiers reach that see far less than the network: the figures every result must beat.

The linear classifier is linear discriminant analysis (Hastie, Tibshirani and Friedman 2009, sec.
4.3): one covariance for all classes, slightly regularised, and equal priors. Closed form, no random
number.
"""

from collections.abc import Collection, Iterable

import numpy as np
import numpy.typing as npt

from jaxcells.data.foreground import BLOCK, foreground_map
from jaxcells.data.parallel import parallel_map

# Names, and what each sees, in words that can stand in a sentence.
BASELINES = {
    "majority": "the most frequent class of the training crops",
    "brightness": "brightness and contrast of the crops alone",
    "background": "the border and the background of the crops alone",
}
# In units of a feature's total variance: enough to invert the covariance of equal channels.
_RIDGE = 1e-4
_BORDER = 16  # the border is a ring as wide as this part of the shorter side


def baseline_predictions(
    train_images: Collection[npt.NDArray[np.generic]],
    train_labels: npt.ArrayLike,
    test_images: Collection[npt.NDArray[np.generic]],
) -> dict[str, npt.NDArray[np.int64]]:
    """What the classifiers of `BASELINES` predict.

    "majority" always names the most frequent class of training, of equal ones the first.

    "brightness" is a linear classifier on each crop's means and deviations per channel. Staining,
    exposure and illumination often differ between the folders of two cell lines, and these figures
    then tell the lines apart without one look at a cell.

    "background" is a linear classifier on the same figures of two parts of each crop: a ring along
    its border, a sixteenth of the side wide, and the blocks that the rule of `foreground`, within
    the crop, finds no cells in. Where cells lie close together, both still show some of them.

    Args:
      train_images: [N, H, W, C] of any dtype, memory-mapped or not; a few crops at a time are read.
      train_labels: [N] int.
      test_images: [M, H, W, C].

    Returns:
      {name: int [M]}.
    """
    labels = np.asarray(train_labels, np.int64)
    majority = np.bincount(labels).argmax()
    train = crop_statistics(train_images), background_statistics(train_images)
    test = crop_statistics(test_images), background_statistics(test_images)
    return {
        "majority": np.full(len(test_images), majority),
        "brightness": linear_classifier(train[0], labels, test[0]),
        "background": linear_classifier(train[1], labels, test[1]),
    }


def linear_classifier(
    train: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], test: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
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


def crop_statistics(images: Iterable[npt.NDArray[np.generic]]) -> npt.NDArray[np.float64]:
    """Mean and standard deviation of every channel of every crop, [N, H, W, C] to [N, 2C]."""
    return np.stack([_mean_and_deviation(image.reshape(-1, image.shape[-1])) for image in images])


def background_statistics(images: Collection[npt.NDArray[np.generic]]) -> npt.NDArray[np.float64]:
    """Means and deviations of the channels of border and background, [N, H, W, C] to [N, 4C].

    Of crops smaller than a block, or all of whose blocks are foreground, the border counts twice.
    """

    def statistics(image: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
        ring = np.ones(image.shape[:2], bool)
        width = max(1, min(image.shape[:2]) // _BORDER)
        ring[width:-width, width:-width] = False
        empty = np.kron(~foreground_map(image), np.ones((BLOCK, BLOCK), bool))
        inside = image[: empty.shape[0], : empty.shape[1]][empty]
        border = _mean_and_deviation(image[ring])
        return np.concatenate([border, _mean_and_deviation(inside) if len(inside) else border])

    return np.stack(parallel_map(statistics, images, title="background"))


def _mean_and_deviation(pixels: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Of every channel, [P, C] to [2C]."""
    # One contiguous row per channel: several times faster than a reduction over [P, C].
    rows = np.ascontiguousarray(pixels.T, dtype=np.float64)
    return np.concatenate([rows.mean(axis=1), rows.std(axis=1)])
