"""The built-in sample: simulated label-free images of three cell lines in microfluidic channels.

A field is made as a microscope makes it. A map of optical phase (channel walls, cells, debris) is
filtered by the transfer function of a slightly defocused phase-contrast microscope, lit unevenly
and recorded by a camera with shot and read noise. The cell lines differ in the distributions of
size, nucleus, granules and membrane, which overlap as in life.

The experiment is balanced: the lines flow in turn through the same channels and are recorded with
the same settings. Brightness, contrast, light, focus and density differ from field to field far
more than the lines do, and equally for all lines, so that neither a crop's mean and standard
deviation nor the walls of its channel give the line away.

Lengths are in pixels, phases in radians, angles in radians, brightness in grey levels of 8 bits.
"""

import hashlib
import math
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from jaxcells.errors import Error

MARGIN = 40  # simulated around a field and cut off: cells cross its borders, filters wrap outside it


@dataclass(frozen=True)
class CellLine:
    """What a simulated cell line looks like: medians over its cells.

    Attributes:
        name: folder of the line; says that its cells are simulated.
        diameter: of a cell.
        nucleus_ratio: diameter of the nucleus over that of the cell.
        granules: number in a cell of median diameter; it grows with the cell's area.
        granule_size: standard deviation of a granule's Gaussian profile.
        granule_phase: phase at the centre of a granule.
        vacuoles: share of the granules whose phase is negative, which shine.
        membrane_width: standard deviation of the membrane's Gaussian profile.
        membrane_phase: phase at the crest of the membrane.
    """

    name: str
    diameter: float
    nucleus_ratio: float
    granules: float
    granule_size: float
    granule_phase: float
    vacuoles: float
    membrane_width: float
    membrane_phase: float


CELL_LINES = (
    CellLine(
        name="sim-A",
        diameter=31.0,
        nucleus_ratio=0.72,
        granules=4.0,
        granule_size=1.3,
        granule_phase=0.45,
        vacuoles=0.3,
        membrane_width=1.0,
        membrane_phase=0.48,
    ),
    CellLine(
        name="sim-B",
        diameter=37.0,
        nucleus_ratio=0.48,
        granules=9.0,
        granule_size=2.0,
        granule_phase=0.60,
        vacuoles=0.1,
        membrane_width=1.3,
        membrane_phase=0.50,
    ),
    CellLine(
        name="sim-C",
        diameter=34.0,
        nucleus_ratio=0.60,
        granules=28.0,
        granule_size=1.15,
        granule_phase=0.50,
        vacuoles=0.8,
        membrane_width=1.9,
        membrane_phase=0.50,
    ),
)


@dataclass(frozen=True)
class Channel:
    """The walls of a microfluidic channel, which all of its fields share.

    Attributes:
        top: depth of the upper wall, from the upper border, at the middle column.
        bottom: depth of the lower wall, from the lower border.
        tilt: angle of the walls against the rows of the camera.
        edge: width over which a wall rises.
        phase: of the walls' material against the medium.
    """

    top: float
    bottom: float
    tilt: float
    edge: float
    phase: float


@dataclass(frozen=True)
class Acquisition:
    """How a field is recorded, and how full it is: what differs from field to field.

    Attributes:
        exposure: grey level of the background.
        gradient: relative fall of the light from the middle to the (lower, right) border.
        vignette: relative fall of the light at the distance of half a side from `centre`.
        centre: of the vignette, as (row, column) in units of half a side.
        contrast: of the phase image.
        defocus: wavelength times distance of the focal plane, in square pixels.
        crowding: least distance of two cells over the sum of their radii.
        specks: number of specks of debris.
        electrons: per grey level; the shot noise follows.
        read_noise: standard deviation, grey levels.
    """

    exposure: float
    gradient: tuple[float, float]
    vignette: float
    centre: tuple[float, float]
    contrast: float
    defocus: float
    crowding: float
    specks: int
    electrons: float
    read_noise: float


def draw_channel(rng: np.random.Generator) -> Channel:
    """Draws the walls of a channel."""
    return Channel(
        top=rng.uniform(10, 26),
        bottom=rng.uniform(10, 26),
        tilt=rng.normal(0, 0.008),
        edge=rng.uniform(0.8, 1.6),
        phase=rng.uniform(0.9, 1.4),
    )


def draw_acquisition(rng: np.random.Generator) -> Acquisition:
    """Draws the settings of a recording."""
    return Acquisition(
        exposure=rng.uniform(90, 150),
        gradient=(rng.normal(0, 0.1), rng.normal(0, 0.1)),
        vignette=rng.uniform(0.03, 0.15),
        centre=(rng.uniform(-0.4, 0.4), rng.uniform(-0.4, 0.4)),
        contrast=1.0 * math.exp(rng.normal(0, 0.25)),
        defocus=rng.normal(0, 1.0),
        crowding=rng.uniform(1.04, 1.3),
        specks=rng.poisson(rng.gamma(2, 10)),
        electrons=20 * math.exp(rng.normal(0, 0.5)),
        read_noise=rng.uniform(0.5, 1.5),
    )


def simulate_field(
    rng: np.random.Generator,
    line: CellLine,
    channel: Channel,
    acquisition: Acquisition,
    *,
    height: int = 480,
    width: int = 640,
) -> np.ndarray:
    """Simulates one field of view of a cell line that flows through a channel.

    Args:
        rng: draws the cells, the debris and the noise.
        line: the cell line.
        channel: the channel's walls.
        acquisition: the settings of the recording.
        height: rows of the field.
        width: columns of the field.

    Returns:
        [H, W] uint8.
    """
    y = np.arange(-MARGIN, height + MARGIN, dtype=np.float32)
    x = np.arange(-MARGIN, width + MARGIN, dtype=np.float32)
    slope = channel.tilt * (x - width / 2)
    into_wall = np.maximum(
        channel.top + slope - y[:, None], y[:, None] - slope - (height - channel.bottom)
    )

    depths = acquisition.defocus + np.array([-2.5, 0.0, 2.5])
    planes = np.zeros((depths.size, y.size, x.size), np.float32)
    planes[1] += _wall_phase(channel, into_wall)
    for row, column, radius in _place_cells(rng, line, acquisition.crowding, into_wall):
        reach = math.ceil(1.4 * radius) + 4
        rows = slice(max(row - reach, 0), row + reach)
        columns = slice(max(column - reach, 0), column + reach)
        planes[rng.integers(depths.size), rows, columns] += _cell_phase(
            rng, line, radius, y[rows] - y[row], x[columns] - x[column], channel.tilt
        )
    planes[rng.integers(depths.size)] += _spots(
        y,
        x,
        rng.uniform(0, height, acquisition.specks),
        rng.uniform(0, width, acquisition.specks),
        rng.uniform(0.8, 1.8, acquisition.specks),
        rng.uniform(-0.5, 1.2, acquisition.specks),
    )
    spectrum = sum(
        np.fft.rfft2(plane) * _transfer(plane.shape, depth)
        for plane, depth in zip(planes, depths, strict=True)
    )
    phase_image = np.fft.irfft2(spectrum, planes[0].shape)[MARGIN:-MARGIN, MARGIN:-MARGIN]
    return _record(rng, acquisition, phase_image)


def _wall_phase(channel: Channel, into_wall: np.ndarray) -> np.ndarray:
    """Phase of the walls at each distance into them: a step and a shallow groove behind it."""
    step = 1 / (1 + np.exp(-np.clip(into_wall / channel.edge, -30, 30)))
    groove = 0.5 * np.exp(-0.5 * ((into_wall - 7) / 1.3) ** 2)
    return channel.phase * (step + groove)


def _place_cells(
    rng: np.random.Generator, line: CellLine, crowding: float, into_wall: np.ndarray
) -> list[tuple[int, int, float]]:
    """Throws cells into the channel until no more find room; some of them touch.

    Returns:
        Row and column on the map `into_wall` and radius of each cell.
    """
    height, width = into_wall.shape
    count = int(12 * height * width / line.diameter**2)
    rows, columns = rng.integers(height, size=count), rng.integers(width, size=count)
    spread = np.clip(rng.normal(0, 0.13, count), -0.35, 0.35) + rng.normal(0, 0.03)
    radii = 0.5 * line.diameter * np.exp(spread)
    closeness = np.where(rng.random(count) < 0.1, 0.97, crowding)
    free = into_wall[rows, columns] < -radii
    cells = []
    for i in range(count):
        if free[i]:
            cells.append((int(rows[i]), int(columns[i]), float(radii[i])))
            distance = (rows - rows[i]) ** 2 + (columns - columns[i]) ** 2
            free &= distance > (closeness * (radii + radii[i])) ** 2
    return cells


def _cell_phase(
    rng: np.random.Generator,
    line: CellLine,
    radius: float,
    y: np.ndarray,
    x: np.ndarray,
    flow: float,
) -> np.ndarray:
    """Phase of one cell at the rows y [H] and columns x [W] counted from its centre, [H, W]."""
    angle = flow + rng.normal(0, 0.4)
    stretch = math.exp(0.5 * abs(rng.normal(0.06, 0.08)))
    sin, cos = math.sin(angle), math.cos(angle)
    along = (cos * x + sin * y[:, None]) / stretch
    across = (cos * y[:, None] - sin * x) * stretch
    distance, bearing = np.hypot(along, across), np.arctan2(across, along)
    edge = np.full_like(distance, radius)
    for order in (2, 3, 4):
        wave = rng.normal(0, 0.035 / (order - 1))
        edge += radius * wave * np.cos(order * bearing + rng.uniform(0, 2 * math.pi))

    body = rng.normal(0.75, 0.1) * np.sqrt(np.clip(1 - (distance / edge) ** 2, 0, None))
    width = line.membrane_width * math.exp(rng.normal(0, 0.15))
    crest = line.membrane_phase * math.exp(rng.normal(0, 0.2))
    membrane = crest * np.exp(-0.5 * ((edge - distance - width) / width) ** 2)

    ratio = min(line.nucleus_ratio * math.exp(rng.normal(0, 0.09)), 0.82)
    centre = _ring(rng, 1, 0, 0.7 * (1 - ratio) * radius)
    squeeze = math.exp(rng.normal(0, 0.06))
    depth = ratio * radius - np.hypot(
        (y[:, None] - float(centre[0, 0])) * squeeze, (x - float(centre[1, 0])) / squeeze
    )
    nucleus = 0.22 / (1 + np.exp(-np.clip(depth / 0.9, -30, 30)))
    envelope = 0.16 * np.exp(-0.5 * (depth / 1.1) ** 2)

    nucleoli = centre + _ring(rng, rng.integers(1, 4), 0, 0.6 * ratio * radius)
    abundance = (2 * radius / line.diameter) ** 2 * rng.gamma(12, 1 / 12)
    granules = _ring(rng, rng.poisson(line.granules * abundance), 0.25 * radius, 0.88 * radius)
    n, m = nucleoli.shape[1], granules.shape[1]
    spots = _spots(
        y,
        x,
        *np.concatenate([nucleoli, granules], axis=1),
        np.concatenate([rng.uniform(1.6, 2.4, n), line.granule_size * rng.uniform(0.8, 1.25, m)]),
        np.concatenate(
            [
                rng.uniform(0.2, 0.4, n),
                line.granule_phase * rng.uniform(0.5, 1.3, m) * np.where(rng.random(m) < line.vacuoles, -1, 1),
            ]
        ),
    )
    return body + membrane + nucleus + envelope + spots


def _ring(rng: np.random.Generator, count: int, inner: float, outer: float) -> np.ndarray:
    """Draws points uniform over a ring around the origin, as [2, count]: rows and columns."""
    distance = np.sqrt(rng.uniform(inner**2, outer**2, count))
    bearing = rng.uniform(0, 2 * math.pi, count)
    return distance * np.stack([np.sin(bearing), np.cos(bearing)])


def _spots(
    y: np.ndarray,
    x: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    sizes: np.ndarray,
    phases: np.ndarray,
) -> np.ndarray:
    """Sums N Gaussian spots at the rows y [H] and columns x [W]: [H, W] float32."""
    rows, columns, sizes, phases = (
        np.asarray(a, np.float32)[:, None] for a in (rows, columns, sizes, phases)
    )
    vertical = phases * np.exp(-0.5 * ((y - rows) / sizes) ** 2)
    horizontal = np.exp(-0.5 * ((x - columns) / sizes) ** 2)
    return vertical.T @ horizontal


def _transfer(shape: tuple[int, ...], defocus: float) -> np.ndarray:
    """Transfer function of a defocused phase-contrast microscope for a weak phase object.

    In focus the phase shows with negative sign (dark cells), less the smooth part of it that passes
    through the phase ring and makes the halo; out of focus it shows as in bright field, by Fresnel
    diffraction. See Born and Wolf, Principles of Optics, section 8.6.3, and for the halo Yin, Kanade
    and Chen, Medical Image Analysis 16 (2012) 1047.

    Args:
        shape: of the phase map.
        defocus: wavelength times distance from the focal plane, in square pixels.

    Returns:
        Real gain at each frequency of `np.fft.rfft2`, float32.
    """
    fy, fx = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])
    square = (fy**2 + fx**2).astype(np.float32)
    ring = 0.97 * np.exp(-2 * (math.pi * 6.5) ** 2 * square)
    aperture = np.exp(-2 * (math.pi * 0.75) ** 2 * square)
    chi = math.pi * float(defocus) * square
    coherence = np.exp(-0.15 * chi**2)
    return (np.sin(chi) - np.cos(chi) * (1 - ring)) * aperture * coherence


def _record(
    rng: np.random.Generator, acquisition: Acquisition, phase_image: np.ndarray
) -> np.ndarray:
    """Lights a phase image and records it: [H, W] uint8."""
    v = np.linspace(-1, 1, phase_image.shape[0], dtype=np.float32)[:, None]
    u = np.linspace(-1, 1, phase_image.shape[1], dtype=np.float32)
    tilt = 1 - acquisition.gradient[0] * v - acquisition.gradient[1] * u
    off = (v - acquisition.centre[0]) ** 2 + (u - acquisition.centre[1]) ** 2
    light = acquisition.exposure * tilt * (1 - acquisition.vignette * off)
    signal = light * np.clip(1 + acquisition.contrast * phase_image, 0.05, None)
    noise = np.sqrt(signal / acquisition.electrons + acquisition.read_noise**2)
    signal += noise * rng.standard_normal(signal.shape, dtype=np.float32)
    return np.clip(np.rint(signal), 0, 255).astype(np.uint8)


def _rng(*key: object) -> np.random.Generator:
    """Returns the generator that belongs to a key, whatever else was drawn before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def write_sample(root, *, seed=0, channels_per_class=4, fields_per_channel=6, height=480, width=640):
    if root.exists(): return
    def job(a):
        line,c,f=a
        ch=draw_channel(_rng(seed,c))
        acq=draw_acquisition(_rng(seed,c,f))
        im=simulate_field(_rng(seed,line.name,c,f),line,ch,acq,height=height,width=width)
        d=root/line.name/f"channel_{c+1}"; d.mkdir(parents=True,exist_ok=True)
        Image.fromarray(im).save(d/f"field_{f+1:02d}.png")
    with ThreadPoolExecutor(2) as ex:
        list(ex.map(job,[(l,c,f) for l in CELL_LINES for c in range(channels_per_class) for f in range(fields_per_channel)]))
