"""One function over many files, on all cores, with a progress bar."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")


def num_workers() -> int:
    """Returns the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def parallel_map(function: Callable[[T], R], items: Sequence[T], *, title: str) -> list[R]:
    """Applies `function` to every item on all cores and returns the results in order.

    Threads, not processes: decoding, encoding and hashing release the interpreter lock. Each
    worker holds one item's data at a time. The bar shows on a terminal only.

    Raises:
      Whatever `function` raises first in the order of `items`; work not yet begun is cancelled.
    """
    results = []
    executor = ThreadPoolExecutor(num_workers())
    try:
        futures = [executor.submit(function, item) for item in items]
        for future in tqdm(futures, desc=title, disable=None, leave=False):
            results.append(future.result())
    finally:
        executor.shutdown(cancel_futures=True)
    return results
