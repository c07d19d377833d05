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

    The last batch of an epoch is filled up with the images that the epoch began with, at mask 0:
    every example weighs the same in the loss, and batch norm sees as many different images as in
    any other batch.

    Args:
      images: [N, H, W, C].
      labels: int [N].
      batch_size: B, over all processes.
      seed: of the order.
      first_step: how many batches of the endless sequence to leave out.
      rows: the rows of every batch that this process holds.

    Yields:
      {"image": [b, H, W, C] in the images' dtype, "label": int32 [b], "mask": float32 [b]}, where b
      is the number of `rows`.
    """
    epoch, first = divmod(first_step, num_batches(len(labels), batch_size))
    while True:
        order = epoch_indices(len(labels), seed=seed, epoch=epoch)
        yield from _batches(images, labels, order, batch_size, rows, first)
        epoch, first = epoch + 1, 0


def eval_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, rows: slice = slice(None)
) -> Iterator[Batch]:
    """Yields all examples in order, none dropped. See `train_batches`."""
    yield from _batches(images, labels, np.arange(len(labels)), batch_size, rows, 0)


def _batches(
    images: np.ndarray, labels: np.ndarray, order: np.ndarray, size: int, rows: slice, first: int
) -> Iterator[Batch]:
    number = num_batches(len(order), size)
    padded = np.resize(order, number * size)  # goes on from the beginning
    for batch in range(first, number):
        places = np.arange(batch * size, (batch + 1) * size)[rows]
        indices = padded[places]
        yield {
            "image": images[indices],
            "label": labels[indices].astype(np.int32),
            "mask": (places < len(order)).astype(np.float32),
        }
