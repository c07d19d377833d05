"""Finds images and their classes in a sheet, for those whose folders do not tell them.

The sheet is a text file in UTF-8 with the columns `path` and `class`, and any of `channel`, `group`
and `split`. Paths are relative to it. Cells stand between commas, semicolons or tabs, whichever the
first line has most of. Empty lines, upper case in names of columns, spaces around cells and
backslashes in paths do not matter.
"""

import csv
import io
import re
from pathlib import Path, PurePosixPath

from jaxcells.data.fields import SPLIT_OF, Field
from jaxcells.data.images import ImageError, inspect_image
from jaxcells.data.parallel import parallel_map
from jaxcells.files import Error, logger
from jaxcells.text import some

SHEETS = (".csv", ".tsv")
"""Lower-case suffixes of sheets."""
_COLUMNS = ("path", "class", "channel", "group", "split")


def find_in_sheet(sheet: Path, *, plane: str = "", exclude: str = "") -> list[Field]:
    """Returns the images of a sheet, sorted by name: their path as the sheet has it.

    An image without a group is a group of its own.

    Args:
      sheet: the file.
      plane: which plane of a stack to read, see `read_image`.
      exclude: regular expression; lines in whose path it is found are left out. Empty: none.

    Raises:
      Error: no such sheet, or not its columns; one list, with lines, of images that are missing,
        cannot be read or are there twice, and of cells that are empty or not understood; or fewer
        than two classes.
    """
    try:
        text = sheet.read_text("utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        table = csv.DictReader(io.StringIO(text), delimiter=delimiter, restval="", strict=True)
        columns = table.fieldnames = [name.strip().lower() for name in table.fieldnames or ()]
        lines = [(table.line_num, row) for row in table if any(row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Error(f"{sheet}: cannot be read as CSV in UTF-8 ({error}); see data.sheet") from error
    if not {"path", "class"} <= {*columns} or len({*columns}) < len(columns):
        raise Error(
            f"{sheet}: the first line must name the columns path and class, and may name channel, "
            f"group and split, each once; it has {some(columns) or 'nothing'}"
        )
    if unread := sorted({*columns} - {*_COLUMNS}):
        logger.info("%s: columns that are not read: %s", sheet, some(unread))
    rows: dict[int, dict[str, str]] = {}
    first: dict[Path, int] = {}
    for line, row in lines:
        name = PurePosixPath(row["path"].strip().replace("\\", "/")).as_posix()
        if not (exclude and re.search(exclude, name)):
            rows[line] = row | {"path": name}
            first.setdefault((sheet.parent / name).resolve(), line)
    is_split = any(row.get("split") for row in rows.values())

    def read(line: int) -> Field | str:
        cells = (rows[line].get(column, "").strip() for column in _COLUMNS)
        name, label, channel, group, split = cells
        path = sheet.parent / name
        other = first[path.resolve()]
        if None in rows[line]:
            return f"line {line}: too many cells (a text with {delimiter!r} needs double quotes)"
        if other != line:
            return f"line {line}: {name} is in line {other} too, of class {rows[other]['class']!r}"
        if re.search(r"^$|^\.|[/\\\n]", label):
            return f"line {line}: class {label!r} cannot be the name of a folder"
        if is_split and split.lower() not in SPLIT_OF:
            return f"line {line}: split {split!r} is none of train, val and test"
        try:
            info = inspect_image(path, plane=plane)
        except ImageError as error:
            return f"line {line}: {error}"
        return Field(path, label, channel, group or name, name, info, SPLIT_OF.get(split.lower()))

    results = parallel_map(read, rows, title="reading headers")
    if faults := [result for result in results if isinstance(result, str)]:
        listed = some(faults, 10)
        raise Error(f"{sheet}: {len(faults)} of {len(rows)} lines cannot be used: {listed}")
    fields = [result for result in results if isinstance(result, Field)]
    if len({field.label for field in fields}) < 2:
        raise Error(f"{sheet}: a classifier needs two or more classes, with images of each")
    return sorted(fields, key=lambda field: field.name)
