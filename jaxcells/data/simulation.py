"""Simulated label-free images of cells in a microfluidic channel, in NumPy.

A field is made as a microscope makes it. A map of optical phase (channel walls, cells, debris) is
filtered by the transfer function of a slightly defocused phase-contrast microscope, lit unevenly
and recorded by a camera with shot and read noise.

Lengths are in pixels, phases and angles in radians, brightness in grey levels of 8 bits.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]

# Simulated around a field and cut off: cells cross its borders, and the filter wraps around there.
_MARGIN = 40


@dataclasses.dataclass(frozen=True)
class CellLine:
    """What a simulated cell line looks like: medians over its cells.

    Attributes:
      name: folder of the line; says that its cells are simulated.
      diameter: of a cell.
      nucleus_ratio: diameter of the nucleus over that of the cell.
      granules: number in a cell of median diameter; it grows with the area of the cell.
      granule_size: standard deviation of a granule's Gaussian profile.
      granule_phase: phase at the centre of a granule.
      vacuoles: share of the granules whose phase is negative: they shine.
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


@dataclasses.dataclass(frozen=True)
class Channel:
    """The walls of a microfluidic channel, which all of its fields share.

    Attributes:
      top: how far the upper wall reaches into the field, at the middle column.
      bottom: how far the lower wall reaches into the field.
      tilt: angle of the walls against the rows of the camera.
      edge: length over which a wall rises.
      phase: of the walls' material against the medium.
    """

    top: float
    bottom: float
    tilt: float
    edge: float
    phase: float


@dataclasses.dataclass(frozen=True)
class Acquisition:
    """How a field is recorded and how full it is: what differs from field to field.

    Attributes:
      exposure: grey level of the background.
      gradient: relative fall of the light from the middle to the lower and to the right border.
      vignette: relative fall of the light half a side away from `center`.
      center: of the vignette, row and column in units of half a side.
      contrast: factor of the phase image.
      defocus: wavelength times distance of the focal plane, in square pixels.
      crowding: least distance of two cells over the sum of their radii.
      specks: number of specks of debris.
      electrons: per grey level; they make the shot noise.
      read_noise: standard deviation in grey levels.
    """

    exposure: float
    gradient: tuple[float, float]
    vignette: float
    center: tuple[float, float]
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
    """Draws the settings of one recording."""
    return Acquisition(
        exposure=rng.uniform(90, 150),
        gradient=(rng.normal(0, 0.1), rng.normal(0, 0.1)),
        vignette=rng.uniform(0.03, 0.15),
        center=(rng.uniform(-0.4, 0.4), rng.uniform(-0.4, 0.4)),
        contrast=math.exp(rng.uniform(-0.35, 0.35)),
        defocus=rng.uniform(-1.2, 1.2),
        crowding=rng.uniform(1.02, 1.2),
        specks=int(rng.poisson(rng.gamma(2, 10))),
        electrons=20 * math.exp(rng.uniform(-0.8, 0.8)),
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
) -> npt.NDArray[np.uint8]:
    """Simulates one field of view of a cell line that flows through a channel.

    Args:
      rng: draws the cells, the debris and the noise.
      line: the cell line.
      channel: the walls of the channel.
      acquisition: the settings of the recording.
      height: rows of the field.
      width: columns of the field.

    Returns:
      [H, W] uint8.
    """
    y = np.arange(-_MARGIN, height + _MARGIN, dtype=np.float32)
    x = np.arange(-_MARGIN, width + _MARGIN, dtype=np.float32)
    rise = channel.tilt * (x - width / 2)
    into_wall = np.maximum(
        channel.top + rise - y[:, None], y[:, None] - rise - (height - channel.bottom)
    )

    # Cells flow at three heights, and the microscope focuses near the middle one.
    defocus = [acquisition.defocus + height for height in (-2.5, 0.0, 2.5)]
    # float64: NumPy transforms it two to three times as fast as float32.
    planes = np.zeros((3, y.size, x.size))
    planes[1] = _wall_phase(channel, into_wall)
    for row, column, radius in _place_cells(rng, line, acquisition.crowding, into_wall):
        reach = math.ceil(1.3 * radius) + 4
        rows = slice(max(row - reach, 0), row + reach)
        columns = slice(max(column - reach, 0), column + reach)
        planes[rng.integers(3), rows, columns] += _cell_phase(
            rng, line, radius, y[rows] - y[row], x[columns] - x[column], channel.tilt
        )
    planes[rng.integers(3)] += _spots(
        y,
        x,
        rng.uniform((0, 0), (height, width), (acquisition.specks, 2)).T,
        rng.uniform(0.8, 1.8, acquisition.specks),
        rng.uniform(-0.5, 1.2, acquisition.specks),
    )
    spectrum = np.zeros((y.size, x.size // 2 + 1), np.complex128)
    for plane, depth in zip(planes, defocus, strict=True):
        spectrum += np.fft.rfft2(plane) * _transfer(y.size, x.size, depth)
    phase_image = np.fft.irfft2(spectrum, planes[0].shape)[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    return _record(rng, acquisition, phase_image.astype(np.float32))


def _wall_phase(channel: Channel, into_wall: FloatArray) -> FloatArray:
    """Phase of the walls at each distance into them: a step, and a shallow ridge behind it."""
    step = 1 / (1 + np.exp(-np.clip(into_wall / channel.edge, -30, 30)))
    ridge = 0.5 * np.exp(-0.5 * ((into_wall - 7) / 1.3) ** 2)
    return channel.phase * (step + ridge)


def _place_cells(
    rng: np.random.Generator, line: CellLine, crowding: float, into_wall: FloatArray
) -> list[tuple[int, int, float]]:
    """Throws cells into the channel until it is full; some of them touch.

    Returns:
      Row and column on the map `into_wall`, and radius, of each cell.
    """
    height, width = into_wall.shape
    tries = round(12 * height * width / line.diameter**2)
    rows, columns = rng.integers(height, size=tries), rng.integers(width, size=tries)
    spread = np.clip(rng.normal(0, 0.13, tries), -0.35, 0.35) + rng.normal(0, 0.03)
    radii = 0.5 * line.diameter * np.exp(spread)
    closeness = np.where(rng.random(tries) < 0.1, 0.97, crowding)
    free = into_wall[rows, columns] < -radii
    cells = []
    for i in range(tries):
        if free[i]:
            cells.append((int(rows[i]), int(columns[i]), float(radii[i])))
            squared = (rows - rows[i]) ** 2 + (columns - columns[i]) ** 2
            free &= squared > (closeness * (radii + radii[i])) ** 2
    return cells


def _cell_phase(
    rng: np.random.Generator,
    line: CellLine,
    radius: float,
    y: FloatArray,
    x: FloatArray,
    flow: float,
) -> FloatArray:
    """Phase of one cell at the rows y [H] and columns x [W] counted from its centre: [H, W]."""
    angle = flow + rng.normal(0, 0.4)
    sin, cos = math.sin(angle), math.cos(angle)
    stretch = math.exp(0.5 * abs(rng.normal(0.06, 0.08)))
    along = (cos * x + sin * y[:, None]) / stretch
    across = (cos * y[:, None] - sin * x) * stretch
    distance, bearing = np.sqrt(along**2 + across**2), np.arctan2(across, along)
    edge = np.full_like(distance, radius)
    for order in (2, 3, 4):
        wave = rng.normal(0, 0.035 / (order - 1))
        edge += radius * wave * np.cos(order * bearing + rng.uniform(0, 2 * math.pi))
    body = rng.normal(0.75, 0.1) * np.sqrt(np.clip(1 - (distance / edge) ** 2, 0, None))

    width = line.membrane_width * math.exp(rng.normal(0, 0.15))
    crest = line.membrane_phase * math.exp(rng.normal(0, 0.2))
    membrane = crest * np.exp(-0.5 * ((edge - distance - width) / width) ** 2)

    ratio = min(line.nucleus_ratio * math.exp(rng.normal(0, 0.09)), 0.82)
    nucleus_radius = ratio * radius
    center = _scatter(rng, 1, 0, 0.7 * (radius - nucleus_radius))
    squeeze = math.exp(rng.normal(0, 0.06))
    rows = (y[:, None] - float(center[0, 0])) * squeeze
    columns = (x - float(center[1, 0])) / squeeze
    depth = nucleus_radius - np.sqrt(rows**2 + columns**2)
    nucleus = 0.22 / (1 + np.exp(-np.clip(depth / 0.9, -30, 30)))
    envelope = 0.16 * np.exp(-0.5 * (depth / 1.1) ** 2)

    count = int(rng.integers(1, 4))
    nucleoli = _spots(
        y,
        x,
        center + _scatter(rng, count, 0, 0.6 * nucleus_radius),
        rng.uniform(1.6, 2.4, count),
        rng.uniform(0.2, 0.4, count),
    )
    mean = line.granules * (2 * radius / line.diameter) ** 2
    count = int(rng.poisson(mean * rng.gamma(12, 1 / 12)))
    granules = _spots(
        y,
        x,
        _scatter(rng, count, 0.25 * radius, 0.88 * radius),
        line.granule_size * rng.uniform(0.8, 1.25, count),
        line.granule_phase
        * rng.uniform(0.5, 1.3, count)
        * np.where(rng.random(count) < line.vacuoles, -1, 1),
    )
    return body + membrane + nucleus + envelope + nucleoli + granules


def _scatter(rng: np.random.Generator, count: int, inner: float, outer: float) -> FloatArray:
    """Draws points uniform over a ring around the origin: rows and columns, [2, N]."""
    distance = np.sqrt(rng.uniform(inner**2, outer**2, count))
    bearing = rng.uniform(0, 2 * math.pi, count)
    return distance * np.stack([np.sin(bearing), np.cos(bearing)])


def _spots(
    y: FloatArray, x: FloatArray, centers: FloatArray, sizes: FloatArray, phases: FloatArray
) -> FloatArray:
    """Sums Gaussian spots at centers [2, N] on the rows y [H] and columns x [W]: [H, W] float32."""
    rows, columns, sizes, phases = (
        a.astype(np.float32)[:, None] for a in (*centers, sizes, phases)
    )
    vertical = phases * np.exp(-0.5 * ((y - rows) / sizes) ** 2)
    horizontal = np.exp(-0.5 * ((x - columns) / sizes) ** 2)
    # Not a matrix product: BLAS would set threads of its own against those that write fields.
    return np.einsum("nh,nw->hw", vertical, horizontal)


def _transfer(height: int, width: int, defocus: float) -> FloatArray:
    """Transfer function of a defocused phase-contrast microscope for a weak phase object.

    In focus, phase shows with negative sign (dark cells), less the smooth part of it that passes
    through the phase ring and so makes the halo. Out of focus it shows as in bright field too, by
    Fresnel diffraction. See Born and Wolf, Principles of Optics, sec. 8.6.3, and for the halo Yin,
    Kanade and Chen, Medical Image Analysis 16 (2012) 1047.

    Args:
      height: rows of the phase map.
      width: columns of the phase map.
      defocus: wavelength times distance from the focal plane, in square pixels.

    Returns:
      Real gain at each frequency of `np.fft.rfft2`, float32.
    """
    squared = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width) ** 2
    squared = squared.astype(np.float32)
    ring = 0.97 * np.exp(-2 * (math.pi * 6.5) ** 2 * squared)
    aperture = np.exp(-2 * (math.pi * 0.75) ** 2 * squared)
    chi = math.pi * defocus * squared
    coherence = np.exp(-0.15 * chi**2)
    return (np.sin(chi) - np.cos(chi) * (1 - ring)) * aperture * coherence


def _record(
    rng: np.random.Generator, acquisition: Acquisition, phase_image: FloatArray
) -> npt.NDArray[np.uint8]:
    """Lights a phase image [H, W] and records it."""
    height, width = phase_image.shape
    v = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    u = np.linspace(-1, 1, width, dtype=np.float32)
    gradient = 1 - acquisition.gradient[0] * v - acquisition.gradient[1] * u
    squared = (v - acquisition.center[0]) ** 2 + (u - acquisition.center[1]) ** 2
    light = acquisition.exposure * gradient * (1 - acquisition.vignette * squared)
    signal = light * np.clip(1 + acquisition.contrast * phase_image, 0.05, None)
    noise = np.sqrt(signal / acquisition.electrons + acquisition.read_noise**2)
    signal = signal + noise * rng.standard_normal(signal.shape, dtype=np.float32)
    return np.clip(np.rint(signal), 0, 255).astype(np.uint8)
