"""Random changes to training images, made on the device inside the jitted step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

NUM_SYMMETRIES = 8  # of the square


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
    if dihedral:
        images = apply_symmetries(images, draw_symmetries(key, len(images)))
    if intensity:
        key, shape = jax.random.split(key)[1], (2, len(images), 1, 1, 1)
        gain, offset = jax.random.uniform(key, shape, minval=-intensity, maxval=intensity)
        images = images * (1 + gain) + offset
    return images


def draw_symmetries(key: jax.Array, num_images: int) -> jax.Array:
    """Draws a symmetry of the square for every image of a batch, as `augment` does.

    Args:
      key: what `augment` is given.
      num_images: B.

    Returns:
      int32 `[B]`, from 0 to 7, see `apply_symmetries`.
    """
    return jax.random.randint(jax.random.split(key)[0], (num_images,), 0, NUM_SYMMETRIES)


def apply_symmetries(images: jax.Array, symmetries: jax.Array) -> jax.Array:
    """Applies symmetries of the square: two flips and a transposition, each done or not.

    Args:
      images: `[B, H, W, C]`.
      symmetries: int `[B]`: 1 flips up and down, 2 left and right, 4 transposes; sums do several,
        in this order. Images that are not square are never transposed.

    Returns:
      `[B, H, W, C]`.
    """

    def done(bit: int) -> jax.Array:
        return (symmetries & bit > 0)[:, None, None, None]

    images = jnp.where(done(1), jnp.flip(images, 1), images)
    images = jnp.where(done(2), jnp.flip(images, 2), images)
    if images.shape[1] == images.shape[2]:
        images = jnp.where(done(4), images.swapaxes(1, 2), images)
    return images
