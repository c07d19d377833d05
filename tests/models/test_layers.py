import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcells.models.layers import Conv, MaxPool
from tests.models.networks import convolve

max_pool = functools.partial(MaxPool().apply, {})


@pytest.mark.parametrize("shape", [(8, 9), (9, 8)])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_convolution_is_the_definition_with_torch_padding(shape, size, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*shape, 2)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 2, 3)).astype(np.float32)

    y = Conv(3, size, stride).apply({"params": {"kernel": kernel}}, x[None])

    np.testing.assert_allclose(y, convolve(x[None], kernel, stride), rtol=1e-5, atol=1e-5)


def test_convolution_starts_with_the_variance_of_torch():
    kernel = Conv(64, 3).init(jax.random.key(0), jnp.zeros((1, 4, 4, 32)))["params"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (3 * 3 * 64)), rtol=0.02)
    np.testing.assert_allclose(kernel.mean(), 0, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (6, 7), (7, 6)])
def test_max_pool_is_the_maximum_over_windows(shape):
    x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32) - 10
    expected = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    np.testing.assert_array_equal(max_pool(x), expected)


def test_max_pool_sends_the_gradient_to_the_maximum():
    rng = np.random.default_rng(0)
    x = rng.permutation(2 * 9 * 8 * 3).reshape(2, 9, 8, 3).astype(np.float32)  # no ties
    cotangent = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)

    def by_windows(x):
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    (gradient,) = jax.vjp(max_pool, x)[1](cotangent)
    (expected,) = jax.vjp(by_windows, x)[1](cotangent)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


def test_max_pool_shares_the_gradient_among_ties():
    gradient = jax.grad(lambda x: max_pool(x).sum())(jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(gradient[0, :, :, 0], np.full((2, 2), 0.25))


def test_max_pool_passes_nan_on():
    x = np.zeros((1, 6, 6, 1), np.float32)
    x[0, 3, 2] = np.nan
    expected = np.zeros((3, 3), bool)
    expected[1:, 1] = True
    np.testing.assert_array_equal(np.isnan(max_pool(x)[0, :, :, 0]), expected)


def test_max_pool_keeps_bfloat16():
    x = jnp.arange(16, dtype=jnp.bfloat16).reshape(1, 4, 4, 1)
    pooled = max_pool(x)
    assert pooled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pooled[0, :, :, 0], [[5, 7], [13, 15]])
