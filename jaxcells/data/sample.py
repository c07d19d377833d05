"""The built-in sample: three simulated cell lines in microfluidic channels, a folder of images.

A field is made as a microscope makes it. A map of optical phase (channel walls, cells, debris) is
filtered by the transfer function of a slightly defocused phase-contrast microscope, lit unevenly
and recorded by a camera with shot and read noise.

The lines differ in the distributions of size, nucleus, granules and membrane, which overlap as in
life. The experiment is balanced: the lines flow in turn through the same channels and are recorded
with the same settings. Brightness, contrast, light, focus and density differ from field to field
far more than from line to line, so that neither the mean and standard deviation of a crop nor the
walls of its channel give the line away. A classifier that learns the settings does worse than
chance on a new field: its settings were seen with the other lines only.

All is float64 until the last rounding, and before it the functions of another C library or CPU move
a grey value by 1e-14 on average: all 3e7 pixels of the sample are the same on every machine, but
for a chance of one in a million.

Lengths are in pixels, phases and angles in radians, brightness in grey levels of 8 bits.
"""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from jaxcells.data.parallel import parallel_map
from jaxcells.data.rng import named_generator
from jaxcells.files import Error, staged

Array = np.ndarray  # float64

_VERSION = 2  # another when the pixels change
_HEIGHT, _WIDTH = 480, 640
# Simulated around a field and cut off: cells cross its borders, and the filter wraps around there.
_MARGIN = 40


@dataclasses.dataclass(frozen=True)
class CellLine:
    """What a simulated cell line looks like: medians over its cells.

    Attributes:
      name: folder of the line; says that its cells are simulated.
      diameter: of a cell.
      nucleus: diameter of the nucleus over that of the cell.
      granules: number in a cell of median diameter; it grows with the area of the cell.
      granule_size: standard deviation of a granule's Gaussian profile.
      bright: share of the granules that are vacuoles: their phase is negative, they shine.
      membrane: standard deviation of its Gaussian profile.
    """

    name: str
    diameter: float
    nucleus: float
    granules: float
    granule_size: float
    bright: float
    membrane: float


# name, diameter, nucleus, granules, granule size, bright, membrane
CELL_LINES = (
    # Small and smooth, with a large nucleus.
    CellLine("sim-A", 31, 0.72, 3, 1.3, 0.3, 1.0),
    # Large, with coarse dark granules and a small nucleus to one side.
    CellLine("sim-B", 36, 0.47, 9, 2.1, 0.1, 1.3),
    # Full of fine bright vacuoles, with a broad membrane.
    CellLine("sim-C", 34, 0.6, 30, 1.1, 0.9, 1.9),
)


def write_sample(root: Path, *, seed: int = 0, channels: int = 4, fields: int = 8) -> None:
    """Writes the sample to `root/<line>/channel_<n>/field_<nn>.png`, 480x640 pixels, 8-bit grey.

    All of it appears at once, when the last field is done. A sample that is there is left as it is.

    Args:
      root: folder to make.
      seed: of everything that is drawn.
      channels: number of channels, through which every line flows.
      fields: number of fields of view of a line in a channel.

    Raises:
      Error: `root` exists and is not the whole of this sample.
    """
    source = (
        f"# Simulated cells\n\nMade by jaxcells, not by a microscope: version {_VERSION}, "
        f"seed {seed}, {len(CELL_LINES)} lines x {channels} channels x {fields} fields.\n"
        "To try things out: no figure measured here says anything about real cells.\n"
    )
    numbers = itertools.product(CELL_LINES, range(1, channels + 1), range(1, fields + 1))
    drawn = {
        f"{line.name}/channel_{channel}/field_{field:02d}.png": (line, channel, field)
        for line, channel, field in numbers
    }
    if root.exists():
        record = root / "SOURCE.md"
        is_whole = record.is_file() and all((root / name).is_file() for name in drawn)
        if is_whole and record.read_text(encoding="utf-8") == source:
            return
        raise Error(
            f"{root}: is not the whole sample of this version, seed and size; delete the folder to "
            "have it written anew, or choose another workdir"
        )

    def write_field(name: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(simulate_field(seed, *drawn[name])).save(path)

    with staged(root) as folder:
        parallel_map(write_field, list(drawn), title="simulating fields")
        (folder / "SOURCE.md").write_text(source, encoding="utf-8")


def simulate_field(seed: int, line: CellLine, channel: int, field: int) -> np.ndarray:
    """Simulates one field of view of a cell line that flows through a channel.

    Args:
      seed: of everything that is drawn.
      line: the cell line.
      channel: its walls are the same in all fields of all lines.
      field: the settings of the recording are the same for all lines, and its own in each channel.

    Returns:
      [480, 640] uint8.
    """
    walls = named_generator(seed, "channel", channel)
    settings = named_generator(seed, "settings", channel, field)
    rng = named_generator(seed, "cells", line.name, channel, field)
    y, x = np.ogrid[-_MARGIN : _HEIGHT + _MARGIN, -_MARGIN : _WIDTH + _MARGIN]

    rise = walls.normal(0, 0.008) * (x - _WIDTH / 2)
    top, bottom = walls.uniform(10, 26, 2)
    depth = np.maximum(top + rise - y, y - rise - (_HEIGHT - bottom))
    # Cells flow at three heights, and the microscope focuses near the middle one.
    planes = np.zeros((3, y.size, x.size))
    planes[1] = walls.uniform(0.45, 0.7) * (1 + np.tanh(depth / 2.4) + _bell((depth - 7) / 1.3))
    for row, column, radius in _place_cells(rng, line, settings.uniform(0.97, 1.2), depth):
        reach = int(1.3 * radius) + 5
        rows = slice(max(row - reach, 0), row + reach)
        columns = slice(max(column - reach, 0), column + reach)
        planes[rng.integers(3), rows, columns] += _cell_phase(
            rng, line, radius, y[rows] - y[row, 0], x[:, columns] - x[0, column]
        )
    specks = rng.uniform(0, (_HEIGHT, _WIDTH), (settings.integers(50), 2))
    planes[rng.integers(3)] += _spots(rng, y, x, specks, size=1.3, phase=0.6)
    defocus = settings.uniform(-1.2, 1.2) + np.array([-2.5, 0, 2.5])
    spectra = np.fft.rfft2(planes) * _transfer(y.size, x.size, defocus[:, None, None])
    phase = np.fft.irfft2(spectra.sum(axis=0), (y.size, x.size))
    return _record(settings, rng, phase[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN])


def _place_cells(
    rng: Generator, line: CellLine, crowding: float, depth: Array
) -> list[tuple[int, int, float]]:
    """Throws cells into the channel until it is full.

    Args:
      rng: draws them.
      line: of the cells.
      crowding: least distance of two cells over the sum of their radii.
      depth: into a wall, at each pixel; negative in the channel.

    Returns:
      Row and column on the map `depth`, and radius, of each cell.
    """
    tries = 12 * depth.size // round(line.diameter**2)
    rows, columns = rng.integers(depth.shape, size=(tries, 2)).T
    spread = rng.triangular(-0.35, 0, 0.35, tries) + rng.normal(0, 0.03)
    radii = 0.5 * line.diameter * np.exp(spread)
    free = depth[rows, columns] < -radii
    cells = []
    for i in range(tries):
        if free[i]:
            cells.append((rows[i], columns[i], radii[i]))
            free &= np.hypot(rows - rows[i], columns - columns[i]) > crowding * (radii + radii[i])
    return cells


def _cell_phase(rng: Generator, line: CellLine, radius: float, y: Array, x: Array) -> Array:
    """Phase of one cell at the rows y [H, 1] and columns x [1, W] from its centre: [H, W]."""
    distance, bearing = np.sqrt(y**2 + x**2), np.arctan2(y, x)
    edge = np.full_like(distance, radius)
    for order in (2, 3, 4):
        wave = radius * rng.normal(0, 0.05 / (order - 1))
        edge += wave * np.cos(order * bearing + rng.uniform(0, 2 * np.pi))
    body = rng.normal(0.75, 0.1) * np.sqrt(np.clip(1 - (distance / edge) ** 2, 0, None))
    width = line.membrane * rng.uniform(0.8, 1.25)
    membrane = rng.uniform(0.35, 0.65) * _bell((edge - distance) / width - 1)

    nucleus_radius = radius * min(line.nucleus * rng.uniform(0.85, 1.18), 0.82)
    center = _scatter(rng, 1, 0.7 * (radius - nucleus_radius))
    depth = nucleus_radius - np.sqrt((y - center[0, 0]) ** 2 + (x - center[0, 1]) ** 2)
    nucleus = 0.11 + 0.11 * np.tanh(depth / 1.8) + 0.16 * _bell(depth / 1.1)
    nucleoli = center + _scatter(rng, int(rng.integers(1, 4)), 0.6 * nucleus_radius)
    mean = line.granules * (2 * radius / line.diameter) ** 2 * rng.uniform(0.5, 1.5)
    granules = _scatter(rng, rng.poisson(mean), 0.88 * radius)
    sign = np.where(rng.random(len(granules)) < line.bright, -1, 1)
    spots = _spots(rng, y, x, nucleoli, size=2.0, phase=0.33)
    spots += _spots(rng, y, x, granules, size=line.granule_size, phase=0.55 * sign)
    return body + membrane + nucleus + spots


def _scatter(rng: Generator, count: int, radius: float) -> Array:
    """Draws points uniform over a disc around the origin: rows and columns, [N, 2]."""
    distance = radius * np.sqrt(rng.random(count))
    bearing = rng.uniform(0, 2 * np.pi, count)
    return np.stack([distance * np.sin(bearing), distance * np.cos(bearing)], axis=1)


def _spots(
    rng: Generator, y: Array, x: Array, centers: Array, size: float, phase: float | Array
) -> Array:
    """Sums Gaussian spots at centers [N, 2] on the rows y [H, 1] and columns x [1, W]: [H, W]."""
    sizes = size * rng.uniform(0.75, 1.25, len(centers))
    vertical = _bell((y - centers[:, 0]) / sizes) * phase * rng.uniform(0.5, 1.3, len(centers))
    horizontal = _bell((x.T - centers[:, 1]) / sizes)
    # Not a matrix product: BLAS would set threads of its own against those that write fields.
    return np.einsum("hn,wn->hw", vertical, horizontal)


def _bell(x: Array) -> Array:
    return np.exp(-0.5 * x**2)


def _transfer(height: int, width: int, defocus: Array) -> Array:
    """Transfer function of a defocused phase-contrast microscope for a weak phase object.

    In focus, phase shows with negative sign (dark cells), less the smooth part of it that passes
    through the phase ring and so makes the halo. Out of focus it shows as in bright field too, by
    Fresnel diffraction. See Born and Wolf, Principles of Optics, sec. 8.6.3, and for the halo Yin,
    Kanade and Chen, Medical Image Analysis 16 (2012) 1047.

    Args:
      height: rows of the phase map.
      width: columns of the phase map.
      defocus: wavelength times distance from the focal plane, in square pixels, [N, 1, 1].

    Returns:
      Real gain at each frequency of `np.fft.rfft2`, [N, H, W / 2 + 1].
    """
    squared = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width) ** 2
    ring = 0.97 * np.exp(-2 * (np.pi * 6.5) ** 2 * squared)
    chi = np.pi * defocus * squared
    aperture = np.exp(-2 * (np.pi * 0.75) ** 2 * squared - 0.15 * chi**2)  # and lack of coherence
    return (np.sin(chi) - np.cos(chi) * (1 - ring)) * aperture


def _record(settings: Generator, rng: Generator, phase: Array) -> np.ndarray:
    """Lights a phase image [H, W] and records it, at a contrast that its line does not change."""
    v, u = np.linspace(-1, 1, _HEIGHT)[:, None], np.linspace(-1, 1, _WIDTH)
    exposure, contrast = settings.uniform(90, 150), settings.uniform(0.15, 0.3)
    slope, center = settings.normal(0, 0.1, 2), settings.uniform(-0.4, 0.4, 2)
    vignette = settings.uniform(0.03, 0.15) * ((v - center[0]) ** 2 + (u - center[1]) ** 2)
    light = exposure * (1 - slope[0] * v - slope[1] * u) * (1 - vignette)
    signal = light * np.maximum(1 + contrast * phase / phase.std(), 0.05)
    electrons, read_noise = settings.uniform((9, 0.5), (45, 1.5))  # per grey level; grey levels
    recorded = rng.normal(signal, np.sqrt(signal / electrons + read_noise**2))
    return np.clip(np.rint(recorded), 0, 255).astype(np.uint8)
