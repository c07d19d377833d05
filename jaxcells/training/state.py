"""The train state: everything that a training step reads and writes, in one pytree."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

_NO_OPTIMIZER = optax.identity()


class TrainState(flax.struct.PyTreeNode):
    """Parameters, running statistics, optimiser state and step count of one run.

    Attributes:
      step: int32 scalar array, the number of updates made. An array from the start, so that the
        compiled step is not compiled again and a checkpoint restores the type that it saved.
      params: float32 parameters.
      batch_stats: float32 running statistics of the norms; `{}` for a network without norms.
      opt_state: state of `tx`.
      apply_fn: `Module.apply` of the network, or of its later segments (static).
      tx: the optimiser (static).
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    apply_fn: Callable[..., Any] = flax.struct.field(pytree_node=False)
    tx: optax.GradientTransformation = flax.struct.field(pytree_node=False)

    @property
    def variables(self) -> dict[str, Any]:
        """What `apply_fn` takes first: `{"params", "batch_stats"}`."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_train_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    *,
    sample_shape: Sequence[int],
    key: jax.Array,
) -> TrainState:
    """Initialises a network and its optimiser at step 0.

    Args:
      model: network with `__call__(x, *, train)`.
      tx: optimiser.
      sample_shape: shape of one input, `[B, H, W, C]`. Only its rank and `C` matter to the
        parameters; `B` may be 1.
      key: random key of the initialisation.

    Returns:
      The state on the default device, ready for `mesh.replicate`. Under `jax.eval_shape` over
      the key, its shapes and dtypes, which is all that `checkpoints.restore` needs.
    """

    def init(key: jax.Array) -> TrainState:
        variables = model.init(key, jnp.zeros(tuple(sample_shape), jnp.float32), train=False)
        return state_of(model.apply, tx, variables)

    if isinstance(key, jax.core.Tracer):
        return init(key)
    # Under jit, the forward pass that `init` makes to learn the shapes is dead code. What is left
    # runs once, so compiling it is the cost: optimised, it takes twice as long in all.
    return jax.jit(init).lower(key).compile({"xla_backend_optimization_level": "0"})(key)


def inference_state(model: nn.Module, variables: Mapping[str, Any]) -> TrainState:
    """Makes a state that `eval_step` and `predict_step` take, with no optimiser in it.

    Args:
      model: network.
      variables: `{"params", "batch_stats"}`, e.g. from `checkpoints.restore_variables`.
    """
    return state_of(model.apply, _NO_OPTIMIZER, variables)


def state_of(
    apply_fn: Callable[..., Any], tx: optax.GradientTransformation, variables: Mapping[str, Any]
) -> TrainState:
    """Makes a state at step 0 of given parameters and statistics, e.g. pre-trained ones.

    Args:
      apply_fn: `Module.apply` of the network.
      tx: the optimiser, whose own state is made anew.
      variables: `{"params", "batch_stats"}` of the network.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(variables["params"]),
        apply_fn=apply_fn,
        tx=tx,
    )
