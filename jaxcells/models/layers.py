"""Convolution, batch norm and max-pooling with torchvision's geometry.

Same names, same shapes and same padding as in torchvision, so that its weights fit; written so that
XLA makes good code of them on a CPU as well as on an accelerator.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxcells.models.scan_conv import convolve, scan_convolve

# Fan-out keeps the variance of the gradient through a layer and its ReLU (He et al. 2015, Delving
# deep into rectifiers, section 2.2); as in torchvision.
_he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """Square convolution without bias, zero-padded by half the kernel at all strides.

    With stride 2, "SAME" padding would put the odd row at the end, not at the start as torchvision
    does, and weights trained there would see every image shifted by a pixel.

    Attributes:
        features: number of output channels O.
        kernel_size: side of the kernel, odd.
        stride: step in both directions.
        dtype: dtype of the computation and the output; the kernel `[k, k, C, O]` is float32.
        in_scan: the layer runs in a scan over layers, see `scan_conv`.
    """

    features: int
    kernel_size: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    in_scan: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), O]`."""
        size = self.kernel_size
        shape = (size, size, x.shape[-1], self.features)
        kernel = self.param("kernel", _he_normal_fan_out, shape, jnp.float32)
        convolution = scan_convolve if self.in_scan else convolve
        return convolution(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


# Flax counts what it keeps, torch what it replaces: 0.9 is torch's 0.1.
BatchNorm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


def norm_layer(
    enabled: bool, *, train: bool, dtype: DTypeLike = jnp.float32
) -> Callable[..., jax.Array]:
    """Makes the norm of a block or network: `norm(x, name="bn1", scale_init=...)`.

    Whether statistics are those of the batch is said in the call, not in the module, so that
    `training.freeze` can decide otherwise for single norms.

    Args:
        enabled: False gives the identity, without parameters or statistics.
        train: normalise by the statistics of the batch, and move the running ones.
        dtype: dtype of the output.
    """

    def norm(x: jax.Array, **attributes: Any) -> jax.Array:
        return BatchNorm(dtype=dtype, **attributes)(x, use_running_average=not train)

    return norm if enabled else lambda x, **_: x


class MaxPool(nn.Module):
    """Takes the maximum over 3x3 windows at stride 2, with a border of -inf.

    The maximum of three shifted slices along each axis in turn: equal to `nn.max_pool`, and its
    gradient is elementwise, where that of a window reduction is XLA's `select_and_scatter`, which
    takes three to five times as long on a CPU. Positions that tie for the maximum share the
    gradient; torch gives it to the first. NaN propagates.

    A module, though it has no parameters, so that a table of layers shows it.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]`, floating point, to `[B, ceil(H / 2), ceil(W / 2), C]`."""
        for axis in (1, 2):
            size = x.shape[axis]
            half = (size + 1) // 2
            border = [(0, 0)] * x.ndim
            border[axis] = (1, 2 * half - size)
            padded = jnp.pad(x, border, constant_values=-jnp.inf)
            first, second, third = (
                lax.slice_in_dim(padded, start, start + 2 * half - 1, stride=2, axis=axis)
                for start in range(3)
            )
            x = jnp.maximum(jnp.maximum(first, second), third)
        return x
