"""Text files that are either whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[TextIO]:
    """Opens a text file to write, which takes the place of `path` when all is written.

    UTF-8, lines end as they are written, and names that are no UTF-8 come out as they went in. What
    is interrupted leaves `<path>.partial`, and the file that was there before.
    """
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
