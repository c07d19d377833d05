"""Residual networks v1 (He et al. 2016, Deep residual learning), and the same without shortcuts.

Layers have torchvision's names and shapes: `conv1`, `bn1`, `layer1_0/conv1`, …,
`layer2_0/downsample_conv`, `layer2_0/downsample_bn`, `fc`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxcells.models.layers import Conv, MaxPool, norm_layer

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
        norms: False leaves the norms out.
        dtype: dtype of the computation and the output.
    """

    features: int
    stride: int = 1
    shortcut: bool = True
    zero_init_residual: bool = False
    norms: bool = True
    dtype: DTypeLike = jnp.float32

    expansion: ClassVar[int]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), O]`."""
        conv = partial(Conv, dtype=self.dtype)
        norm = norm_layer(self.norms, train=train, dtype=self.dtype)
        last_scale = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        y = self.branch(x, conv, norm, partial(norm, scale_init=last_scale))
        if self.shortcut:
            channels = self.features * self.expansion
            if self.stride != 1 or x.shape[-1] != channels:
                x = conv(channels, 1, self.stride, name="downsample_conv")(x)
                x = norm(x, name="downsample_bn")
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
        y = nn.relu(norm(y, name="bn1"))
        y = conv(self.features, 3, name="conv2")(y)
        return last_norm(y, name="bn2")


class Bottleneck(Block):
    """A 3x3 convolution between two 1x1 ones, the last four times as wide (fig. 5, right).

    The stride stands in the 3x3 convolution, as in torchvision (ResNet v1.5, Goyal et al. 2017,
    section 5.1); He et al. put it in the first 1x1, where it drops three pixels of four unseen.
    """

    expansion: ClassVar[int] = 4

    def branch(self, x: jax.Array, conv: Layer, norm: Layer, last_norm: Layer) -> jax.Array:
        """See `Block.branch`."""
        y = conv(self.features, 1, name="conv1")(x)
        y = nn.relu(norm(y, name="bn1"))
        y = conv(self.features, 3, self.stride, name="conv2")(y)
        y = nn.relu(norm(y, name="bn2"))
        y = conv(self.features * self.expansion, 1, name="conv3")(y)
        return last_norm(y, name="bn3")


class ResNet(nn.Module):
    """The network of table 1, for images of any size with any number of channels.

    A sequence of segments: the stem, every block, pooling, the head. Some of them can be run alone,
    the later ones on what the earlier ones gave.

    Attributes:
        stage_sizes: number of blocks in each stage; every stage but the first halves the image and
            doubles the width.
        block: `BasicBlock` or `Bottleneck`.
        num_classes: number of logits K.
        width: width of the first stage.
        shortcut: False for the plain network of the same depth.
        zero_init_residual: see `Block`.
        norms: see `Block`.
        dtype: dtype of the convolutions, float32 or bfloat16. Parameters, the norms' statistics,
            the pooled features and the logits are float32 in either case.
    """

    stage_sizes: Sequence[int]
    block: type[Block]
    num_classes: int
    width: int = 64
    shortcut: bool = True
    zero_init_residual: bool = False
    norms: bool = True
    dtype: DTypeLike = jnp.float32

    @property
    def segments(self) -> tuple[tuple[str, ...], ...]:
        """Names of the top-level parameters in each segment, in the order of the computation."""
        blocks = [
            (f"layer{stage}_{index}",)
            for stage, num_blocks in enumerate(self.stage_sizes, start=1)
            for index in range(num_blocks)
        ]
        return (("conv1", "bn1"), *blocks, (), ("fc",))

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, first: int = 0, last: int | None = None
    ) -> jax.Array:
        """Classifies images, or runs `segments[first:last]`.

        Args:
            x: normalised images, float32 `[B, H, W, C]`; or what `segments[:first]` gave.
            train: normalise by the statistics of the batch and move the running ones towards them
                (`batch_stats` must then be mutable), rather than by the running ones.
            first: number of segments to leave out at the start.
            last: where to stop, as in a slice.

        Returns:
            Logits, float32 `[B, K]`; or the output of segment `last - 1`.
        """
        segments = [self._stem, *self._blocks(), self._pool, self._head]
        for segment in segments[first:last]:
            x = segment(x, train=train)
        return x

    def _stem(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = norm_layer(self.norms, train=train, dtype=self.dtype)
        x = Conv(self.width, 7, 2, dtype=self.dtype, name="conv1")(x)
        return MaxPool(name="maxpool")(nn.relu(norm(x, name="bn1")))

    def _blocks(self) -> Iterator[Layer]:
        for stage, num_blocks in enumerate(self.stage_sizes):
            for index in range(num_blocks):
                yield self.block(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    shortcut=self.shortcut,
                    zero_init_residual=self.zero_init_residual,
                    norms=self.norms,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{index}",
                )

    def _pool(self, x: jax.Array, *, train: bool) -> jax.Array:
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)

    def _head(self, x: jax.Array, *, train: bool) -> jax.Array:
        return nn.Dense(self.num_classes, name="fc")(x)
