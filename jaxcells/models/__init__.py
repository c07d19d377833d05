"""Networks by name, and weights for them. docs/extending.md says how to add one."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxcells.files import Error
from jaxcells.models.preact import PreActBasic, PreActBottleneck
from jaxcells.models.resnet import BasicBlock, Bottleneck, ResNet

# He et al. 2016, table 1; for 200 layers, He et al. 2016b, section 5.
_STAGE_SIZES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    # For small images: three stages of n bottlenecks make 9n + 2 layers.
    164: (18, 18, 18),
    1001: (111, 111, 111),
}
# The basic block and the bottleneck of every kind, and its depths.
_KINDS = {
    "resnet": (BasicBlock, Bottleneck, (18, 34, 50, 101, 152)),
    "plain": (BasicBlock, Bottleneck, (18, 34, 50, 101, 152)),
    "preact": (PreActBasic, PreActBottleneck, tuple(_STAGE_SIZES)),
}

# Networks of other kinds by name; each is called with `num_classes`, `width` and `dtype`.
NETWORKS: dict[str, Callable[..., nn.Module]] = {}

MODEL_NAMES = tuple(f"{kind}{depth}" for kind, (*_, depths) in _KINDS.items() for depth in depths)


def create_model(
    name: str,
    *,
    num_classes: int,
    dtype: DTypeLike = jnp.float32,
    width: int | None = None,
    zero_init_residual: bool = False,
    norms: bool = True,
    scan: bool = True,
) -> nn.Module:
    """Makes the network called `name`.

    Args:
        name: one of `MODEL_NAMES`: `resnet18`, …; `plain18`, …, the same without shortcuts; or
            `preact18`, …, with identity mappings, of which 164 and 1001 are made for small images.
            Or one of `NETWORKS`.
        num_classes: number of logits.
        dtype: dtype of the computation, float32 or bfloat16; parameters and logits stay float32.
        width: channels of the stem, and width of the first stage; by default as published: 16 for
            `preact164` and `preact1001`, 64 for all others.
        zero_init_residual: start every residual block as the identity.
        norms: False leaves the batch norms out.
        scan: False runs a `preact` network unit after unit, see `ResNet`.

    Returns:
        A module with `apply(variables, x, train=...)`: a `ResNet`, but for one of `NETWORKS`.

    Raises:
        Error: no such name, or zero_init_residual for a network that it would keep at zero or that
            has no norm at the end of its branches.
    """
    kind = name.rstrip("0123456789")
    names = (*MODEL_NAMES, *NETWORKS)
    if name not in names:
        raise Error(f"model.name={name} is no network; choose one of {', '.join(names)}")
    if zero_init_residual and kind != "resnet":
        raise Error(
            f"model.zero_init_residual=True is for resnet alone, not for {name}: plain has no "
            "shortcuts and would stay at zero for ever, preact no norms at the ends of its "
            "branches; set model.zero_init_residual=False"
        )
    if name in NETWORKS:
        return NETWORKS[name](num_classes=num_classes, width=width or 64, dtype=jnp.dtype(dtype))
    basic, bottleneck, _ = _KINDS[kind]
    depth = int(name.removeprefix(kind))
    cifar = len(_STAGE_SIZES[depth]) == 3
    return ResNet(
        stage_sizes=_STAGE_SIZES[depth],
        block=basic if depth < 50 else bottleneck,
        num_classes=num_classes,
        width=width or (16 if cifar else 64),
        cifar=cifar,
        shortcut=kind != "plain",
        zero_init_residual=zero_init_residual,
        norms=norms,
        dtype=jnp.dtype(dtype),
        scan=scan and kind == "preact",
    )


def require_segments(model: nn.Module, name: str, what: str) -> None:
    """Refuses what needs the layout and names of a `ResNet`.

    Raises:
        Error: the network has no segments.
    """
    if not hasattr(model, "segments"):
        raise Error(
            f"model.name={name}: {what} needs the segments and names of a residual network, and "
            "this network has none; it can be trained, evaluated and compared"
        )
