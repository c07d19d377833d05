"""Puts weights from elsewhere into a network's variables, with every tensor accounted for."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcells.errors import Error
from jaxcells.models.torch_format import (
    KeyPath,
    flax_layout,
    flax_to_torch_name,
    from_torch,
    load_safetensors,
    to_torch,
    torch_to_flax_name,
)

__all__ = [
    "PortError",
    "PortReport",
    "flax_to_torch_name",
    "from_torch",
    "load_pretrained",
    "load_safetensors",
    "to_torch",
    "torch_to_flax_name",
    "transfer",
]

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class PortReport:
    """What became of every tensor, by the name it has in the source.

    Attributes:
      source: where the tensors came from.
      loaded: taken over unchanged.
      adapted: the first convolution, refitted to another number of input channels.
      skipped: the head, because the number of classes differs; the network keeps its own.
      ignored: counters of torch's batch norm, which have no counterpart.
      missing: in the network and not in the source.
      unexpected: in the source and not in the network.
      unfit: of another shape, not floating point, or not finite; each with its reason.
    """

    source: str
    loaded: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()

    def summary(self) -> str:
        """Returns one line for the log: counts, and the names of what was not simply loaded."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.adapted:
            parts.append(f"{', '.join(self.adapted)} adapted to the number of input channels")
        if self.skipped:
            parts.append(f"{', '.join(self.skipped)} skipped: new head, other number of classes")
        if self.ignored:
            parts.append(f"{len(self.ignored)} batch counters ignored")
        return "; ".join(parts)


class PortError(Error):
    """Weights that do not belong to the network; `report` holds all that is wrong with them."""

    def __init__(self, report: PortReport):
        self.report = report
        problems = [
            f"{len(names)} {what} ({_first(names)})"
            for what, names in (
                ("unexpected", report.unexpected),
                ("missing", report.missing),
                ("unfit", report.unfit),
            )
            if names
        ]
        super().__init__(
            f"{report.source}: tensors do not fit the network: {', '.join(problems)}; "
            f"{_advice(report)}"
        )


def load_pretrained(
    source: str | os.PathLike[str] | Mapping[str, np.ndarray], variables: Variables
) -> tuple[dict[str, Any], PortReport]:
    """Puts the weights of a timm or torchvision network into `variables`.

    The head `fc` keeps the values in `variables` where the number of classes differs. A first
    convolution with another number of input channels C gets, for each of them, the kernel's sum
    over its input channels divided by C: C equal channels then have the effect of three.

    Args:
      source: a safetensors file, or its tensors by torch's names.
      variables: `{"params", "batch_stats"}` of the network, freshly initialised. Not changed.

    Returns:
      Variables with the loaded values as NumPy arrays in the network's dtypes, and the report.

    Raises:
      PortError: missing, unexpected or unfit tensors; all of them in one message.
      Error: the file cannot be read, see `load_safetensors`.
    """
    if isinstance(source, Mapping):
        origin, tensors = "the given weights", source
    else:
        origin, tensors = os.fspath(source), load_safetensors(source)
    found, ignored = {}, []
    for name, tensor in tensors.items():
        if torch_to_flax_name(name, tensor.ndim) is None:
            ignored.append(name)
        else:
            found[name] = flax_layout(tensor)
    merged, report = _merge(found, variables, flax_to_torch_name, origin)
    return merged, dataclasses.replace(report, ignored=tuple(ignored))


def transfer(
    source_variables: Variables, variables: Variables, *, source: str = "another run"
) -> tuple[dict[str, Any], PortReport]:
    """Puts the variables of another run into `variables`, as `load_pretrained` does.

    Args:
      source_variables: what the other run ended with.
      variables: `{"params", "batch_stats"}` of the network, freshly initialised. Not changed.
      source: what messages call the other run, such as its workdir.

    Raises:
      PortError: missing, unexpected or unfit variables; all of them in one message.
    """
    found = {"/".join(p): np.asarray(leaf) for p, leaf in flatten_dict(source_variables).items()}
    return _merge(found, variables, "/".join, source)


def _merge(
    found: Mapping[str, np.ndarray],
    variables: Variables,
    name_of: Callable[[KeyPath], str],
    source: str,
) -> tuple[dict[str, Any], PortReport]:
    """Fills `variables` from arrays in our layout, found by `name_of` their paths."""
    own = {name_of(path): (path, leaf) for path, leaf in flatten_dict(variables).items()}
    merged = dict(own.values())
    loaded, adapted, skipped, missing, unfit = [], [], [], [], []
    for name, (path, leaf) in own.items():
        if name not in found:
            missing.append(name)
            continue
        array = found[name]
        differing = _differing_axes(array.shape, leaf.shape)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            unfit.append(f"{name}: numbers of type {array.dtype}")
        elif not np.isfinite(array.astype(np.float32)).all():
            unfit.append(f"{name}: not finite")
        elif differing == []:
            merged[path] = array.astype(leaf.dtype)
            loaded.append(name)
        elif path[:2] == ("params", "fc") and differing == [array.ndim - 1]:
            skipped.append(name)
        elif path == ("params", "conv1", "kernel") and differing == [2]:
            merged[path] = _fit_input_channels(array, leaf.shape[2]).astype(leaf.dtype)
            adapted.append(name)
        else:
            unfit.append(f"{name}: {list(array.shape)} for {list(leaf.shape)}")
    report = PortReport(
        source=source,
        loaded=tuple(loaded),
        adapted=tuple(adapted),
        skipped=tuple(skipped),
        missing=tuple(missing),
        unexpected=tuple(name for name in found if name not in own),
        unfit=tuple(unfit),
    )
    if report.missing or report.unexpected or report.unfit:
        raise PortError(report)
    return unflatten_dict(merged), report


def _differing_axes(shape: tuple[int, ...], other: tuple[int, ...]) -> list[int] | None:
    """Returns the axes in which two shapes differ; None where their number does."""
    if len(shape) != len(other):
        return None
    return [axis for axis, (m, n) in enumerate(zip(shape, other, strict=True)) if m != n]


def _fit_input_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Returns kernel [H, W, I, O] for `channels` inputs, answering equal channels as before."""
    share = kernel.astype(np.float32).sum(axis=2, keepdims=True) / channels
    return share.repeat(channels, axis=2)


def _advice(report: PortReport) -> str:
    kinds = (report.unexpected, report.missing, report.unfit)
    if all("downsample" in name for names in kinds for name in names):
        if not report.missing:
            return (
                "they belong to the shortcuts of a residual network, and this one is plain, with "
                "none; choose a resnet as --config.model.name, or --config.init=random"
            )
        if not report.unexpected:
            return (
                "they belong to shortcuts, and these weights are of a plain network, with "
                "none; choose a plain --config.model.name, or --config.init=random"
            )
    return "set --config.model.name to the network these weights are of, or --config.init=random"


def _first(names: tuple[str, ...], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
