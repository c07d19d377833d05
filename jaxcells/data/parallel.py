"""One function over many files, on all cores, with a progress bar."""

import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(function: Callable[[T], R], items: Collection[T], *, title: str) -> list[R]:
    """Applies `function` to every item on all cores and returns the results in order.

    Threads, not processes: decoding, encoding and hashing release the interpreter lock. Each
    worker holds one item's data at a time. The bar shows on a terminal only.

    Raises:
      Whatever `function` raises first in the order of `items`; work not yet begun is cancelled.
    """
    # macOS and Windows have none; the executor then goes by the number of cores.
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    with ThreadPoolExecutor(num_cores) as executor:
        results = executor.map(function, items)
        return list(tqdm(results, desc=title, total=len(items), disable=None, leave=False))
