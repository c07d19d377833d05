"""Order and batches as pure functions of (seed, epoch, step): there is no iterator to save."""

from collections.abc import Iterator, Mapping

import numpy as np

Batch = Mapping[str, np.ndarray]


def epoch_indices(num_examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of one epoch, a permutation int64 [num_examples].

    The generator is Philox keyed by (seed, epoch), so that any epoch can be had without those
    before it.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    return rng.permutation(num_examples)


def num_batches(num_examples: int, batch_size: int) -> int:
    """Returns how many batches hold all examples, the last one padded."""
    return -(-num_examples // batch_size)


def make_batch(
    images: np.ndarray,
    labels: np.ndarray,
    indices: np.ndarray,
    batch_size: int,
    rows: slice = slice(None),
) -> Batch:
    """Gathers one batch, padded to `batch_size`.

    Padding repeats the batch's own images with mask 0: every example weighs the same in the loss,
    and batch norm sees nothing but real images.

    Args:
      images: [N, H, W, C].
      labels: int [N].
      indices: int [n], 1 <= n <= batch_size.
      batch_size: B, over all processes.
      rows: the rows of the batch that this process holds.

    Returns:
      {"image": [b, H, W, C] in the images' dtype, "label": int32 [b], "mask": float32 [b]}, where b
      is the number of `rows`.
    """
    padded = np.resize(indices, batch_size)[rows]
    mask = (np.arange(batch_size) < len(indices))[rows]
    return {
        "image": images[padded],
        "label": labels[padded].astype(np.int32),
        "mask": mask.astype(np.float32),
    }


def train_batches(
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    rows: slice = slice(None),
) -> Iterator[Batch]:
    """Yields the batches of training from step `first_step` on, epoch after epoch, without end.

    See `make_batch` for what a batch is.
    """
    steps_per_epoch = num_batches(len(labels), batch_size)
    epoch, number = divmod(first_step, steps_per_epoch)
    while True:
        order = epoch_indices(len(labels), seed=seed, epoch=epoch)
        for start in range(number * batch_size, len(labels), batch_size):
            indices = order[start : start + batch_size]
            yield make_batch(images, labels, indices, batch_size, rows)
        epoch, number = epoch + 1, 0


def eval_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, rows: slice = slice(None)
) -> Iterator[Batch]:
    """Yields all examples in order, none dropped. See `make_batch`."""
    for first in range(0, len(labels), batch_size):
        indices = np.arange(first, min(first + batch_size, len(labels)))
        yield make_batch(images, labels, indices, batch_size, rows)
