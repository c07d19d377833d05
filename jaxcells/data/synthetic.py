"""The built-in sample: three simulated cell lines, written as a folder of images.

The lines differ in the distributions of size, nucleus, granules and membrane, which overlap as in
life. The experiment is balanced: the lines flow in turn through the same channels and are recorded
with the same settings. Brightness, contrast, light, focus and density differ from field to field
far more than from line to line, so that neither the mean and standard deviation of a crop nor the
walls of its channel give the line away. A classifier that learns the settings does worse than
chance on a new field: its settings were seen with the other lines only.
"""

import itertools
import os
import tempfile
from pathlib import Path

from PIL import Image

from jaxcells.data.parallel import parallel_map
from jaxcells.data.rng import named_generator
from jaxcells.data.simulation import CellLine, draw_acquisition, draw_channel, simulate_field
from jaxcells.files import Error

# The phases of membranes and granules are tuned so that crops of all lines have one mean deviation.
CELL_LINES = (
    CellLine(
        name="sim-A",  # small, smooth, with a large nucleus
        diameter=31.0,
        nucleus_ratio=0.72,
        granules=3.0,
        granule_size=1.3,
        granule_phase=0.45,
        vacuoles=0.3,
        membrane_width=1.0,
        membrane_phase=0.48,
    ),
    CellLine(
        name="sim-B",  # large, with coarse dark granules and a small nucleus to one side
        diameter=36.0,
        nucleus_ratio=0.47,
        granules=9.0,
        granule_size=2.1,
        granule_phase=0.57,
        vacuoles=0.1,
        membrane_width=1.3,
        membrane_phase=0.47,
    ),
    CellLine(
        name="sim-C",  # full of fine bright vacuoles, with a broad membrane
        diameter=34.0,
        nucleus_ratio=0.60,
        granules=30.0,
        granule_size=1.15,
        granule_phase=0.50,
        vacuoles=0.9,
        membrane_width=1.9,
        membrane_phase=0.50,
    ),
)


def write_sample(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    channels_per_class: int = 4,
    fields_per_channel: int = 8,
    height: int = 480,
    width: int = 640,
) -> None:
    """Writes the sample to `root/<line>/channel_<n>/field_<nn>.png`, 8-bit grey.

    All of it appears at once, when the last field is done. A sample that is there is left as it is.
    A field depends on the seed and its own line, channel and number, not on how many others there
    are.

    Args:
      root: folder to make.
      seed: of everything that is drawn.
      channels_per_class: channels of each line.
      fields_per_channel: fields of view of each channel.
      height: rows of a field.
      width: columns of a field.

    Raises:
      Error: `root` exists and is not the whole of this sample.
    """
    root = Path(root)
    source = (
        "# Simulated cells\n\n"
        f"Made by jaxcells, not by a microscope: seed {seed}, {len(CELL_LINES)} cell lines x "
        f"{channels_per_class} channels x {fields_per_channel} fields of {height}x{width} pixels.\n"
        "To try things out: no figure measured here says anything about real cells.\n"
    )
    fields = {
        Path(line.name, f"channel_{channel}", f"field_{field:02d}.png"): (line, channel, field)
        for line, channel, field in itertools.product(
            CELL_LINES, range(1, channels_per_class + 1), range(1, fields_per_channel + 1)
        )
    }
    if root.exists():
        _check_sample(root, source, list(fields))
        return

    def write_field(name: Path) -> None:
        line, channel, field = fields[name]
        pixels = simulate_field(
            named_generator(seed, "cells", line.name, channel, field),
            line,
            draw_channel(named_generator(seed, "channel", channel)),
            draw_acquisition(named_generator(seed, "acquisition", channel, field)),
            height=height,
            width=width,
        )
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)

    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as temporary:
        folder = Path(temporary, root.name)
        parallel_map(write_field, list(fields), title="simulating fields")
        (folder / "SOURCE.md").write_text(source, encoding="utf-8")
        folder.rename(root)


def _check_sample(root: Path, source: str, names: list[Path]) -> None:
    record = root / "SOURCE.md"
    missing = [name.as_posix() for name in names if not (root / name).is_file()]
    if not record.is_file() or record.read_text(encoding="utf-8") != source:
        problem = "is not the built-in sample of this seed and size"
    elif missing:
        problem = f"lacks {len(missing)} of the sample's {len(names)} fields, such as {missing[0]}"
    else:
        return
    raise Error(f"{root}: exists, but {problem}; remove it, or write the sample elsewhere")
