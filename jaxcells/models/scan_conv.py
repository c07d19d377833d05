"""Convolution as a function, and the form of it that stays fast where layers run in a loop.

On a CPU, XLA has a fast convolution for images in the order NHWC with kernels in the order HWIO. It
brings others into that order, but only outside loops (`ConvCanonicalization` visits the entry
computation alone, jax#12868); inside, as in the body of a scan over layers, they become plain loops
over scalars. JAX's derivatives of a convolution are convolutions in other orders: the gradient of a
kernel then takes some fifty times as long. `scan_convolve` states them in the fast order.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolves images, zero-padded by half the kernel.

    Args:
        x: `[B, H, W, C]`.
        kernel: `[k, k, C, O]` with odd k, of the same dtype.
        stride: step in both directions.

    Returns:
        `[B, ceil(H / stride), ceil(W / stride), O]`, of the same dtype.
    """
    return _convolution(x, kernel, border=kernel.shape[0] // 2, stride=stride)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def scan_convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """The same as `convolve`, for the body of a loop; can be differentiated in reverse mode only.

    A kernel of side 1 becomes a matrix product, whose gradients are matrix products.
    """
    return _multiply_or_convolve(x, kernel, stride)


def _multiply_or_convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    if kernel.shape[0] == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    return convolve(x, kernel, stride)


def _backward(
    stride: int, operands: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Accelerators recognise JAX's own form, and have kernels for it.
    return lax.platform_dependent(
        *operands,
        cotangent,
        cpu=partial(_canonical_gradients, stride=stride),
        default=lambda x, kernel, cotangent: jax.vjp(
            partial(_multiply_or_convolve, stride=stride), x, kernel
        )[1](cotangent),
    )


scan_convolve.defvjp(
    lambda x, kernel, stride: (scan_convolve(x, kernel, stride), (x, kernel)), _backward
)


def _canonical_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, *, stride: int
) -> tuple[jax.Array, jax.Array]:
    """The gradients with respect to images and kernel, as convolutions of NHWC with HWIO."""
    # With a stride, the output is every so manyth one of all: the others have a gradient of zero.
    spread = [
        (0, size - (stride * (kept - 1) + 1), stride - 1)
        for size, kept in zip(x.shape[1:3], cotangent.shape[1:3], strict=True)
    ]
    cotangent = lax.pad(cotangent, jnp.zeros((), cotangent.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
    images = scan_convolve(cotangent, kernel[::-1, ::-1].swapaxes(2, 3))
    if kernel.shape[0] == 1:
        # By itself, a product of bfloat16 is summed in bfloat16, over all positions of all images.
        sums = jnp.einsum("bhwc,bhwo->co", x, cotangent, preferred_element_type=jnp.float32)
        return images, sums[None, None].astype(kernel.dtype)
    # Over channels as images, images as channels and the gradient as a kernel of the image's size.
    by_channel = _convolution(
        x.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), border=kernel.shape[0] // 2
    )
    return images, by_channel.transpose(1, 2, 0, 3)


def _convolution(x: jax.Array, kernel: jax.Array, *, border: int, stride: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(border, border)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
