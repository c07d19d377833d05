"""Blocks with identity mappings, to 1001 layers (He et al. 2016b, Identity mappings).

Nothing acts on the sum of a block: `x_(l+1) = x_l + F(x_l)`, with norm and ReLU before every
convolution of F. Signal and gradient then pass from any block to any other as they are. A network
of them ends in a norm of its own, `final_bn`.
"""

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax

from jaxcells.models.layers import Conv, norm_layer
from jaxcells.models.resnet import Block, Layer


class PreActBlock(Block):
    """A residual unit with full pre-activation (fig. 4e): `x + branch(relu(norm(x)))`.

    Where the shape changes, the shortcut is a 1x1 convolution of what the branch gets, not of the
    raw input, and has no norm: as in the authors' code (github.com/KaimingHe/resnet-1k-layers).
    Behind a stem with norm and ReLU, the first unit has none of its own (appendix: "right after
    conv1 and before splitting").

    Attributes:
        activated: the input comes out of a norm and a ReLU: the unit has none before its fork.
        in_scan: see `Conv`.
    """

    activated: bool = False
    in_scan: bool = False

    preactivated: ClassVar[bool] = True

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


class PreActBasic(PreActBlock):
    """Two 3x3 convolutions."""

    expansion: ClassVar[int] = 1

    def branch(self, x: jax.Array, conv: Layer, norm: Layer) -> jax.Array:
        """See `Block.branch`."""
        y = conv(self.features, 3, self.stride, name="conv1")(x)
        y = nn.relu(norm(y, name="bn2"))
        return conv(self.features, 3, name="conv2")(y)


class PreActBottleneck(PreActBlock):
    """A 3x3 convolution between two 1x1 ones, the last four times as wide.

    The stride stands in the 3x3 convolution, as in `Bottleneck` and in fb.resnet.torch's
    `preresnet.lua`; the authors' code for 164 and 1001 layers has it in the first 1x1.
    """

    expansion: ClassVar[int] = 4

    def branch(self, x: jax.Array, conv: Layer, norm: Layer) -> jax.Array:
        """See `Block.branch`."""
        y = conv(self.features, 1, name="conv1")(x)
        y = nn.relu(norm(y, name="bn2"))
        y = conv(self.features, 3, self.stride, name="conv2")(y)
        y = nn.relu(norm(y, name="bn3"))
        return conv(self.features * self.expansion, 1, name="conv3")(y)
