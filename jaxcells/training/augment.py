"""Random changes to training images, made on the device inside the jitted step.

docs/extending.md says how to add one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

NUM_SYMMETRIES = 8  # of the square


def augment(images: jax.Array, key: jax.Array, **settings: Any) -> jax.Array:
    """Changes every image at random, each in its own way.

    A cell in a channel has no up and no left, and brightness drifts with lamp and focus: these are
    the two changes that keep the class of a microscope image for certain. Neither interpolates.

    Args:
      images: `[B, H, W, C]` float32, normalised (mean near 0, deviation near 1).
      key: random key of this batch.
      **settings: {name in `AUGMENTATIONS`: its strength}; what is left out, 0 or False is not done.

    Returns:
      `[B, H, W, C]` float32.
    """
    for name in sorted(settings, key=list(AUGMENTATIONS).index):  # fails for a name not there
        if settings[name]:
            images = AUGMENTATIONS[name](images, own_key(key, name), settings[name])
    return images


def own_key(key: jax.Array, name: str) -> jax.Array:
    """Returns the key by which an augmentation draws, of the key that `augment` is given.

    It stays the same when more are added behind.
    """
    return jax.random.split(key, len(AUGMENTATIONS))[list(AUGMENTATIONS).index(name)]


def change_intensity(images: jax.Array, key: jax.Array, strength: float) -> jax.Array:
    """Changes brightness and contrast of every image.

    Args:
      images: `[B, H, W, C]`.
      key: random key.
      strength: half-width `s` of a gain in `[1 - s, 1 + s]` and of an offset in `[-s, s]`
        deviations, drawn uniformly for each image and shared by its channels.

    Returns:
      `[B, H, W, C]`.
    """
    shape = (2, len(images), 1, 1, 1)
    gain, offset = jax.random.uniform(key, shape, minval=-strength, maxval=strength)
    return images * (1 + gain) + offset


def flip_and_turn(images: jax.Array, key: jax.Array, strength: object = True) -> jax.Array:
    """Applies to every image one of the 8 symmetries of the square, all equally likely.

    For images that are not square it is one of the 4 that keep the shape. Pixels are moved, their
    values stay.

    Args:
      images: `[B, H, W, C]`.
      key: random key.
      strength: of no meaning.

    Returns:
      `[B, H, W, C]`.
    """
    return apply_symmetries(images, draw_symmetries(key, len(images)))


def draw_symmetries(key: jax.Array, num_images: int) -> jax.Array:
    """Draws a symmetry of the square for every image of a batch.

    Args:
      key: random key; `own_key` gives the one by which `augment` draws.
      num_images: B.

    Returns:
      int32 `[B]`, from 0 to 7, see `apply_symmetries`.
    """
    return jax.random.randint(key, (num_images,), 0, NUM_SYMMETRIES)


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


# In the order in which they are applied: (images [B, H, W, C], random key, strength) -> images. The
# strength is the key data.augment.NAME of the config; 0 or False leaves it out.
AUGMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, Any], jax.Array]] = {
    "dihedral": flip_and_turn,
    "intensity": change_intensity,
}
