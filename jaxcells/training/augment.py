"""Random changes to training images, made on the device inside the jitted step."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def augment(
    images: jax.Array, key: jax.Array, *, dihedral: bool = False, intensity: float = 0.0
) -> jax.Array:
    """Changes every image at random, each in its own way.

    A cell in a channel has no up and no left, and brightness drifts with lamp and focus: these are
    the two changes that keep the class of a microscope image for certain. Neither interpolates.

    Args:
      images: `[B, H, W, C]` float32, normalised (mean near 0, deviation near 1).
      key: random key of this batch.
      dihedral: whether to draw one of the 8 symmetries of the square, all equally likely; for
        images that are not square one of the 4 that keep the shape. Pixels are moved, their
        values stay.
      intensity: half-width `s` of a gain in `[1 - s, 1 + s]` and of an offset in `[-s, s]`
        deviations, drawn uniformly for each image and shared by its channels; 0 for none.

    Returns:
      `[B, H, W, C]` float32.
    """
    dihedral_key, intensity_key = jax.random.split(key)
    if dihedral:
        images = _random_symmetry(images, dihedral_key)
    if intensity:
        images = _random_gain_and_offset(images, intensity_key, intensity)
    return images


def _random_symmetry(images: jax.Array, key: jax.Array) -> jax.Array:
    num_images, height, width, _ = images.shape
    # Two flips and a transposition, each done or not, give every symmetry of the square once.
    coins = jax.random.bernoulli(key, shape=(3, num_images, 1, 1, 1))
    images = jnp.where(coins[0], jnp.flip(images, 1), images)
    images = jnp.where(coins[1], jnp.flip(images, 2), images)
    if height == width:
        images = jnp.where(coins[2], images.swapaxes(1, 2), images)
    return images


def _random_gain_and_offset(images: jax.Array, key: jax.Array, strength: float) -> jax.Array:
    gain, offset = jax.random.uniform(
        key, (2, images.shape[0], 1, 1, 1), minval=-strength, maxval=strength
    )
    return images * (1 + gain) + offset
