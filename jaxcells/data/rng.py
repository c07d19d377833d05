"""Random generators named by what they are for, so that no draw depends on another."""

import hashlib

import numpy as np


def named_generator(*name: object) -> np.random.Generator:
    """Returns a generator that depends on the parts of `name` and on nothing else.

    Args:
      *name: strings and integers, such as `(seed, class, field)`.

    Returns:
      A Philox generator (Salmon et al., SC 2011) keyed by 128 bits of the SHA-256 of the parts.
    """
    digest = hashlib.sha256("\x1f".join(map(str, name)).encode("utf-8", "surrogateescape")).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], "<u8")))
