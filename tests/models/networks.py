"""What the tests of blocks and networks share: images, variables, shapes and outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcells.models import create_model


def images(*shape, seed=0):
    """Returns float32 numbers of a normal distribution."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def convolve(x, kernel, stride):
    """The definition, position by position: `[B, H, W, C]` and `[k, k, C, O]` to `[B, h, w, O]`."""
    size = len(kernel)
    padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    rows, columns = range(0, x.shape[1], stride), range(0, x.shape[2], stride)
    y = [
        [np.tensordot(padded[:, i : i + size, j : j + size], kernel, 3) for j in columns]
        for i in rows
    ]
    return np.moveaxis(np.array(y), 2, 0)


def shapes(module, x):
    """Returns shapes and dtypes of a module's variables, as `init` returns them."""
    return jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))


def random_variables(module, x, seed=0):
    """Values under which nothing cancels: no norm's scale is one, no bias or mean is zero."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        if path[-1] == "kernel":
            fan_in = np.prod(shape[-4:-1]) if len(shape) > 2 else shape[0]
            return rng.normal(scale=fan_in**-0.5, size=shape)
        positive = path[-1] in ("scale", "var")
        return rng.uniform(0.5 if positive else -0.5, 1.5 if positive else 0.5, shape)

    flat = flatten_dict(shapes(module, x))
    return unflatten_dict({p: draw(p, leaf.shape).astype(np.float32) for p, leaf in flat.items()})


def small(name, *, sizes=(2, 1), width=4, **attributes):
    """A network of the kind of `name`, of few blocks and channels, for three classes."""
    return create_model(name, num_classes=3, width=width).clone(stage_sizes=sizes, **attributes)


@functools.cache
def params(name, **attributes):
    """Shapes and dtypes of the parameters of a whole network of 1000 classes, by path."""
    model = create_model(name, num_classes=1000, **attributes)
    return flatten_dict(shapes(model, jnp.zeros((1, 32, 32, 3)))["params"], sep="/")


def outputs(module, variables, x, **how):
    """Outputs of all layers, by path, and of the module, ""; those of scanned blocks are stacked.

    Args:
        how: train, first and last of a network's `__call__`; by default it does not train.
    """
    how = {"train": False, "mutable": ["batch_stats", "intermediates"]} | how
    _, state = module.apply(variables, x, capture_intermediates=True, **how)
    found = flatten_dict(state["intermediates"])
    return {"/".join(path[:-1]): output for path, (output,) in found.items()}


def output_shapes(module, x, *, train=False):
    """Shapes and dtypes of `outputs`."""
    return jax.eval_shape(functools.partial(outputs, module, train=train), shapes(module, x), x)


def assert_close(actual, expected, tolerance=1e-4):
    """Compares trees of arrays, relative to the largest value in each array."""

    def compare(x, y):
        y = np.asarray(y, np.float32)
        np.testing.assert_allclose(
            np.asarray(x, np.float32), y, rtol=0, atol=tolerance * np.abs(y).max()
        )

    jax.tree.map(compare, actual, expected)
