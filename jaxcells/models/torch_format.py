"""The form in which timm and torchvision keep weights: safetensors, torch's names and layouts.

Our modules carry torchvision's names, so the port is a rename and a transpose:

    params/layer1_0/conv1/kernel  [H, W, I, O]  ⇄  layer1.0.conv1.weight  [O, I, H, W]
    params/layer1_0/bn1/scale, bias             ⇄  layer1.0.bn1.weight, bias
    batch_stats/layer1_0/bn1/mean, var          ⇄  layer1.0.bn1.running_mean, running_var
    params/layer2_0/downsample_conv/kernel      ⇄  layer2.0.downsample.0.weight
    params/layer2_0/downsample_bn/scale         ⇄  layer2.0.downsample.1.weight
    params/fc/kernel              [I, O]        ⇄  fc.weight              [O, I]

Units that a pre-activation network runs in a scan are stacked, and single in a file:

    params/layer1_rest/conv1/kernel  [n - 1, H, W, I, O]  ⇄  layer1.1.conv1.weight, layer1.2.…
"""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from jaxcells.files import Error
from jaxcells.models.preact import unstack

KeyPath = tuple[str, ...]

# torch.nn.BatchNorm2d counts its training batches to average without momentum; we always have one.
_BATCH_COUNTER = "num_batches_tracked"
_MODULES = {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}
_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}

_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "w = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "save_file({k: v.contiguous() for k, v in w.get('state_dict', w).items()}, sys.argv[2])"
)


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file by name, in their own shapes and dtypes.

    Raises:
      Error: no such file, a pickle (which could run any code; the message holds the command that
        converts it), or not a whole safetensors file.
    """
    path = Path(path).expanduser()
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise Error(
            f"{path}: cannot read the weights ({error.strerror}); check the path in --config.init"
        ) from error
    # A safetensors file may begin with the same bytes, its header's length; then comes the header.
    is_pickle = start.startswith(_PICKLE_STARTS) and start[8:] != b"{"
    if is_pickle or path.suffix.lower() in _PICKLE_SUFFIXES:
        files = shlex.join([str(path), str(path.with_suffix(".safetensors"))])
        raise Error(
            f"{path}: pickled weights are not read, since a pickle can run any code; "
            f'convert the file where torch is installed: python -c "{_CONVERT}" {files}'
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _not_whole(path, error) from error


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the texts that a safetensors file holds beside its tensors; often there are none.

    Raises:
      Error: not a whole safetensors file.
    """
    try:
        with safe_open(Path(path).expanduser(), framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _not_whole(path, error) from error


def flax_to_torch_name(path: KeyPath) -> str:
    """Returns torch's name of a variable, e.g. ("params", "conv1", "kernel") → "conv1.weight"."""
    collection, *modules, leaf = path
    renamed = [re.sub(r"^(layer\d+)_(\d+)$", r"\1.\2", _MODULES.get(m, m)) for m in modules]
    return ".".join([*renamed, _LEAVES.get((collection, leaf), leaf)])


def torch_to_flax_name(name: str, ndim: int) -> KeyPath | None:
    """Returns the path of torch's tensor `name` with `ndim` axes, or None where we have none.

    The number of axes tells a kernel from a norm's scale: torch calls both "weight".
    """
    *modules, leaf = name.split(".")
    if leaf == _BATCH_COUNTER:
        return None
    joined = re.sub(r"\b(layer\d+)\.(\d+)\b", r"\1_\2", ".".join(modules))
    for ours, theirs in _MODULES.items():
        joined = re.sub(rf"\b{re.escape(theirs)}$", ours, joined)
    collection = "params"
    if leaf == "weight":
        leaf = "scale" if ndim == 1 else "kernel"
    elif leaf in ("running_mean", "running_var"):
        collection, leaf = "batch_stats", leaf.removeprefix("running_")
    return (collection, *filter(None, joined.split(".")), leaf)


def stack(single: Mapping[KeyPath, Any], like: Mapping[KeyPath, Any]) -> dict[KeyPath, Any]:
    """Inverts `preact.unstack`, on flat variables, for a network whose own are `like`."""
    stacked = {}
    for path, leaf in like.items():
        stage, rest, _ = path[1].partition("_rest")
        if rest:
            numbers = range(1, leaf.shape[0] + 1)
            units = [single[path[0], f"{stage}_{n}", *path[2:]] for n in numbers]
            stacked[path] = np.stack(units)
        else:
            stacked[path] = single[path]
    return stacked


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns `variables` under torch's names and in torch's layouts, as contiguous NumPy arrays.

    `num_batches_tracked` is not made up: torch's `load_state_dict` fills it in.
    """
    tensors = {}
    for path, leaf in flatten_dict(unstack(variables)).items():
        array = np.asarray(leaf)
        # safetensors writes a transposed view in the order of its memory, silently.
        tensors[flax_to_torch_name(path)] = np.ascontiguousarray(
            array.transpose(_TO_TORCH.get(array.ndim, range(array.ndim)))
        )
    return tensors


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns torch's `tensors` as variables: the inverse of `to_torch`, but for stacked units."""
    flat = {}
    for name, tensor in tensors.items():
        if (path := torch_to_flax_name(name, tensor.ndim)) is not None:
            flat[path] = flax_layout(tensor)
    return unflatten_dict(flat)


def flax_layout(tensor: np.ndarray) -> np.ndarray:
    """Returns a view of torch's `tensor` with its axes in our order."""
    return tensor.transpose(_TO_FLAX.get(tensor.ndim, range(tensor.ndim)))


def _not_whole(path: str | os.PathLike[str], error: Exception) -> Error:
    return Error(
        f"{os.fspath(path)}: not a whole safetensors file ({_one_line(error)}); get it or save it "
        "again"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
