import math

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from jaxcells.evaluation.baseline import (
    BASELINES,
    baseline_predictions,
    border_statistics,
    crop_statistics,
    linear_classifier,
)


def accuracy_of_brightness(train, train_labels, test, test_labels):
    predictions = baseline_predictions(train, train_labels, test)
    return (predictions["brightness"] == test_labels).mean()


def gaussian_crops(rng, labels, offset, size=32, channels=1):
    """Noise [N, size, size, channels]; brightness varies by 10 between crops, and by class."""
    brightness = rng.normal(100 + offset * np.asarray(labels), 10)
    noise = rng.normal(0, 2, (len(labels), size, size, channels))
    return brightness[:, None, None, None] + noise


def test_statistics_by_hand():
    crop = np.array([[[1, 10], [3, 10]], [[5, 10], [7, 50]]], np.uint8)
    statistics = crop_statistics(crop[None])
    assert statistics.tolist() == [[4, 20, math.sqrt(5), math.sqrt(300)]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_statistics_are_exact_in_every_dtype_and_layout(dtype, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 20, 30, 3)).astype(dtype)
    if dtype == np.uint16:
        images *= 257
    whole = crop_statistics(images)
    expected = [images.mean((1, 2), np.float64), images.astype(np.float64).std((1, 2))]
    np.testing.assert_allclose(whole, np.concatenate(expected, axis=1), rtol=1e-12)

    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    np.testing.assert_array_equal(crop_statistics(mapped), whole)
    parts = [crop_statistics(images[:2]), crop_statistics(images[2:6]), crop_statistics(images[6:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(crop_statistics(np.asfortranarray(images)), whole)


@pytest.mark.parametrize(("offset", "expected"), [(0, 0.5), (20, 0.8413), (100, 1.0)])
def test_accuracy_of_two_gaussians_is_the_optimum(offset, expected):
    # Means 20 apart, deviation 10: the best line is right with probability Phi(1) = 0.8413.
    rng = np.random.default_rng(1)
    labels = np.arange(3000) % 2
    images = gaussian_crops(rng, labels, offset, size=8)
    accuracy = accuracy_of_brightness(images[:1000], labels[:1000], images[1000:], labels[1000:])
    assert accuracy == pytest.approx(expected, abs=0.03)


def test_contrast_alone_is_found_too():
    rng = np.random.default_rng(2)
    labels = np.where(np.arange(200) % 2, 7, 3)  # need not be consecutive
    images = rng.normal(100, 5 + 2 * labels[:, None, None, None], (200, 32, 32, 1))
    assert accuracy_of_brightness(images[:100], labels[:100], images[100:], labels[100:]) == 1


def test_priors_are_balanced():
    # Nine in ten training crops are of class 0; a classifier with their share as prior would move
    # its border towards class 1 and lose a part of it.
    rng = np.random.default_rng(4)
    train_labels, eval_labels = (np.arange(2000) % 10 == 0).astype(int), np.ones(2000, int)
    train = gaussian_crops(rng, train_labels, 20, size=8)
    evaluation = gaussian_crops(rng, eval_labels, 20, size=8)
    accuracy = accuracy_of_brightness(train, train_labels, evaluation, eval_labels)
    assert accuracy == pytest.approx(0.8413, abs=0.03)


def test_equal_channels_and_constant_crops_do_not_break_it():
    rng = np.random.default_rng(5)
    labels = np.arange(100) % 2
    grey = gaussian_crops(rng, labels, 100)
    coloured = np.repeat(grey, 3, axis=-1)
    assert accuracy_of_brightness(coloured[:50], labels[:50], coloured[50:], labels[50:]) == 1
    flat = np.zeros((100, 4, 4, 1), np.uint8)
    assert accuracy_of_brightness(flat[:50], labels[:50], flat[50:], labels[50:]) == 0.5
    flat[labels == 1] = 200
    assert accuracy_of_brightness(flat[:50], labels[:50], flat[50:], labels[50:]) == 1


def test_the_linear_classifier_is_that_of_scikit_learn():
    rng = np.random.default_rng(6)
    index = np.arange(300) % 3
    labels = np.array([0, 1, 9])[index]  # need not be consecutive
    features = rng.normal(index[:, None] * [[1, 0, 0.01, 0]], [[1, 50, 0.01, 3]], (300, 4))
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3)
    expected = reference.fit(features[:200], labels[:200]).predict(features[200:])
    found = linear_classifier(features[:200], labels[:200], features[200:])
    assert 0.4 < (expected == labels[200:]).mean() < 0.95  # neither chance nor trivial
    np.testing.assert_array_equal(found, expected)


def test_border_is_a_ring_of_a_sixteenth_of_the_side():
    images = np.full((2, 64, 80, 2), 7, np.uint8)
    images[1, 4:-4, 4:-4] = 200  # inside of the ring
    images[1, 3, 5, 1] = 77  # in the ring
    statistics = border_statistics(images)
    num_pixels = 64 * 80 - 56 * 72
    assert statistics[0].tolist() == [7, 7, 0, 0]
    assert statistics[1, [0, 2]].tolist() == [7, 0]
    assert statistics[1, 1] == pytest.approx(7 + 70 / num_pixels)
    tiny = np.arange(8).reshape(1, 2, 2, 2)
    np.testing.assert_array_equal(border_statistics(tiny), crop_statistics(tiny))


def test_background_sees_the_border_alone_and_brightness_the_whole():
    rng = np.random.default_rng(7)
    labels = np.arange(200) % 2
    images = rng.normal(100, 2, (200, 32, 32, 1))
    images[:, 8:-8, 8:-8] += 5 * labels[:, None, None, None]  # cells in the middle
    found = baseline_predictions(images[:100], labels[:100], images[100:])
    assert found.keys() == BASELINES.keys()
    accuracies = {name: (found[name] == labels[100:]).mean() for name in found}
    assert accuracies["brightness"] == 1
    assert accuracies["background"] < 0.65
    images[:, :2] += 5 * labels[:, None, None, None]  # the lamp
    found = baseline_predictions(images[:100], labels[:100], images[100:])
    assert (found["background"] == labels[100:]).mean() == 1


def test_majority_is_that_of_the_training_crops():
    images = np.zeros((5, 8, 8, 1), np.uint8)
    found = baseline_predictions(images, [2, 0, 1, 1, 2], images[:3])["majority"]
    assert found.tolist() == [1, 1, 1]  # the first of equal ones
    assert baseline_predictions(images, [2, 0, 1, 2, 2], images[:2])["majority"].tolist() == [2, 2]
