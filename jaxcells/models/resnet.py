"""Residual networks (He et al. 2016, Deep residual learning), and the same without shortcuts.

`ResNet` is the whole network; its blocks are those of this module, or of `preact`.

Layers have torchvision's names and shapes: `conv1`, `bn1`, `layer1_0/conv1`, …,
`layer2_0/downsample_conv`, `layer2_0/downsample_bn`, `fc`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxcells.models.layers import Conv, MaxPool, norm_layer

Layer = Callable[..., Any]


class Block(nn.Module):
    """A few layers with a shortcut around them: what all blocks have in common.

    Attributes:
        features: width of the block; it has `features * expansion` output channels.
        stride: step of the block's one strided convolution.
        norms: False leaves the norms out.
        dtype: dtype of the computation and the output.
    """

    features: int
    stride: int = 1
    norms: bool = True
    dtype: DTypeLike = jnp.float32

    expansion: ClassVar[int]
    preactivated: ClassVar[bool] = False

    def branch(self, x: jax.Array, conv: Layer, norm: Layer) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), O]`."""
        raise NotImplementedError


class ResidualBlock(Block):
    """The block of 2015: `relu(x + branch(x))`.

    Where the branch changes the shape, the shortcut is a 1x1 convolution with a norm (option B of
    section 3.3); everywhere else it is the identity, without parameters.

    Attributes:
        shortcut: False leaves the shortcut out: `relu(branch(x))`, a block of a plain network.
        zero_init_residual: start the last norm's scale at zero, the block at `relu(x)` (Goyal et
            al. 2017, section 5.1).
    """

    shortcut: bool = True
    zero_init_residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), O]`."""
        conv = partial(Conv, dtype=self.dtype)
        norm = norm_layer(self.norms, train=train, dtype=self.dtype)
        y = self.branch(x, conv, norm)
        if self.shortcut:
            channels = self.features * self.expansion
            if self.stride != 1 or x.shape[-1] != channels:
                x = conv(channels, 1, self.stride, name="downsample_conv")(x)
                x = norm(x, name="downsample_bn")
            y = y + x
        return nn.relu(y)

    @property
    def last_scale(self) -> nn.initializers.Initializer:
        """What the scale of the branch's last norm starts from."""
        return nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (fig. 5, left)."""

    expansion: ClassVar[int] = 1

    def branch(self, x: jax.Array, conv: Layer, norm: Layer) -> jax.Array:
        """See `Block.branch`."""
        y = conv(self.features, 3, self.stride, name="conv1")(x)
        y = nn.relu(norm(y, name="bn1"))
        y = conv(self.features, 3, name="conv2")(y)
        return norm(y, name="bn2", scale_init=self.last_scale)


class Bottleneck(ResidualBlock):
    """A 3x3 convolution between two 1x1 ones, the last four times as wide (fig. 5, right).

    The stride stands in the 3x3 convolution, as in torchvision (ResNet v1.5, Goyal et al. 2017,
    section 5.1); He et al. put it in the first 1x1, where it drops three pixels of four unseen.
    """

    expansion: ClassVar[int] = 4

    def branch(self, x: jax.Array, conv: Layer, norm: Layer) -> jax.Array:
        """See `Block.branch`."""
        y = conv(self.features, 1, name="conv1")(x)
        y = nn.relu(norm(y, name="bn1"))
        y = conv(self.features, 3, self.stride, name="conv2")(y)
        y = nn.relu(norm(y, name="bn2"))
        y = conv(self.features * self.expansion, 1, name="conv3")(y)
        return norm(y, name="bn3", scale_init=self.last_scale)


class ResNet(nn.Module):
    """The network, for images of any size with any number of channels.

    In one of two shapes: that of table 1 for ImageNet, or that of He et al. 2016b, table 3, for
    CIFAR, whose stem is a bare 3x3 convolution and whose three stages begin at full resolution.

    A sequence of segments: the stem, every block, pooling, the head. Some of them can be run alone,
    the later ones on what the earlier ones gave.

    Attributes:
        stage_sizes: number of blocks in each stage; every stage but the first halves the image and
            doubles the width.
        block: `BasicBlock`, `Bottleneck`, `PreActBasic` or `PreActBottleneck`.
        num_classes: number of logits K.
        width: channels of the stem, and width of the first stage.
        cifar: the shape for small images.
        shortcut: see `ResidualBlock`; False for the plain network of the same depth.
        zero_init_residual: see `ResidualBlock`.
        norms: see `Block`.
        dtype: dtype of the convolutions, float32 or bfloat16. Parameters, the norms' statistics,
            the pooled features and the logits are float32 in either case.
        scan: pre-activation blocks of a stage that keep the shape are all alike, and a scan runs
            them: `layer1_rest` holds their parameters and statistics, stacked along a first axis.
            Compiling then takes as long as for one block, and memory is needed for what is between
            the blocks, while what is within them is computed anew on the way back. False runs block
            after block, each with its own name, `layer1_1`, `layer1_2`, …, and keeps everything.
    """

    stage_sizes: Sequence[int]
    block: type[Block]
    num_classes: int
    width: int = 64
    cifar: bool = False
    shortcut: bool = True
    zero_init_residual: bool = False
    norms: bool = True
    dtype: DTypeLike = jnp.float32
    scan: bool = False

    @property
    def segments(self) -> tuple[tuple[str, ...], ...]:
        """Names of the top-level parameters in each segment, in the order of the computation."""
        stem = ("conv1",) if self.cifar else ("conv1", "bn1")
        blocks = [(f"layer{stage}_{index}",) for stage, index, _ in self.layout()]
        pool = ("final_bn",) if self.block.preactivated else ()
        return (stem, *blocks, pool, ("fc",))

    def layout(self) -> Iterator[tuple[int, int | str, int]]:
        """Stage and index of every block, and how many are stacked in it: 1 but for "rest"."""
        for stage, num_blocks in enumerate(self.stage_sizes, start=1):
            num_single = 1 if self.scan else num_blocks
            yield from ((stage, index, 1) for index in range(num_single))
            if num_single < num_blocks:
                yield stage, "rest", num_blocks - num_single

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
        if self.cifar:
            return Conv(self.width, 3, dtype=self.dtype, name="conv1")(x)
        norm = norm_layer(self.norms, train=train, dtype=self.dtype)
        x = Conv(self.width, 7, 2, dtype=self.dtype, name="conv1")(x)
        return MaxPool(name="maxpool")(nn.relu(norm(x, name="bn1")))

    def _blocks(self) -> Iterator[Layer]:
        for stage, index, number in self.layout():
            if self.block.preactivated:
                activated = (stage, index) == (1, 0) and not self.cifar
                own: dict[str, Any] = {"activated": activated, "in_scan": index == "rest"}
            else:
                own = {"shortcut": self.shortcut, "zero_init_residual": self.zero_init_residual}
            block = self.block(
                features=self.width * 2 ** (stage - 1),
                stride=2 if stage > 1 and index == 0 else 1,
                norms=self.norms,
                dtype=self.dtype,
                name=f"layer{stage}_{index}",
                **own,
            )
            yield _repeat(block, number) if index == "rest" else block

    def _pool(self, x: jax.Array, *, train: bool) -> jax.Array:
        if self.block.preactivated:
            norm = norm_layer(self.norms, train=train, dtype=self.dtype)
            x = nn.relu(norm(x, name="final_bn"))
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)

    def _head(self, x: jax.Array, *, train: bool) -> jax.Array:
        return nn.Dense(self.num_classes, name="fc")(x)


def _repeat(block: Block, number: int) -> Layer:
    """Makes a layer of `number` blocks with their variables stacked in `block`."""

    def run(x: jax.Array, *, train: bool) -> jax.Array:
        def body(block: Block, x: jax.Array) -> tuple[jax.Array, None]:
            return block(x, train=train), None

        # Within a scan nothing could undo the rematerialisation; preventing it costs time.
        scan = nn.scan(
            nn.remat(body, prevent_cse=False),
            variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=number,
        )
        return scan(block, x)[0]

    return run


def unstack(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Names the blocks of a scanned network one by one, as the network with `scan=False` does.

    Args:
        tree: parameters, statistics or gradients by name, or a dict of such trees by collection.

    Returns:
        The same with `layer1_1`, `layer1_2`, … in the place of `layer1_rest`: its slices.
    """
    blocks: dict[str, Any] = {}
    for name, branch in tree.items():
        if match := re.fullmatch(r"(layer\d+)_rest", name):
            for index in range(len(jax.tree.leaves(branch)[0])):
                blocks[f"{match[1]}_{index + 1}"] = jax.tree.map(lambda x, i=index: x[i], branch)
        else:
            blocks[name] = unstack(branch) if isinstance(branch, Mapping) else branch
    return blocks
