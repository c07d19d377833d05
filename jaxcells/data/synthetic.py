"""The built-in sample: simulated label-free images of three cell lines in microfluidic channels.

A field is made as a microscope makes it. A map of optical phase (channel walls, cells, debris) is
filtered by the transfer function of a slightly defocused phase-contrast microscope, lit unevenly
and recorded by a camera with shot and read noise. The cell lines differ in the distributions of
size, nucleus, granules and membrane, which overlap as in life. Exposure, illumination, contrast,
focus, noise and density are drawn anew for every field from the same distributions for all lines,
so that the brightness of a crop and its spread say little about the line.

Lengths are pixels, phases radians, angles radians, brightness grey levels of an 8-bit camera.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from jaxcells.errors import Error

Array = np.ndarray

MARGIN = 40  # simulated around the field and cut off: cells cross its borders, filters wrap outside


@dataclass(frozen=True)
class CellLine:
    """What one simulated cell line looks like: medians over its cells.

    Attributes:
        name: folder name; says that the cells are simulated.
        diameter: of the cell.
        nucleus_ratio: diameter of the nucleus over that of the cell.
        granules: number of granules in a cell of median size; a cell has more if it is larger.
        granule_size: standard deviation of a granule's Gaussian profile.
        granule_phase: phase at the centre of a granule; its sign is random.
        membrane_width: standard deviation of the membrane's Gaussian profile.
        membrane_phase: phase at the crest of the membrane.
    """

    name: str
    diameter: float
    nucleus_ratio: float
    granules: float
    granule_size: float
    granule_phase: float
    membrane_width: float
    membrane_phase: float


CELL_LINES = (
    CellLine(
        name="sim-A",
        diameter=31.0,
        nucleus_ratio=0.70,
        granules=9.0,
        granule_size=1.2,
        granule_phase=0.45,
        membrane_width=1.0,
        membrane_phase=0.45,
    ),
    CellLine(
        name="sim-B",
        diameter=36.0,
        nucleus_ratio=0.52,
        granules=9.0,
        granule_size=1.9,
        granule_phase=0.55,
        membrane_width=1.3,
        membrane_phase=0.35,
    ),
    CellLine(
        name="sim-C",
        diameter=34.0,
        nucleus_ratio=0.60,
        granules=26.0,
        granule_size=1.1,
        granule_phase=0.45,
        membrane_width=1.8,
        membrane_phase=0.45,
    ),
)


@dataclass(frozen=True)
class Channel:
    """The walls of one microfluidic channel, which all of its fields share.

    Attributes:
        top: height at which the upper wall ends, at the middle of the field.
        bottom: height at which the lower wall begins, counted from the lower border.
        tilt: angle of the channel against the rows of the camera.
        edge: width over which a wall rises.
        phase: phase of the wall's material against the medium.
    """

    top: float
    bottom: float
    tilt: float
    edge: float
    phase: float


def draw_channel(rng: np.random.Generator) -> Channel:
    """Draws the geometry of one channel."""
    return Channel(
        top=rng.uniform(8, 26),
        bottom=rng.uniform(8, 26),
        tilt=rng.normal(0, 0.008),
        edge=rng.uniform(0.8, 1.6),
        phase=rng.uniform(0.8, 1.3),
    )


def _walls(channel: Channel, y: Array, x: Array, height: int, width: int) -> tuple[Array, Array]:
    """Returns the signed distances into the upper and the lower wall, [H, W]."""
    slope = (x - width / 2) * np.float32(channel.tilt)
    return channel.top + slope - y, y - (height - channel.bottom + slope)


def _place_cells(
    rng: np.random.Generator, line: CellLine, channel: Channel, height: int, width: int
) -> tuple[Array, Array, Array]:
    """Throws cells into the channel until it is full.

    Returns:
        Heights, columns and radii of the cells, [N] each; a few of them touch.
    """
    spread = rng.uniform(1.04, 1.30)
    scale = line.diameter / 2 * np.exp(rng.normal(0, 0.03))
    area = (height + 2 * MARGIN) * (width + 2 * MARGIN)
    tries = int(12 * area / line.diameter**2)
    ys = rng.uniform(-MARGIN, height + MARGIN, tries)
    xs = rng.uniform(-MARGIN, width + MARGIN, tries)
    radii = scale * np.exp(np.clip(rng.normal(0, 0.13, tries), -0.35, 0.35))
    gaps = np.where(rng.random(tries) < 0.12, 0.97, spread)
    upper, lower = _walls(channel, ys, xs, height, width)
    inside = np.maximum(upper, lower) < -radii - 2
    kept: list[int] = []
    for i in np.flatnonzero(inside):
        near = (ys[kept] - ys[i]) ** 2 + (xs[kept] - xs[i]) ** 2
        if not np.any(near < ((radii[kept] + radii[i]) * gaps[i]) ** 2):
            kept.append(i)
    return ys[kept], xs[kept], radii[kept]


def _spots(y: Array, x: Array, ys: Array, xs: Array, sizes: Array, phases: Array) -> Array:
    """Sums Gaussian spots: rows y [H], columns x [W], N spots -> [H, W] float32."""
    rows = np.exp(-0.5 * ((y - ys[:, None]) / sizes[:, None]) ** 2) * phases[:, None]
    cols = np.exp(-0.5 * ((x - xs[:, None]) / sizes[:, None]) ** 2)
    return rows.T.astype(np.float32) @ cols.astype(np.float32)


def _scatter(rng: np.random.Generator, count: int, inner: float, outer: float) -> Array:
    """Draws count points, uniform over a ring, as [2, count]."""
    radii = np.sqrt(rng.uniform(inner**2, outer**2, count))
    angles = rng.uniform(0, 2 * np.pi, count)
    return radii * np.stack([np.sin(angles), np.cos(angles)])


def _cell_phase(
    rng: np.random.Generator, line: CellLine, radius: float, y: Array, x: Array, flow: float
) -> Array:
    """Phase of one cell at rows y [H] and columns x [W] counted from its centre, [H, W] float32."""
    angle = flow + rng.normal(0, 0.4)
    stretch = np.exp(0.5 * abs(rng.normal(0.06, 0.08)))
    along = (np.cos(angle) * x[None, :] + np.sin(angle) * y[:, None]) / stretch
    across = (np.cos(angle) * y[:, None] - np.sin(angle) * x[None, :]) * stretch
    rho = np.hypot(along, across)
    theta = np.arctan2(across, along)
    edge = np.full_like(rho, radius)
    for order in (2, 3, 4, 5):
        edge += radius * rng.normal(0, 0.035 / (order - 1)) * np.cos(
            order * theta + rng.uniform(0, 2 * np.pi)
        ).astype(np.float32)
    depth = edge - rho

    body = np.sqrt(np.clip(1 - (rho / edge) ** 2, 0, None)) * rng.normal(0.75, 0.1)
    width = line.membrane_width * np.exp(rng.normal(0, 0.15))
    crest = line.membrane_phase * np.exp(rng.normal(0, 0.2))
    membrane = crest * np.exp(-0.5 * ((depth - width) / width) ** 2)

    ratio = np.clip(line.nucleus_ratio * np.exp(rng.normal(0, 0.09)), 0.3, 0.82)
    offset = _scatter(rng, 1, 0, (1 - ratio) * 0.7 * radius)[:, 0]
    wobble = np.exp(rng.normal(0, 0.06))
    nucleus_rho = np.hypot((y[:, None] - offset[0]) * wobble, (x[None, :] - offset[1]) / wobble)
    nucleus_depth = ratio * radius - nucleus_rho
    nucleus = 0.22 / (1 + np.exp(-np.clip(nucleus_depth / 0.9, -30, 30)))
    nucleus += 0.16 * np.exp(-0.5 * (nucleus_depth / 1.1) ** 2)

    nucleoli = offset[:, None] + _scatter(rng, rng.integers(1, 4), 0, 0.6 * ratio * radius)
    count = rng.poisson(line.granules * (2 * radius / line.diameter) ** 2 * rng.gamma(12, 1 / 12))
    granules = _scatter(rng, count, 0.25 * radius, 0.88 * radius)
    sizes = np.concatenate(
        [rng.uniform(1.6, 2.4, nucleoli.shape[1]), line.granule_size * rng.uniform(0.8, 1.25, count)]
    )
    phases = np.concatenate(
        [
            rng.uniform(0.2, 0.4, nucleoli.shape[1]),
            line.granule_phase * rng.uniform(0.5, 1.3, count) * rng.choice([-1, 1], count, p=[0.4, 0.6]),
        ]
    )
    centres = np.concatenate([nucleoli, granules], axis=1)
    spots = _spots(y, x, centres[0], centres[1], sizes, phases)
    return (body + membrane + nucleus + spots).astype(np.float32)


def _transfer(shape: tuple[int, int], defocus: float) -> Array:
    """Contrast transfer function of a defocused phase-contrast microscope for a weak phase object.

    See Born and Wolf, Principles of Optics, section 8.6.3, for the phase-contrast method, and Yin,
    Kanade and Chen, Medical Image Analysis 16 (2012) 1047, for the halo as the share of
    scattered light that passes through the phase ring.

    Args:
        shape: of the phase map.
        defocus: wavelength times distance from the focal plane, in square pixels.

    Returns:
        Real gain for each frequency of `np.fft.rfft2`, float32.
    """
    fy = np.fft.fftfreq(shape[0])[:, None]
    fx = np.fft.rfftfreq(shape[1])[None, :]
    f2 = (fy**2 + fx**2).astype(np.float32)
    ring = 0.97 * np.exp(-2 * (np.pi * 6.5) ** 2 * f2)
    aperture = np.exp(-2 * (np.pi * 0.75) ** 2 * f2)
    chi = np.pi * defocus * f2
    return (-np.cos(chi) * (1 - ring) + np.sin(chi)) * aperture * np.exp(-0.15*np.square(chi))


def simulate_field(
    rng: np.random.Generator,
    line: CellLine,
    channel: Channel,
    *,
    height: int = 480,
    width: int = 640,
) -> Array:
    """Simulates one field of view of a cell line flowing through a channel.

    Args:
        rng: source of everything that is drawn; the field is a function of its state.
        line: the cell line.
        channel: the channel's walls.
        height: rows of the field.
        width: columns of the field.

    Returns:
        [H, W] uint8.
    """
    y = np.arange(-MARGIN, height + MARGIN, dtype=np.float32)
    x = np.arange(-MARGIN, width + MARGIN, dtype=np.float32)
    shape = (y.size, x.size)

    focus = rng.normal(0, 2.0)
    planes = np.zeros((3, *shape), np.float32)  # three heights in the channel
    upper, lower = _walls(channel, y[:, None], x[None, :], height, width)
    inside = np.maximum(upper, lower)
    planes[1] += channel.phase / (1 + np.exp(-np.clip(inside / channel.edge, -30, 30)))
    planes[1] += 0.5*channel.phase * np.exp(-0.5 * ((inside - 7) / 1.3) ** 2)

    for cy, cx, radius in zip(*_place_cells(rng, line, channel, height, width), strict=True):
        reach = int(radius * 1.5) + 4
        top, left = int(cy) + MARGIN - reach, int(cx) + MARGIN - reach
        rows = slice(max(top, 0), top + 2 * reach)
        cols = slice(max(left, 0), left + 2 * reach)
        plane = rng.integers(3)
        planes[plane, rows, cols] += _cell_phase(
            rng, line, radius, y[rows] - np.float32(cy), x[cols] - np.float32(cx), channel.tilt
        )

    specks = rng.poisson(rng.gamma(2, 10))
    planes[rng.integers(3)] += _spots(
        y,
        x,
        rng.uniform(0, height, specks),
        rng.uniform(0, width, specks),
        rng.uniform(0.8, 1.8, specks),
        rng.uniform(-0.5, 1.2, specks),
    )

    contrast = 0
    for height_above, plane in zip((-3.5, 0.0, 3.5), planes, strict=True):
        contrast = contrast + np.fft.rfft2(plane) * _transfer(shape, focus + height_above)
    contrast = np.fft.irfft2(contrast, shape)[MARGIN:-MARGIN, MARGIN:-MARGIN]
    contrast = contrast * 0.55 * np.exp(rng.normal(0, 0.25))

    v = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    u = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    gradient = rng.normal(0, 0.10, 2)
    centre = rng.uniform(-0.4, 0.4, 2)
    light = 1 + gradient[0] * v + gradient[1] * u
    light = light * (1 - rng.uniform(0.03, 0.15) * ((v - centre[0]) ** 2 + (u - centre[1]) ** 2))
    signal = rng.uniform(95, 150) * light * np.clip(1 + contrast, 0.05, None)

    electrons_per_level = np.exp(rng.normal(np.log(12), 0.5))
    noise = rng.standard_normal(signal.shape, dtype=np.float32)
    signal = signal + noise * np.sqrt(signal / electrons_per_level + rng.uniform(0.5, 2.0) ** 2)
    return np.clip(np.rint(signal), 0, 255).astype(np.uint8)


def _rng(*key: object) -> np.random.Generator:
    """Returns the generator that belongs to a key, whatever else was drawn before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def write_sample(root, *, seed=0, channels_per_class=4, fields_per_channel=6, height=480, width=640):
    if root.exists(): return
    def job(a):
        line,c,f=a
        ch=draw_channel(_rng(seed,line.name,c))
        im=simulate_field(_rng(seed,line.name,c,f),line,ch,height=height,width=width)
        d=root/line.name/f"channel_{c+1}"; d.mkdir(parents=True,exist_ok=True)
        Image.fromarray(im).save(d/f"field_{f+1:02d}.png")
    with ThreadPoolExecutor(2) as ex:
        list(ex.map(job,[(l,c,f) for l in CELL_LINES for c in range(channels_per_class) for f in range(fields_per_channel)]))
