"""How tables, numbers and times are written for people, everywhere the same."""

import re
from collections.abc import Sequence

_SHORTEST_NAME = 12


def shortened(text: str, width: int) -> str:
    """`text`, or its start and its end around an ellipsis where it is longer than `width`."""
    if len(text) <= width:
        return text
    # Names of cell lines often differ in their last words.
    tail = width // 3
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"


def shortened_apart(texts: Sequence[str], width: int) -> list[str]:
    """All shortened to one width, which is larger where different texts would become alike."""
    while len({shortened(text, width) for text in texts}) < len(set(texts)):
        width += 1
    return [shortened(text, width) for text in texts]


def natural(text: str) -> list[str | int]:
    """A key to sort by in which numbers count as such: day 2, day 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def one_line(text: object) -> str:
    """`text` with all runs of white space as single spaces."""
    return " ".join(str(text).split())


def some(items: Sequence[str], limit: int = 4) -> str:
    """The first few of a list, and how many more there are."""
    more = f", … {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def counted(number: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def digits(value: float, significant: int = 3) -> str:
    """A number with so many digits, and never a power of ten: 0.450, 86.0, 4.50, 1234."""
    exponent = int(f"{value:.{significant - 1}e}".split("e")[1])
    return f"{value:.{max(0, significant - 1 - exponent)}f}"


def amount(value: float) -> str:
    """A number with three digits and a prefix: 21.8 M, 1.00 M for 999,600, 3.66 G, 512."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            return f"{digits(value / scale)} {prefix}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """0.45 s, 45 s, 2.4 min, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{digits(seconds, 2)} s"
    if seconds < 90 * 60:
        return f"{digits(seconds / 60, 2)} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def by(shape: Sequence[int]) -> str:
    """The sides of something: 200x200x3."""
    return "x".join(map(str, shape))


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, width: int = 0
) -> str:
    """A table in columns of one width each.

    Args:
      header: the head of every column; may have line breaks.
      rows: the cells.
      left: so many columns are justified to the left, the others to the right.
      width: of the whole table, for which names in the first column are shortened; 0 for any.
    """
    heads = [head.split("\n") for head in header]
    height = max(map(len, heads))
    lines = zip(*([""] * (height - len(head)) + head for head in heads), strict=True)
    table = [list(line) for line in (*lines, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    if width:
        room = width - sum(2 + column for column in widths[1:])
        widths[0] = min(widths[0], max(_SHORTEST_NAME, room))
    for cells in table:
        cells[0] = shortened(cells[0], widths[0])
    return "\n".join("  ".join(_justified(cells, widths, left)).rstrip() for cells in table)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table in Markdown, whose source is a table too; see `text_table`."""
    cells = [[markdown(cell) for cell in row] for row in rows]
    heads = [head.replace("-\n", "-").replace("\n", " ") for head in header]
    widths = [max(3, *map(len, column)) for column in zip(heads, *cells, strict=True)]
    rule = ["-" * w if n < left else "-" * (w - 1) + ":" for n, w in enumerate(widths)]
    lines = [_justified(row, widths, left) for row in (heads, rule, *cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _justified(cells: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    return [
        cell.ljust(width) if number < left else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]


def markdown(text: str) -> str:
    """`text` with what Markdown would take for its own escaped."""
    return re.sub(r"[\\|*_<`]", r"\\\g<0>", text)
