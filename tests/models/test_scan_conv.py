from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcells.models.layers import Conv
from jaxcells.models.scan_conv import convolve, scan_convolve


def _draw(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _pull_back(function, x, kernel):
    """The output, and the gradients with respect to images and kernel for some cotangent."""
    y, vjp = jax.vjp(function, x, kernel)
    return y, *vjp(_draw(*y.shape, seed=2, dtype=y.dtype))


# The plain convolution is compared with its definition in test_layers.py.
@pytest.mark.parametrize("shape", [(8, 8), (7, 10), (2, 1)])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (5, 3)])
def test_values_and_gradients_are_those_of_the_plain_convolution(shape, size, stride):
    x, kernel = _draw(3, *shape, 4), _draw(size, size, 4, 6, seed=1)
    expected = _pull_back(partial(convolve, stride=stride), x, kernel)
    actual = _pull_back(partial(scan_convolve, stride=stride), x, kernel)
    for ours, plain in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_bfloat16_gradients_are_summed_in_float32(size):
    # Each element of the kernel's gradient is a sum of 16,384 numbers near 1.
    x = 1 + _draw(64, 16, 16, 4, dtype=jnp.bfloat16) / 8
    kernel = jnp.ones((size, size, 4, 4), jnp.bfloat16)
    cotangent = 1 + _draw(64, 16, 16, 4, seed=2, dtype=jnp.bfloat16) / 8

    _, gradient = jax.vjp(scan_convolve, x, kernel)[1](cotangent)

    exact = jax.vjp(convolve, x.astype(jnp.float32), kernel.astype(jnp.float32))[1]
    _, expected = exact(cotangent.astype(jnp.float32))
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected, rtol=2**-8)


def test_layer_is_the_same_in_a_scan():
    layer, x = Conv(6, 3, 2), _draw(2, 7, 8, 4)
    variables = layer.init(jax.random.key(0), x)
    scanned = layer.clone(in_scan=True)
    jax.tree.map(np.testing.assert_array_equal, scanned.init(jax.random.key(0), x), variables)
    np.testing.assert_allclose(scanned.apply(variables, x), layer.apply(variables, x), atol=1e-5)
