"""Puts weights from elsewhere into a network's variables, with every tensor accounted for."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcells.files import Error
from jaxcells.models.preact import unstack
from jaxcells.models.torch_format import (
    KeyPath,
    flax_layout,
    flax_to_torch_name,
    from_torch,
    load_metadata,
    load_safetensors,
    stack,
    to_torch,
    torch_to_flax_name,
)

__all__ = [
    "Conv1",
    "PortError",
    "PortReport",
    "flax_to_torch_name",
    "from_torch",
    "load_metadata",
    "load_pretrained",
    "load_safetensors",
    "to_torch",
    "torch_to_flax_name",
    "transfer",
]

Variables = Mapping[str, Any]
Conv1 = Literal["adapt", "fresh"]

_CONV1 = ("params", "conv1", "kernel")
_MOST_NAMES = 12  # of a kind, in a message of one line


@dataclasses.dataclass(frozen=True)
class PortReport:
    """What became of every tensor, by the name it has in the source.

    Attributes:
      source: where the tensors came from.
      loaded: taken over unchanged.
      adapted: the first convolution, refitted to another number of input channels.
      fresh: the first convolution, not taken over as that was asked for; the network keeps its own.
      skipped: the head, whose classes are others; the network keeps its own.
      skipped_why: in what the classes differ.
      ignored: counters of torch's batch norm, which have no counterpart.
      missing: in the network and not in the source.
      unexpected: in the source and not in the network.
      unfit: of another shape, not floating point, or not finite; each with its reason.
    """

    source: str
    loaded: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    skipped_why: str = ""
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()

    def summary(self) -> str:
        """Returns one line for the log: counts, and the names of what was not simply loaded."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.adapted:
            parts.append(f"{', '.join(self.adapted)} adapted to the number of input channels")
        if self.fresh:
            parts.append(f"{', '.join(self.fresh)} fresh, as asked for")
        if self.skipped:
            parts.append(f"{', '.join(self.skipped)} skipped: new head, {self.skipped_why}")
        if self.ignored:
            parts.append(f"{len(self.ignored)} batch counters ignored")
        return "; ".join(parts)

    def problems(self, most: int | None = None) -> str:
        """Returns one line that lists what does not fit; "" if everything does.

        A layer that one side has not at all stands for its tensors, and a first and a last layer
        for those between them.

        Args:
          most: how many names of a kind to list before "and … more"; None lists all.
        """
        fitting = (*self.loaded, *self.adapted, *self.fresh, *self.skipped, *self.unfit)
        kinds = (
            ("unexpected", self.unexpected, _as_layers(self.unexpected, fitting)),
            ("missing", self.missing, _as_layers(self.missing, fitting)),
            ("unfit", self.unfit, self.unfit),
        )
        return ", ".join(
            f"{len(names)} {kind} ({_listed(shown, most)})" for kind, names, shown in kinds if names
        )


class PortError(Error):
    """Weights that do not belong to the network; `report` holds all that is wrong with them."""

    def __init__(self, report: PortReport):
        self.report = report
        super().__init__(
            f"{report.source}: tensors do not fit the network: {report.problems(_MOST_NAMES)}; "
            f"{_advice(report)}"
        )


def load_pretrained(
    source: str | os.PathLike[str] | Mapping[str, np.ndarray],
    variables: Variables,
    *,
    conv1: Conv1 = "adapt",
    other_classes: str = "",
) -> tuple[dict[str, Any], PortReport]:
    """Puts the weights of a timm or torchvision network into `variables`.

    The head `fc` keeps the values in `variables` where the number of classes differs. A first
    convolution with another number of input channels C gets, for each of them, the kernel's sum
    over its input channels divided by C: C equal channels then have the effect of three.

    Args:
      source: a safetensors file, or its tensors by torch's names.
      variables: `{"params", "batch_stats"}` of the network, freshly initialised. Not changed.
      conv1: "fresh" keeps the first convolution in `variables` whatever the source's is: for
        channels that have nothing to do with colours.
      other_classes: why a head of as many classes is not for these classes; keeps the one in
        `variables`. "": a head that fits is taken over.

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
    merged, report = _merge(found, variables, flax_to_torch_name, origin, conv1, other_classes)
    return merged, dataclasses.replace(report, ignored=tuple(ignored))


def transfer(
    source_variables: Variables,
    variables: Variables,
    *,
    source: str = "another run",
    conv1: Conv1 = "adapt",
    other_classes: str = "",
) -> tuple[dict[str, Any], PortReport]:
    """Puts the variables of another run into `variables`, as `load_pretrained` does.

    Args:
      source_variables: what the other run ended with. Units may be stacked there and not here, or
        here and not there.
      variables: `{"params", "batch_stats"}` of the network, freshly initialised. Not changed.
      source: what messages call the other run, such as its workdir.
      conv1: see `load_pretrained`.
      other_classes: see `load_pretrained`.

    Raises:
      PortError: missing, unexpected or unfit variables; all of them in one message.
    """
    flat = flatten_dict(unstack(source_variables))
    found = {_name(path): np.asarray(leaf) for path, leaf in flat.items()}
    return _merge(found, variables, _name, source, conv1, other_classes)


def _name(path: KeyPath) -> str:
    """Returns the path below the collection: no layer has two leaves of one name."""
    return "/".join(path[1:])


def _merge(
    found: Mapping[str, np.ndarray],
    variables: Variables,
    name_of: Callable[[KeyPath], str],
    source: str,
    conv1: Conv1,
    other_classes: str,
) -> tuple[dict[str, Any], PortReport]:
    """Fills `variables` from arrays in our layout, found by `name_of` their paths."""
    flat = flatten_dict(unstack(variables))
    own = {name_of(path): (path, leaf) for path, leaf in flat.items()}
    merged = dict(own.values())
    loaded, adapted, fresh, skipped, missing, unfit = [], [], [], [], [], []
    skipped_why = ""
    for name, (path, leaf) in own.items():
        if name not in found:
            missing.append(name)
            continue
        array = found[name]
        differing = _differing_axes(array.shape, leaf.shape)
        is_head = path[:2] == ("params", "fc")
        if path == _CONV1 and conv1 == "fresh":
            fresh.append(name)
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            unfit.append(f"{name}: numbers of type {array.dtype}")
        elif not np.isfinite(array.astype(np.float32)).all():
            unfit.append(f"{name}: not finite")
        elif is_head and differing == [array.ndim - 1]:
            skipped.append(name)
            skipped_why = f"{array.shape[-1]} classes there and {leaf.shape[-1]} here"
        elif is_head and differing == [] and other_classes:
            skipped.append(name)
            skipped_why = other_classes
        elif differing == []:
            merged[path] = array.astype(leaf.dtype)
            loaded.append(name)
        elif path == _CONV1 and differing == [2]:
            merged[path] = _fit_input_channels(array, leaf.shape[2]).astype(leaf.dtype)
            adapted.append(name)
        else:
            unfit.append(f"{name}: {list(array.shape)} for {list(leaf.shape)}")
    report = PortReport(
        source=source,
        loaded=tuple(loaded),
        adapted=tuple(adapted),
        fresh=tuple(fresh),
        skipped=tuple(skipped),
        skipped_why=skipped_why,
        missing=tuple(missing),
        unexpected=tuple(name for name in found if name not in own),
        unfit=tuple(unfit),
    )
    if report.missing or report.unexpected or report.unfit:
        raise PortError(report)
    return unflatten_dict(stack(merged, flatten_dict(variables))), report


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


def _as_layers(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Returns the shortest beginnings, up to a dot or slash, that `names` have and no other has."""
    taken = {beginning for other in others for beginning in _beginnings(other)}
    layers = {next((b for b in _beginnings(name) if b not in taken), name) for name in names}
    return _as_ranges(sorted(layers, key=_natural))


def _beginnings(name: str) -> list[str]:
    return [name[: match.start()] for match in re.finditer(r"[./]", name)]


def _natural(name: str) -> list[tuple[int, str]]:
    """A key for sorting by which layer2 comes before layer10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def _as_ranges(names: list[str]) -> list[str]:
    """Writes three names or more that count up as "layer1.2 … layer1.5"."""
    runs: list[list[str]] = []
    for name in names:
        if runs and name == _next_name(runs[-1][-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    shown = [[f"{run[0]} … {run[-1]}"] if len(run) > 2 else run for run in runs]
    return [name for run in shown for name in run]


def _next_name(name: str) -> str | None:
    match = re.fullmatch(r"(.*?)(\d+)", name)
    return f"{match[1]}{int(match[2]) + 1}" if match else None


def _listed(names: Sequence[str], most: int | None) -> str:
    more = 0 if most is None else len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
