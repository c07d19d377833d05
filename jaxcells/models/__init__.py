"""Networks by name, and weights for them."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxcells.errors import Error
from jaxcells.models.resnet import BasicBlock, Bottleneck, ResNet

# He et al. 2016, table 1.
_DEPTHS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
_NETWORKS = {
    f"{kind}{depth}": (block, stage_sizes, kind == "resnet")
    for kind in ("resnet", "plain")
    for depth, (block, stage_sizes) in _DEPTHS.items()
}

MODEL_NAMES = tuple(_NETWORKS)

__all__ = ["MODEL_NAMES", "create_model"]


def create_model(
    name: str,
    *,
    num_classes: int,
    dtype: DTypeLike = jnp.float32,
    width: int = 64,
    zero_init_residual: bool = False,
    norms: bool = True,
) -> ResNet:
    """Makes the network called `name`.

    Args:
        name: one of `MODEL_NAMES`: `resnet18`, …, or `plain18`, …, the same without shortcuts.
        num_classes: number of logits.
        dtype: dtype of the computation, float32 or bfloat16; parameters and logits stay float32.
        width: channels of the first stage.
        zero_init_residual: start every residual block as the identity.
        norms: False leaves the batch norms out.

    Returns:
        A module with `apply(variables, x, train=...)`, see `ResNet`.

    Raises:
        Error: no such name, or a plain network whose blocks would all start at zero.
    """
    if name not in _NETWORKS:
        raise Error(
            f"model.name={name!r} is not known: set --config.model.name to one of "
            f"{', '.join(MODEL_NAMES)}"
        )
    block, stage_sizes, shortcut = _NETWORKS[name]
    if zero_init_residual and not shortcut:
        raise Error(
            f"model.zero_init_residual=True would leave {name} at zero for ever, since it has no "
            "shortcuts: set --config.model.zero_init_residual=False"
        )
    return ResNet(
        stage_sizes=stage_sizes,
        block=block,
        num_classes=num_classes,
        width=width,
        shortcut=shortcut,
        zero_init_residual=zero_init_residual,
        norms=norms,
        dtype=jnp.dtype(dtype),
    )
