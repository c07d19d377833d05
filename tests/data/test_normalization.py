import numpy as np
import pytest

from jaxcells import Error
from jaxcells.data.normalization import IMAGENET_MEAN, IMAGENET_STD, fit_normalization


def test_imagenet_normalisation_is_that_of_torchvision():
    images = np.array([0, 51, 255, 128], np.uint8).repeat(3).reshape(1, 2, 2, 3)
    normalization = fit_normalization(images, "auto")
    assert normalization.kind == "imagenet"
    expected = (images / 255 - IMAGENET_MEAN) / IMAGENET_STD
    result = normalization(images)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)
    jax = pytest.importorskip("jax")
    np.testing.assert_allclose(jax.jit(normalization)(images), result, atol=2e-6, rtol=0)


def test_grey_becomes_three_equal_channels():
    grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(
        fit_normalization(grey, "auto")(grey),
        fit_normalization(grey.repeat(3, -1), "auto")(grey.repeat(3, -1)),
    )


def test_percentiles_of_every_channel_are_exact():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60000, (7, 50, 40, 2), dtype=np.uint16)
    normalization = fit_normalization(images, "auto")
    assert normalization.kind == "percentile"
    for channel in range(2):
        low, high = np.percentile(images[..., channel], (0.5, 99.5), method="lower")
        assert (normalization.low[channel], normalization.high[channel]) == (low, high)
    result = normalization(images)
    assert result.shape == (7, 50, 40, 2)
    span = np.subtract(normalization.high, normalization.low)
    expected = ((images - np.array(normalization.low)) / span - 0.449) / 0.226
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_percentiles_of_many_pixels_are_of_a_regular_sample_and_nothing_is_clipped(monkeypatch):
    monkeypatch.setattr("jaxcells.data.normalization._MAX_PIXELS", 1000)
    images = np.random.default_rng(0).random((20, 40, 40, 1), np.float32)
    images += np.arange(20, dtype=np.float32)[:, None, None, None]
    images[0, 0, 1] = 9000
    normalization = fit_normalization(images, "auto")
    assert normalization.kind == "percentile"
    assert normalization.low[0] == pytest.approx(0.1, abs=0.1)
    assert normalization.high[0] == pytest.approx(19.9, abs=0.1)
    assert normalization(images).max() > 100


def test_mistakes_are_named():
    with pytest.raises(Error, match="these are uint16 with 1 channels"):
        fit_normalization(np.zeros((1, 4, 4, 1), np.uint16), "imagenet")
    flat = np.random.default_rng(0).integers(0, 999, (3, 8, 8, 2), dtype=np.uint16)
    flat[..., 1] = 7
    with pytest.raises(Error, match=r"channel 1 of the training crops has no contrast.*both 7"):
        fit_normalization(flat, "percentile")
