"""Residual networks v1 (He et al. 2016, Deep residual learning), and the same without shortcuts.

Layers have torchvision's names and shapes: `conv1`, `bn1`, `layer1_0/conv1`, …,
`layer2_0/downsample_conv`, `layer2_0/downsample_bn`, `fc`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxcells.models.layers import BatchNorm, Conv, max_pool

Layer = Callable[..., Any]


class Block(nn.Module):
    """A few layers and a shortcut around them: `relu(x + branch(x))`.

    Where the branch changes the shape, the shortcut is a 1x1 convolution with a norm (option B of
    section 3.3); everywhere else it is the identity, without parameters.

    Attributes:
        features: width of the block; it has `features * expansion` output channels.
        stride: step of the block's one strided convolution.
        shortcut: False leaves the shortcut out: `relu(branch(x))`, a block of a plain network.
        zero_init_residual: start the last norm's scale at zero, the block at `relu(x)` (Goyal et
            al. 2017, section 5.1).
        dtype: dtype of the computation and the output.
    """

    features: int
    stride: int = 1
    shortcut: bool = True
    zero_init_residual: bool = False
    dtype: DTypeLike = jnp.float32

    expansion: ClassVar[int]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), O]`."""
        conv = partial(Conv, dtype=self.dtype)
        norm = partial(BatchNorm, use_running_average=not train, dtype=self.dtype)
        last_scale = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        y = self.branch(x, conv, norm, partial(norm, scale_init=last_scale))
        if self.shortcut:
            channels = self.features * self.expansion
            if self.stride != 1 or x.shape[-1] != channels:
                x = conv(channels, 1, self.stride, name="downsample_conv")(x)
                x = norm(name="downsample_bn")(x)
            y = y + x
        return nn.relu(y)

    def branch(self, x: jax.Array, conv: Layer, norm: Layer, last_norm: Layer) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), O]`."""
        raise NotImplementedError


class BasicBlock(Block):
    """Two 3x3 convolutions (fig. 5, left)."""

    expansion: ClassVar[int] = 1

    def branch(self, x: jax.Array, conv: Layer, norm: Layer, last_norm: Layer) -> jax.Array:
        """See `Block.branch`."""
        y = conv(self.features, 3, self.stride, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(self.features, 3, name="conv2")(y)
        return last_norm(name="bn2")(y)


class Bottleneck(Block):
    """A 3x3 convolution between two 1x1 ones, the last four times as wide (fig. 5, right).

    The stride stands in the 3x3 convolution, as in torchvision (ResNet v1.5, Goyal et al. 2017,
    section 5.1); He et al. put it in the first 1x1, where it drops three pixels of four unseen.
    """

    expansion: ClassVar[int] = 4

    def branch(self, x: jax.Array, conv: Layer, norm: Layer, last_norm: Layer) -> jax.Array:
        """See `Block.branch`."""
        y = conv(self.features, 1, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(self.features, 3, self.stride, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y))
        y = conv(self.features * self.expansion, 1, name="conv3")(y)
        return last_norm(name="bn3")(y)


class ResNet(nn.Module):
    """The network of table 1, for images of any size with any number of channels.

    Attributes:
        stage_sizes: number of blocks in each stage; every stage but the first halves the image and
            doubles the width.
        block: `BasicBlock` or `Bottleneck`.
        num_classes: number of logits K.
        width: width of the first stage.
        shortcut: False for the plain network of the same depth.
        zero_init_residual: see `Block`.
        dtype: dtype of the convolutions, float32 or bfloat16. Parameters, the norms' statistics,
            the pooled features and the logits are float32 in either case.
    """

    stage_sizes: Sequence[int]
    block: type[Block]
    num_classes: int
    width: int = 64
    shortcut: bool = True
    zero_init_residual: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Classifies images.

        Args:
            x: normalised images, float32 `[B, H, W, C]`.
            train: normalise by the statistics of the batch and move the running ones towards them
                (`batch_stats` must then be mutable), rather than by the running ones.

        Returns:
            Logits, float32 `[B, K]`.
        """
        x = Conv(self.width, 7, 2, dtype=self.dtype, name="conv1")(x)
        x = BatchNorm(use_running_average=not train, dtype=self.dtype, name="bn1")(x)
        x = max_pool(nn.relu(x))
        for stage, num_blocks in enumerate(self.stage_sizes):
            for index in range(num_blocks):
                x = self.block(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    shortcut=self.shortcut,
                    zero_init_residual=self.zero_init_residual,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{index}",
                )(x, train=train)
        features = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="fc")(features)
