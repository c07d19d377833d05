"""Which parameters stay as they are, and which learn slower, by regular expressions over paths.

The path of a parameter is its name in the network, such as `layer1_0/conv1/kernel`. An expression
means every path that begins with a match of it: `layer4` is all of the fourth stage, `fc` the head,
`(?!fc)` everything but the head.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from jaxcells.files import Error


def matches(patterns: Sequence[str], path: str) -> bool:
    """Says whether a path begins with a match of any of the regular expressions."""
    return any(re.match(pattern, path) for pattern in patterns)


def map_with_path(function: Any, *trees: Any) -> Any:
    """Maps `function(path, leaf, ...)` over pytrees of parameters, with paths as strings."""

    def call(keys: Any, *leaves: Any) -> Any:
        return function("/".join(key.key for key in keys), *leaves)

    return jax.tree_util.tree_map_with_path(call, *trees)


def check_patterns(
    freeze: Sequence[str], multipliers: Sequence[tuple[str, float]], params: Mapping[str, Any]
) -> None:
    """Refuses expressions that mean no parameter of a network, or freeze every one.

    Args:
      freeze: regular expressions over parameter paths.
      multipliers: regular expressions, each with a factor.
      params: the network's parameters, or their shapes.

    Raises:
      Error: names the expression, and the layers that there are.
    """
    paths = list(flatten_dict(params, sep="/"))
    given = [("optim.freeze", pattern) for pattern in freeze]
    given += [("optim.multipliers", pattern) for pattern, _ in multipliers]
    for key, pattern in given:
        if not any(matches([pattern], path) for path in paths):
            layers = ", ".join(dict.fromkeys(path.split("/")[0] for path in paths))
            raise Error(
                f"{key}: {pattern!r} matches no parameter; it must fit the beginning of a path "
                f"such as {paths[0]} (alternatives are separated by |); the layers are {layers}"
            )
    if all(matches(freeze, path) for path in paths):
        raise Error(
            "optim.freeze matches every parameter, and nothing is left to train; for a linear "
            "probe use optim.freeze='(?!fc)'"
        )


def frozen_prefix(
    segments: Sequence[Sequence[str]], params: Mapping[str, Any], patterns: Sequence[str]
) -> int:
    """Counts the segments at the start of a network in which every parameter is frozen.

    Args:
      segments: the network's `segments`.
      params: its parameters, or their shapes.
      patterns: what is frozen.
    """
    paths = flatten_dict(params, sep="/")
    learning = {path.split("/")[0] for path in paths if not matches(patterns, path)}
    return len(list(itertools.takewhile(learning.isdisjoint, segments)))


def frozen_norms(patterns: Sequence[str]) -> AbstractContextManager[None]:
    """While open, norms whose parameters are all frozen use and keep their running statistics.

    In training mode they would otherwise go on normalising by each batch, and drift with the
    data: what they compute would not be frozen at all.
    """

    def intercept(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, nn.BatchNorm) and context.method_name == "__call__":
            path = "/".join(module.path)
            if all(matches(patterns, f"{path}/{leaf}") for leaf in ("scale", "bias")):
                kwargs = {**kwargs, "use_running_average": True}
        return next_function(*args, **kwargs)

    return nn.intercept_methods(intercept)
