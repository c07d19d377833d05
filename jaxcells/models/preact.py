"""Residual networks v2, to 1001 layers (He et al. 2016b, Identity mappings in deep residual nets).

Nothing acts on the sum of a unit: `x_(l+1) = x_l + F(x_l)`, with norm and ReLU before every
convolution of F. Signal and gradient then pass from any unit to any other as they are.

Layers have torchvision's names where it has such layers: `conv1`, `bn1`, `layer1_0/bn1`,
`layer1_0/conv1`, …, `layer2_0/downsample_conv`, …, `final_bn`, `fc`. The units of a stage that keep
the shape are all alike: `layer1_rest` holds their parameters and statistics, stacked along a first
axis, and a scan runs them. Compiling then takes as long as for one unit, and memory is needed for
what is between the units, while what is within them is computed anew on the way back.
"""

from __future__ import annotations

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


class Unit(nn.Module):
    """A residual unit with full pre-activation (fig. 4e): `x + branch(relu(norm(x)))`.

    Where the shape changes, the shortcut is a 1x1 convolution of what the branch gets, not of the
    raw input, and has no norm: as in the authors' code (github.com/KaimingHe/resnet-1k-layers).

    Attributes:
        features: width of the unit; it has `features * expansion` output channels.
        stride: step of the unit's one strided convolution.
        activated: the input comes out of a norm and a ReLU: the unit has none before its fork.
        norms: False leaves the norms out.
        dtype: dtype of the computation and the output.
        in_scan: see `Conv`.
    """

    features: int
    stride: int = 1
    activated: bool = False
    norms: bool = True
    dtype: DTypeLike = jnp.float32
    in_scan: bool = False

    expansion: ClassVar[int]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), O]`."""
        conv = partial(Conv, dtype=self.dtype, in_scan=self.in_scan)
        norm = norm_layer(self.norms, train=train, dtype=self.dtype)
        y = x if self.activated else nn.relu(norm(x, name="bn1"))
        channels = self.features * self.expansion
        if self.stride != 1 or x.shape[-1] != channels:
            x = conv(channels, 1, self.stride, name="downsample_conv")(y)
        return x + self.branch(y, conv, norm)

    def branch(self, y: jax.Array, conv: Layer, norm: Layer) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), O]`."""
        raise NotImplementedError


class BasicUnit(Unit):
    """Two 3x3 convolutions."""

    expansion: ClassVar[int] = 1

    def branch(self, y: jax.Array, conv: Layer, norm: Layer) -> jax.Array:
        """See `Unit.branch`."""
        y = conv(self.features, 3, self.stride, name="conv1")(y)
        y = nn.relu(norm(y, name="bn2"))
        return conv(self.features, 3, name="conv2")(y)


class BottleneckUnit(Unit):
    """A 3x3 convolution between two 1x1 ones, the last four times as wide.

    The stride stands in the 3x3 convolution, as in our networks v1 and in fb.resnet.torch's
    `preresnet.lua`; the authors' code for 164 and 1001 layers has it in the first 1x1.
    """

    expansion: ClassVar[int] = 4

    def branch(self, y: jax.Array, conv: Layer, norm: Layer) -> jax.Array:
        """See `Unit.branch`."""
        y = conv(self.features, 1, name="conv1")(y)
        y = nn.relu(norm(y, name="bn2"))
        y = conv(self.features, 3, self.stride, name="conv2")(y)
        y = nn.relu(norm(y, name="bn3"))
        return conv(self.features * self.expansion, 1, name="conv3")(y)


class PreActResNet(nn.Module):
    """The network, for images of any size with any number of channels.

    In one of two shapes: that of ResNet v1 for ImageNet, or that of the paper's table 3 for CIFAR,
    whose stem is a bare 3x3 convolution and whose three stages begin at full resolution. Behind the
    first stem's norm, ReLU and pooling, the first unit has no norm and ReLU of its own (paper,
    appendix: "right after conv1 and before splitting").

    A sequence of segments, as `ResNet` is: the stem, the units, pooling, the head.

    Attributes:
        stage_sizes: number of units in each stage; every stage but the first halves the image and
            doubles the width.
        unit: `BasicUnit` or `BottleneckUnit`.
        num_classes: number of logits K.
        width: channels of the stem, and width of the first stage: 64 and, for CIFAR, 16 in the
            paper.
        cifar: the shape for small images.
        norms: see `Unit`.
        dtype: dtype of the convolutions, float32 or bfloat16. Parameters, the norms' statistics,
            the pooled features and the logits are float32 in either case.
        scan: False runs unit after unit, each with its own name, `layer1_1`, `layer1_2`, …, and
            keeps everything for the way back.
    """

    stage_sizes: Sequence[int]
    unit: type[Unit]
    num_classes: int
    width: int = 64
    cifar: bool = False
    norms: bool = True
    dtype: DTypeLike = jnp.float32
    scan: bool = True

    @property
    def segments(self) -> tuple[tuple[str, ...], ...]:
        """Names of the top-level parameters in each segment, in the order of the computation."""
        stem = ("conv1",) if self.cifar else ("conv1", "bn1")
        units: list[tuple[str, ...]] = []
        for stage, num_units in enumerate(self.stage_sizes, start=1):
            single = 1 if self.scan else num_units
            units += [(f"layer{stage}_{index}",) for index in range(single)]
            if single < num_units:
                units.append((f"layer{stage}_rest",))
        return (stem, *units, ("final_bn",), ("fc",))

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
        segments = [self._stem, *self._units(), self._pool, self._head]
        for segment in segments[first:last]:
            x = segment(x, train=train)
        return x

    def _stem(self, x: jax.Array, *, train: bool) -> jax.Array:
        if self.cifar:
            return Conv(self.width, 3, dtype=self.dtype, name="conv1")(x)
        norm = norm_layer(self.norms, train=train, dtype=self.dtype)
        x = Conv(self.width, 7, 2, dtype=self.dtype, name="conv1")(x)
        return MaxPool(name="maxpool")(nn.relu(norm(x, name="bn1")))

    def _units(self) -> Iterator[Layer]:
        for stage, num_units in enumerate(self.stage_sizes):
            unit = partial(
                self.unit, features=self.width * 2**stage, norms=self.norms, dtype=self.dtype
            )
            name = f"layer{stage + 1}"
            yield unit(
                stride=2 if stage > 0 else 1,
                activated=stage == 0 and not self.cifar,
                name=f"{name}_0",
            )
            if not self.scan:
                yield from (unit(name=f"{name}_{index}") for index in range(1, num_units))
            elif num_units > 1:
                yield _repeat(unit(in_scan=True, name=f"{name}_rest"), num_units - 1)

    def _pool(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = norm_layer(self.norms, train=train, dtype=self.dtype)
        return jnp.mean(nn.relu(norm(x, name="final_bn")), axis=(1, 2), dtype=jnp.float32)

    def _head(self, x: jax.Array, *, train: bool) -> jax.Array:
        return nn.Dense(self.num_classes, name="fc")(x)


def _repeat(unit: Unit, number: int) -> Layer:
    """Makes a layer of `number` units with their variables stacked in `unit`."""

    def run(x: jax.Array, *, train: bool) -> jax.Array:
        def body(unit: Unit, x: jax.Array) -> tuple[jax.Array, None]:
            return unit(x, train=train), None

        # Within a scan nothing could undo the rematerialisation; preventing it costs time.
        scan = nn.scan(
            nn.remat(body, prevent_cse=False),
            variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=number,
        )
        x, _ = scan(unit, x)
        return x

    return run


def unstack(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Names the units of a scanned network one by one, as the network with `scan=False` does.

    Args:
        tree: parameters, statistics or gradients by name, or a dict of such trees by collection.

    Returns:
        The same with `layer1_1`, `layer1_2`, … in the place of `layer1_rest`: its slices.
    """
    units: dict[str, Any] = {}
    for name, branch in tree.items():
        if match := re.fullmatch(r"(layer\d+)_rest", name):
            for index in range(len(jax.tree.leaves(branch)[0])):
                units[f"{match[1]}_{index + 1}"] = jax.tree.map(lambda x, i=index: x[i], branch)
        else:
            units[name] = unstack(branch) if isinstance(branch, Mapping) else branch
    return units
