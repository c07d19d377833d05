"""Stochastic gradient descent with momentum, as PyTorch defines it, and its learning rates."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcells.training.freeze import map_with_path, matches


def make_schedule(name: str, learning_rate: float, num_steps: int) -> optax.Schedule:
    """Makes the learning rate as a function of the step.

    Args:
      name: `"constant"`, or `"cosine"`: half a cosine from `learning_rate` at step 0 down to zero
        at `num_steps` (Loshchilov and Hutter 2017, SGDR, eq. 5, without restarts).
      learning_rate: the first learning rate.
      num_steps: number of updates in the whole run.
    """
    if name == "cosine":
        return optax.cosine_decay_schedule(learning_rate, num_steps)
    return optax.constant_schedule(learning_rate)


def make_optimizer(
    schedule: optax.Schedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    multipliers: tuple[tuple[str, float], ...] = (),
    freeze: tuple[str, ...] = (),
) -> optax.GradientTransformation:
    """Makes SGD with momentum: `v = momentum v + (g + weight_decay p)`, `p = p - lr v`.

    This is `torch.optim.SGD(dampening=0, nesterov=False)`: the learning rate multiplies the
    velocity when it is used, not the gradient when it is stored, so a schedule acts at once.

    Weight decay acts on kernels only, not on biases, norm scales and shifts,
    where it only harms (He et al. 2019, Bag of Tricks, section 3.1). PyTorch, left to itself,
    decays them all.

    The schedule is a function of the count in the optimiser state, and no rate is stored in it:
    a resumed run follows the schedule that it is given. The state has the same form whatever is
    frozen, so that a run can freeze parameters for its first epochs only.

    Args:
      schedule: learning rate by step.
      momentum: share of the velocity kept at each step.
      weight_decay: L2 penalty on kernels, 0 for none.
      multipliers: regular expressions, each with a factor of the learning rate; of several that
        match a parameter the first counts, and without any the factor is 1.
      freeze: regular expressions over parameter paths: no gradient and no decay reaches these, so
        that they gather no velocity either (see `training.freeze`).
    """

    def stop(path: str, gradient: jax.Array) -> jax.Array:
        return jnp.zeros_like(gradient) if matches(freeze, path) else gradient

    def scale(path: str, update: jax.Array) -> jax.Array:
        return update * next((f for pattern, f in multipliers if matches([pattern], path)), 1.0)

    decay = optax.add_decayed_weights(weight_decay, mask=_kernels)
    return optax.chain(
        optax.chain(
            decay if weight_decay else optax.identity(),
            optax.stateless(lambda grads, params: map_with_path(stop, grads)),
        ),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(schedule),
        optax.stateless(lambda updates, params: map_with_path(scale, updates)),
    )


def _kernels(params: Any) -> Any:
    # By name: in a scan over layers, the norms' parameters have two axes as well.
    return map_with_path(lambda path, leaf: path.split("/")[-1] == "kernel", params)
