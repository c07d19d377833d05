"""A table of a network's layers: shapes, parameters, multiply-adds, receptive fields.

Everything is read off an abstract trace: nothing is computed and no memory is taken, however deep
the network.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcells.files import write_csv
from jaxcells.models.layers import Conv, MaxPool
from jaxcells.text import by, text_table


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
        A row for every convolution, norm, pooling and dense layer. Receptive fields are found, and
        the mean over the image, of networks with segments alone.
    """
    rows: dict[tuple[str, ...], Layer] = {}
    layout = model.layout() if hasattr(model, "segments") else ()
    repeats = {f"layer{stage}_{index}": number for stage, index, number in layout}

    def record(run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = run(*args, **kwargs)
        module = context.module
        params = module.variables.get("params", {})
        own = {name: leaf for name, leaf in params.items() if not isinstance(leaf, Mapping)}
        if own or isinstance(module, MaxPool):
            # A scanned block is traced more than once: the same row again.
            rows[module.path] = _layer(module, own, y.shape[1:], repeats.get(module.path[0], 1))
        return y

    with nn.intercept_methods(record):
        images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    if not layout:
        return tuple(rows.values())
    # The mean over the image is no module.
    *body, head = rows.values()
    mean = Layer("avgpool", "mean", 1, 1, body[-1].output[-1:], 0, 0, None)
    return tuple(_with_receptive_fields([*body, mean, head]))


def totals(layers: Iterable[Layer]) -> tuple[int, int]:
    """Returns the parameters of a network and its multiply-adds for one image."""
    layers = tuple(layers)
    return sum(x.parameters for x in layers), sum(x.multiply_adds for x in layers)


def layer_table(layers: Sequence[Layer]) -> str:
    """Returns the table as text, with the totals in its last row."""
    header = ("layer", "kind", "kernel", "output", "parameters", "multiply-adds", "receptive field")
    rows = [
        (
            layer.name + (f" x{layer.repeats}" if layer.repeats > 1 else ""),
            layer.kind,
            _window(layer),
            by(layer.output),
            f"{layer.parameters:,}" if layer.parameters else "",
            f"{layer.multiply_adds:,}" if layer.multiply_adds else "",
            str(layer.receptive_field or "all"),
        )
        for layer in layers
    ]
    parameters, multiply_adds = totals(layers)
    rows.append(("total", "", "", "", f"{parameters:,}", f"{multiply_adds:,}", ""))
    return text_table(header, rows, left=4)


def write_layers_csv(path: Path, layers: Iterable[Layer]) -> None:
    """Writes a line per layer under the names of its attributes; an output is written `HxWxC`."""
    rows = [
        dataclasses.asdict(layer)
        | {"output": by(layer.output), "receptive_field": layer.receptive_field or "all"}
        for layer in layers
    ]
    write_csv(path, list(rows[0]), [list(row.values()) for row in rows])


def _layer(
    module: nn.Module, params: Mapping[str, jax.Array], output: tuple[int, ...], repeats: int
) -> Layer:
    """A row for one module, or for as many as are stacked; its receptive field is not known yet."""
    kind, kernel, stride, multiply_adds = "norm", 1, 1, 0
    if isinstance(module, MaxPool):
        kind, kernel, stride = "max pool", 3, 2
    elif "kernel" in params:
        multiply_adds = repeats * params["kernel"].size * math.prod(output[:-1])
        kind = "dense"
        if isinstance(module, Conv):
            kind, kernel, stride = "conv", module.kernel_size, module.stride
    parameters = repeats * sum(leaf.size for leaf in params.values())
    name = "/".join(module.path)
    return Layer(name, kind, kernel, stride, output, parameters, multiply_adds, None, repeats)


def _with_receptive_fields(layers: Iterable[Layer]) -> Iterator[Layer]:
    """Follows side and step of the receptive field from layer to layer.

    A window of k positions that lie j pixels apart sees k - 1 times j pixels more than one position
    does, and a stride multiplies j (Araujo et al. 2019, Computing receptive fields). In
    a block, the projection begins where the block does, and the branch goes on to the next.
    """
    side, step = 1, 1
    for _, group in itertools.groupby(layers, key=lambda layer: layer.block):
        block = list(group)
        sides = {}
        for _ in range(block[0].repeats):
            at = {False: (side, step), True: (side, step)}  # in the branch, in the shortcut
            for layer in block:
                before, apart = at[layer.in_shortcut]
                sides[layer.name] = before + (layer.kernel - 1) * apart
                at[layer.in_shortcut] = sides[layer.name], apart * layer.stride
            side, step = at[False]
        for layer in block:
            whole = len(layer.output) == 1
            yield dataclasses.replace(layer, receptive_field=None if whole else sides[layer.name])


def _window(layer: Layer) -> str:
    if layer.kind not in ("conv", "max pool"):
        return ""
    return by([layer.kernel] * 2) + (f"/{layer.stride}" if layer.stride > 1 else "")
