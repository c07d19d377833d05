"""What is said to people, from the files in `templates/`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxcells.text import counted, duration, one_line

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_TEMPLATES.filters |= {"counted": counted, "duration": duration}


def paragraphs(
    template: str, inserted: Mapping[str, Sequence[Any]] | None = None, **values: Any
) -> list[Any]:
    """The paragraphs of a template, each in one line.

    Args:
      template: name of the file, without its ending; blank lines stand between paragraphs.
      inserted: what stands instead of a paragraph, such as `[costs]`: tables, or nothing.
      **values: what the template refers to.
    """
    text = _TEMPLATES.get_template(f"{template}.txt.j2").render(values)
    said = [one_line(part) for part in text.split("\n\n") if part.strip()]
    return [part for key in said for part in (inserted or {}).get(key, [key])]
