"""A table of a network's layers: shapes, parameters, multiply-adds, receptive fields.

Everything is read off an abstract trace: nothing is computed and no memory is taken, however deep
the network.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxcells.files import write_whole
from jaxcells.models.layers import MaxPool

_COLUMNS = (
    *("name", "kind", "kernel", "stride", "output", "parameters", "multiply_adds"),
    *("receptive_field", "repeats"),
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One row of the table.

    Attributes:
        name: path of its parameters, such as "layer2_0/conv1".
        kind: "conv", "norm", "max pool", "mean" or "dense".
        kernel: side of its window in pixels of its input; 1 where it has none.
        stride: distance between neighbouring windows.
        output: shape of what it makes of one image, `(H, W, C)` or `(C,)`.
        parameters: numbers that are trained. Running statistics are not.
        multiply_adds: of one image; convolutions and dense layers only, as in He et al. 2016.
        receptive_field: side, in pixels of the image, of the square that can influence one position
            of the output by the longest path; it may exceed the image. None: all of the image.
        repeats: number of layers that are stacked under this name. Parameters and multiply-adds are
            those of all of them, the receptive field is that of the last.
    """

    name: str
    kind: str
    kernel: int
    stride: int
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int
    receptive_field: int | None
    repeats: int = 1

    @property
    def block(self) -> str:
        """Name of the block that holds the layer, "" for one of the network's own."""
        return self.name.rpartition("/")[0]

    @property
    def in_shortcut(self) -> bool:
        """Whether the layer belongs to a block's projection, beside the longest path."""
        return self.name.rpartition("/")[2].startswith("downsample")


def summarize(model: nn.Module, input_shape: Sequence[int]) -> tuple[Layer, ...]:
    """Lists the layers of a network in the order of the computation.

    Args:
        model: a network of `create_model`.
        input_shape: `(H, W, C)` of the images.

    Returns:
        A row for every convolution, norm, pooling and dense layer.
    """
    rows: dict[tuple[str, ...], Layer] = {}

    def record(
        run: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        y = run(*args, **kwargs)
        module = context.module
        params = module.variables.get("params", {})
        own = {name: leaf for name, leaf in params.items() if not isinstance(leaf, Mapping)}
        if own or isinstance(module, MaxPool):
            # A scanned block is traced more than once: the same row again.
            rows[module.path] = _layer(module, own, y.shape[1:])
        return y

    with nn.intercept_methods(record):
        variables = jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((1, *input_shape)), train=False)
        )
    # What a scan stacks has one more axis here than within the trace of its body.
    sizes: Counter[tuple[str, ...]] = Counter()
    for path, leaf in flatten_dict(variables["params"]).items():
        sizes[path[:-1]] += leaf.size
    layers = [
        _repeated(layer, sizes[path] // layer.parameters if layer.parameters else 1)
        for path, layer in rows.items()
    ]
    return tuple(_with_receptive_fields(_with_mean(layers)))


def totals(layers: Iterable[Layer]) -> tuple[int, int]:
    """Returns the parameters of a network and its multiply-adds for one image."""
    layers = tuple(layers)
    return sum(x.parameters for x in layers), sum(x.multiply_adds for x in layers)


def layer_table(layers: Sequence[Layer]) -> str:
    """Returns the table as text, with the totals below."""
    parameters, multiply_adds = totals(layers)
    header = ("layer", "kind", "kernel", "output", "parameters", "multiply-adds", "receptive field")
    body = [
        (
            layer.name + (f" x{layer.repeats}" if layer.repeats > 1 else ""),
            layer.kind,
            _window(layer),
            _by(layer.output),
            f"{layer.parameters:,}" if layer.parameters else "",
            f"{layer.multiply_adds:,}" if layer.multiply_adds else "",
            str(layer.receptive_field or "all"),
        )
        for layer in layers
    ]
    total = ("total", "", "", "", f"{parameters:,}", f"{multiply_adds:,}", "")
    widths = [max(map(len, column)) for column in zip(header, *body, total, strict=True)]
    align = ("<", "<", "<", "<", ">", ">", ">")

    def line(cells: Sequence[str]) -> str:
        padded = (f"{c:{a}{w}}" for c, a, w in zip(cells, align, widths, strict=True))
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(header), rule, *map(line, body), rule, line(total)])


def write_layers_csv(path: Path, layers: Iterable[Layer]) -> None:
    """Writes a line per layer under the names of its attributes; an output is written `HxWxC`."""
    with write_whole(path) as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for layer in layers:
            row = dataclasses.asdict(layer) | {"output": _by(layer.output)}
            row["receptive_field"] = layer.receptive_field or "all"
            writer.writerow(row)


def _layer(module: nn.Module, params: Mapping[str, jax.Array], output: tuple[int, ...]) -> Layer:
    """A row for one module; its receptive field is not known yet."""
    kind, kernel, stride, multiply_adds = "norm", 1, 1, 0
    if isinstance(module, MaxPool):
        kind, kernel, stride = "max pool", 3, 2
    elif "kernel" in params:
        weights = params["kernel"]
        multiply_adds = weights.size * math.prod(output[:-1])
        kind = "dense"
        if weights.ndim == 4:
            kind, kernel, stride = "conv", weights.shape[0], module.stride
    return Layer(
        name="/".join(module.path),
        kind=kind,
        kernel=kernel,
        stride=stride,
        output=output,
        parameters=sum(leaf.size for leaf in params.values()),
        multiply_adds=multiply_adds,
        receptive_field=None,
    )


def _repeated(layer: Layer, repeats: int) -> Layer:
    return dataclasses.replace(
        layer,
        parameters=layer.parameters * repeats,
        multiply_adds=layer.multiply_adds * repeats,
        repeats=repeats,
    )


def _with_mean(layers: Iterable[Layer]) -> Iterator[Layer]:
    """Adds the mean over the image, which is no module: where its axes are gone, it was taken."""
    last = None
    for layer in layers:
        if last and len(last.output) > len(layer.output):
            yield Layer("avgpool", "mean", 1, 1, last.output[-1:], 0, 0, None)
        yield layer
        last = layer


def _with_receptive_fields(layers: Iterable[Layer]) -> Iterator[Layer]:
    """Follows side and step of the receptive field from layer to layer.

    A window of k positions that lie j pixels apart sees k - 1 times j pixels more than one position
    does, and a stride multiplies j (Araujo et al. 2019, Computing receptive fields). In
    a block, the projection begins where the block does, and the branch goes on to the next.
    """
    side, step = 1, 1
    for _, group in itertools.groupby(layers, key=lambda layer: layer.block):
        block = list(group)
        at = {False: (side, step), True: (side, step)}  # in the branch, in the shortcut
        sides = []
        for layer in block:
            before, apart = at[layer.in_shortcut]
            sides.append(before + (layer.kernel - 1) * apart)
            at[layer.in_shortcut] = sides[-1], apart * layer.stride
        repeats = block[0].repeats
        growth, (side, step) = at[False][0] - side, at[False]
        side += (repeats - 1) * growth
        for layer, seen in zip(block, sides, strict=True):
            whole = len(layer.output) == 1
            field = None if whole else seen + (repeats - 1) * growth
            yield dataclasses.replace(layer, receptive_field=field)


def _window(layer: Layer) -> str:
    if layer.kind not in ("conv", "max pool"):
        return ""
    size = f"{layer.kernel}x{layer.kernel}"
    return f"{size}/{layer.stride}" if layer.stride > 1 else size


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
