"""Weights in the form of timm and torchvision, and an account of every tensor that is taken over.

Our modules carry torchvision's names, so the port is a rename and a transpose:

    params/layer1_0/conv1/kernel  [H, W, I, O]  ⇄  layer1.0.conv1.weight  [O, I, H, W]
    params/layer1_0/bn1/scale, bias             ⇄  layer1.0.bn1.weight, bias
    batch_stats/layer1_0/bn1/mean, var          ⇄  layer1.0.bn1.running_mean, running_var
    params/layer2_0/downsample_conv/kernel      ⇄  layer2.0.downsample.0.weight
    params/layer2_0/downsample_bn/scale         ⇄  layer2.0.downsample.1.weight
    params/fc/kernel              [I, O]        ⇄  fc.weight              [O, I]

Blocks that a pre-activation network runs in a scan are stacked, and single in a file:

    params/layer1_rest/conv1/kernel  [n - 1, H, W, I, O]  ⇄  layer1.1.conv1.weight, layer1.2.…
"""

import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from jaxcells.files import Error
from jaxcells.models.resnet import unstack
from jaxcells.text import one_line, some

KeyPath = tuple[str, ...]
Variables = Mapping[str, Any]
Conv1 = Literal["adapt", "fresh"]

_CONV1 = ("params", "conv1", "kernel")
_MOST_NAMES = 12  # of a kind, in a message of one line
# torch.nn.BatchNorm2d counts its training batches to average without momentum; we always have one.
_BATCH_COUNTER = "num_batches_tracked"
_MODULES = {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}
_CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "w = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "save_file({k: v.contiguous() for k, v in w.get('state_dict', w).items()}, sys.argv[2])"
)


@dataclasses.dataclass(frozen=True)
class PortReport:
    """What became of every tensor, by the name it has in the source.

    Attributes:
      source: where the tensors came from.
      loaded: taken over unchanged.
      skipped: the head, whose classes are others; the network keeps its own.
      notes: what became of tensors that are in no list: the first convolution, refitted to another
        number of input channels or not taken over as that was asked for; the head; and counters of
        torch's batch norm, which have no counterpart.
      missing: in the network and not in the source.
      unexpected: in the source and not in the network.
      unfit: of another shape, not floating point, or not finite; each with its reason.
    """

    source: str
    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    unfit: tuple[str, ...]

    def summary(self) -> str:
        """Returns one line for the log: how many were loaded, and what became of the others."""
        return "; ".join([f"{len(self.loaded)} tensors loaded", *self.notes])

    def problems(self) -> str:
        """Returns one line that lists what does not fit; "" if everything does."""
        return ", ".join(
            f"{len(names)} {kind} ({some(names, _MOST_NAMES)})"
            for kind in ("unexpected", "missing", "unfit")
            if (names := getattr(self, kind))
        )


class PortError(Error):
    """Weights that do not belong to the network; `report` holds all that is wrong with them."""

    def __init__(self, report: PortReport):
        self.report = report
        advice = "set model.name to the network these weights are of, or init=random"
        if all("downsample" in n for n in (*report.unexpected, *report.missing, *report.unfit)):
            advice = f"one network is plain, without shortcuts, and the other is not; {advice}"
        found = f"tensors do not fit the network: {report.problems()}"
        super().__init__(f"{report.source}: {found}; {advice}")


def load_pretrained(
    tensors: Mapping[str, np.ndarray],
    variables: Variables,
    *,
    conv1: Conv1 = "adapt",
    other_classes: str = "",
    called: str = "the given weights",
) -> tuple[dict[str, Any], PortReport]:
    """Puts the weights of a timm or torchvision network into `variables`.

    The head `fc` keeps the values in `variables` where the number of classes differs. A first
    convolution with another number of input channels C gets, for each of them, the kernel's sum
    over its input channels divided by C: C equal channels then have the effect of three.

    Args:
      tensors: by torch's names, such as `load_safetensors` gives.
      variables: `{"params", "batch_stats"}` of the network, freshly initialised. Not changed.
      conv1: "fresh" keeps the first convolution in `variables` whatever the source's is: for
        channels that have nothing to do with colours.
      other_classes: why a head of as many classes is not for these classes; keeps the one in
        `variables`. "": a head that fits is taken over.
      called: where the tensors come from, for messages.

    Returns:
      Variables with the loaded values as NumPy arrays in the network's dtypes, and the report.

    Raises:
      PortError: missing, unexpected or unfit tensors; all of them in one message.
    """
    merged = flatten_dict(unstack(variables))
    own = {_torch_name(path): path for path in merged}
    others = [name for name in tensors if name not in own]
    unexpected = [name for name in others if not name.endswith(_BATCH_COUNTER)]
    loaded, skipped, notes, unfit = [], [], [], []
    for name in [name for name in own if name in tensors]:
        path, tensor = own[name], tensors[name]
        array = tensor.transpose(_TO_FLAX.get(tensor.ndim, range(tensor.ndim)))
        shape, wanted = array.shape, merged[path].shape
        is_head = path[1] == "fc" and array.ndim == len(wanted) and shape[:-1] == wanted[:-1]
        if path == _CONV1 and conv1 == "fresh":
            notes.append(f"{name} fresh, as asked for")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            unfit.append(f"{name}: numbers of type {array.dtype}")
        elif not np.isfinite(array.astype(np.float32)).all():
            unfit.append(f"{name}: not finite")
        elif is_head and (other_classes or shape != wanted):
            skipped.append(name)
            if shape != wanted:
                other_classes = f"{shape[-1]} classes there and {wanted[-1]} here"
        elif shape == wanted:
            loaded.append(name)
            merged[path] = array.astype(merged[path].dtype)
        elif path == _CONV1 and (*shape[:2], *shape[3:]) == (*wanted[:2], *wanted[3:]):
            notes.append(f"{name} adapted to the number of input channels")
            share = array.astype(np.float32).sum(axis=2, keepdims=True) / wanted[2]
            merged[path] = share.repeat(wanted[2], axis=2).astype(merged[path].dtype)
        else:
            unfit.append(f"{name}: {list(shape)} for {list(wanted)}")
    if skipped:
        notes.append(f"{', '.join(skipped)} skipped: new head, {other_classes}")
    if counters := len(others) - len(unexpected):
        notes.append(f"{counters} batch counters ignored")
    missing = [name for name in own if name not in tensors]
    report = PortReport(called, *map(tuple, (loaded, skipped, notes, missing, unexpected, unfit)))
    if report.problems():
        raise PortError(report)
    return unflatten_dict(_stack(merged, flatten_dict(variables))), report


def to_torch(variables: Variables) -> dict[str, np.ndarray]:
    """Returns `variables` under torch's names and in torch's layouts, as contiguous NumPy arrays.

    `num_batches_tracked` is not made up: torch's `load_state_dict` fills it in.
    """
    # safetensors writes a transposed view in the order of its memory, silently.
    return {
        _torch_name(path): np.ascontiguousarray(
            np.transpose(leaf, _TO_TORCH.get(leaf.ndim, range(leaf.ndim)))
        )
        for path, leaf in flatten_dict(unstack(variables)).items()
    }


def load_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file by name, in their own shapes and dtypes.

    Raises:
      Error: no such file, a pickle (which could run any code; the message holds the command that
        converts it), or not a whole safetensors file.
    """
    try:
        return load_file(path)
    except OSError as error:
        problem = f"{path}: cannot read the weights ({one_line(error)}); check the path in init"
        raise Error(problem) from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        with open(path, "rb") as file:
            is_pickle = file.read(2) in (b"PK", *(b"\x80%c" % protocol for protocol in range(6)))
        if not is_pickle:
            raise _not_whole(path, error) from error
        files = shlex.join([str(path), str(path.with_suffix(".safetensors"))])
        raise Error(
            f"{path}: pickled weights are not read, since a pickle can run any code; "
            f'convert the file where torch is installed: python -c "{_CONVERT}" {files}'
        ) from error


def load_metadata(path: Path) -> dict[str, str]:
    """Returns the texts that a safetensors file holds beside its tensors; often there are none.

    Raises:
      Error: not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _not_whole(path, error) from error


def _not_whole(path: Path, error: Exception) -> Error:
    found = f"not a whole safetensors file ({one_line(error)})"
    return Error(f"{path}: {found}; get it or save it again")


def _torch_name(path: KeyPath) -> str:
    """Returns torch's name of a variable, e.g. ("params", "conv1", "kernel") → "conv1.weight"."""
    *modules, leaf = path[1:]
    renamed = [re.sub(r"^(layer\d+)_(\d+)$", r"\1.\2", _MODULES.get(m, m)) for m in modules]
    return ".".join([*renamed, _LEAVES.get(leaf, leaf)])


def _stack(single: Mapping[KeyPath, Any], like: Mapping[KeyPath, Any]) -> dict[KeyPath, Any]:
    """Inverts `unstack`, on flat variables, for a network whose own are `like`."""
    stacked = {}
    for path, leaf in like.items():
        stage, rest, _ = path[1].partition("_rest")
        blocks = [f"{stage}_{number}" for number in range(1, leaf.shape[0] + 1)] if rest else []
        each = [single[path[0], block, *path[2:]] for block in blocks]
        stacked[path] = np.stack(each) if rest else single[path]
    return stacked
