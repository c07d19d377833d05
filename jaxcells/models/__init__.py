"""Networks by name, and weights for them."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxcells.files import Error
from jaxcells.models.preact import BasicUnit, BottleneckUnit, PreActResNet
from jaxcells.models.resnet import BasicBlock, Bottleneck, ResNet

# He et al. 2016, table 1; for 200 layers, He et al. 2016b, section 5.
_STAGE_SIZES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
_V1 = {
    f"{kind}{depth}": (BasicBlock if depth < 50 else Bottleneck, sizes, kind == "resnet")
    for kind in ("resnet", "plain")
    for depth, sizes in _STAGE_SIZES.items()
    if depth <= 152
}
_V2 = {
    f"preact{depth}": (BasicUnit if depth < 50 else BottleneckUnit, sizes, False)
    for depth, sizes in _STAGE_SIZES.items()
} | {
    # Three stages of n bottlenecks: 9n + 2 layers.
    f"preact{depth}": (BottleneckUnit, ((depth - 2) // 9,) * 3, True)
    for depth in (164, 1001)
}

MODEL_NAMES = (*_V1, *_V2)

__all__ = ["MODEL_NAMES", "create_model"]


def create_model(
    name: str,
    *,
    num_classes: int,
    dtype: DTypeLike = jnp.float32,
    width: int | None = None,
    zero_init_residual: bool = False,
    norms: bool = True,
    scan: bool = True,
) -> ResNet | PreActResNet:
    """Makes the network called `name`.

    Args:
        name: one of `MODEL_NAMES`: `resnet18`, …; `plain18`, …, the same without shortcuts; or
            `preact18`, …, with identity mappings, of which 164 and 1001 are made for small images.
        num_classes: number of logits.
        dtype: dtype of the computation, float32 or bfloat16; parameters and logits stay float32.
        width: channels of the stem, and width of the first stage; by default as published: 16 for
            `preact164` and `preact1001`, 64 for all others.
        zero_init_residual: start every residual block as the identity.
        norms: False leaves the batch norms out.
        scan: False runs a `preact` network unit after unit, see `PreActResNet`.

    Returns:
        A module with `apply(variables, x, train=...)`, see `ResNet`.

    Raises:
        Error: no such name, or zero_init_residual for a network that it would keep at zero or that
            has no norm at the end of its branches.
    """
    if name in _V2:
        unit, stage_sizes, cifar = _V2[name]
        if zero_init_residual:
            raise Error(
                f"model.zero_init_residual=True cannot be had for {name}, whose branches end in a "
                "convolution instead of a norm: set --config.model.zero_init_residual=False"
            )
        return PreActResNet(
            stage_sizes=stage_sizes,
            unit=unit,
            num_classes=num_classes,
            width=width or (16 if cifar else 64),
            cifar=cifar,
            norms=norms,
            dtype=jnp.dtype(dtype),
            scan=scan,
        )
    if name not in _V1:
        raise Error(
            f"model.name={name!r} is not known: set --config.model.name to one of "
            f"{', '.join(MODEL_NAMES)}"
        )
    block, stage_sizes, shortcut = _V1[name]
    if zero_init_residual and not shortcut:
        raise Error(
            f"model.zero_init_residual=True would leave {name} at zero for ever, since it has no "
            "shortcuts: set --config.model.zero_init_residual=False"
        )
    return ResNet(
        stage_sizes=stage_sizes,
        block=block,
        num_classes=num_classes,
        width=width or 64,
        shortcut=shortcut,
        zero_init_residual=zero_init_residual,
        norms=norms,
        dtype=jnp.dtype(dtype),
    )
