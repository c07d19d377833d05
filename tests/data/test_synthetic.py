import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcells import Error
from jaxcells.data import simulation, synthetic
from jaxcells.data.parallel import parallel_map
from jaxcells.data.rng import named_generator
from jaxcells.data.simulation import draw_acquisition, draw_channel, simulate_field
from jaxcells.data.synthetic import CELL_LINES
from jaxcells.evaluation.baseline import mean_std_baseline

SMALL = {"height": 120, "width": 160}


def simulate(line, number, *, seed=0, **settings):
    acquisition = draw_acquisition(named_generator(seed, "acquisition", number))
    return simulate_field(
        named_generator(seed, line.name, number),
        line,
        draw_channel(named_generator(seed, "channel", number)),
        dataclasses.replace(acquisition, **settings),
    )


@pytest.fixture(scope="module")
def fields():
    """Fields of all lines, each recorded with the same ten settings: [3, 10, H, W]."""
    jobs = [(line, number) for line in CELL_LINES for number in range(10)]
    found = parallel_map(lambda job: simulate(*job), jobs, title="fields")
    return np.stack(found).reshape(3, 10, 480, 640)


def draw_crops(fields, size, per_field=12):
    """Crops [N, size, size, 1], labels [N] and settings [N]."""
    rng = np.random.default_rng(size)
    crops, labels, settings = [], [], []
    for label, number in np.ndindex(fields.shape[:2]):
        for _ in range(per_field):
            y, x = rng.integers(480 - size + 1), rng.integers(640 - size + 1)
            crops.append(fields[label, number, y : y + size, x : x + size, None])
            labels.append(label)
            settings.append(number)
    return np.stack(crops), np.array(labels), np.array(settings)


@pytest.mark.parametrize("size", [100, 200])
def test_mean_and_deviation_do_not_give_the_line_away(fields, size):
    crops, labels, settings = draw_crops(fields, size)
    # Holding out the same settings for all lines: otherwise the balance of the experiment would
    # push a learner of settings below chance, and hide a line that is brighter than the others.
    test = settings % 3 == 0
    accuracy = mean_std_baseline(crops[~test], labels[~test], crops[test], labels[test])
    assert accuracy < 0.5
    shuffled = np.random.default_rng(0).permutation(10 * 3).reshape(3, 10) % 3 == 0
    test = shuffled[labels, settings]
    assert mean_std_baseline(crops[~test], labels[~test], crops[test], labels[test]) < 0.6


def test_lines_are_equally_bright_and_contrasted(fields):
    crops, labels, settings = draw_crops(fields, 100, per_field=40)
    means = crops.mean(axis=(1, 2, 3))
    deviations = np.log(crops.std(axis=(1, 2, 3)))
    by_line = [(means[labels == k].mean(), deviations[labels == k].mean()) for k in range(3)]
    brightness, contrast = np.ptp(by_line, axis=0)
    assert brightness < 2.0  # grey levels
    assert contrast < 0.06
    between_settings = [deviations[settings == number].mean() for number in range(10)]
    assert np.std(between_settings) > 3 * contrast
    assert np.std([means[settings == number].mean() for number in range(10)]) > 5


def texture(crops):
    """Shape of the grey values at three scales, blind to brightness and contrast, [N, 6]."""
    features = []
    smooth = crops[..., 0].astype(np.float64)
    for _ in range(3):
        coarse = smooth
        for axis in (1, 2):
            coarse = (np.roll(coarse, 1, axis) + 2 * coarse + np.roll(coarse, -1, axis)) / 4
        for axis in (1, 2):
            coarse = (np.roll(coarse, 2, axis) + 2 * coarse + np.roll(coarse, -2, axis)) / 4
        detail = (smooth - coarse)[:, 4:-4, 4:-4]
        power = (detail**2).mean(axis=(1, 2))
        features += [np.log(power), (detail**3).mean(axis=(1, 2)) / power**1.5]
        smooth = coarse
    features = np.stack(features, axis=1)
    features[:, 0] -= features[:, 2]
    features[:, 2] -= features[:, 4]
    return np.delete(features, 4, axis=1)


def test_texture_tells_the_lines_apart(fields):
    crops, labels, settings = draw_crops(fields, 100)
    features, test = texture(crops), settings % 3 == 0
    center = np.stack([features[~test & (labels == k)].mean(axis=0) for k in range(3)])
    within = np.cov((features - center[labels])[~test].T)
    directions = np.linalg.solve(within, center.T)
    scores = features @ directions - 0.5 * (center.T * directions).sum(axis=0)
    assert (scores.argmax(axis=1) == labels)[test].mean() > 0.8


def test_nearly_every_100_pixel_crop_holds_a_whole_cell():
    rng = np.random.default_rng(0)
    open_channel = np.full((480, 640), -100.0)
    for line in CELL_LINES:
        cells = simulation._place_cells(rng, line, 1.2, open_channel)  # as sparse as it gets
        rows, columns, radii = np.array(cells).T
        assert 0.8 < 2 * np.median(radii) / line.diameter < 1.1
        hits = 0
        for _ in range(500):
            y, x = rng.uniform(0, 380), rng.uniform(0, 540)
            inside = (rows - radii > y) & (rows + radii < y + 100)
            hits += np.any(inside & (columns - radii > x) & (columns + radii < x + 100))
        assert hits > 460


def test_walls_frame_the_field():
    """The first and last rows lie in a wall, where no cell is: less detail than in the middle."""
    field = simulate(CELL_LINES[1], 0, contrast=1.0, electrons=1e6, read_noise=0.1, specks=0)
    along_rows = np.abs(np.diff(field.astype(float), axis=1)).mean(axis=1)
    assert along_rows[:6].max() < 0.3 * along_rows[100:380].mean()
    assert along_rows[-6:].max() < 0.3 * along_rows[100:380].mean()


def test_noise_follows_the_settings():
    quiet, noisy = (
        simulate(CELL_LINES[0], 0, electrons=1e9, read_noise=sigma).astype(float)
        for sigma in (0.0, 3.0)
    )
    assert np.std(noisy - quiet) == pytest.approx(3.0, rel=0.05)  # and rounding, twice


def pixels_below(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*.png"))}


def test_sample_has_the_folders_and_images_asked_for(tmp_path):
    root = tmp_path / "deeper" / "sample"
    synthetic.write_sample(root, channels_per_class=2, fields_per_channel=3, **SMALL)
    names = list(pixels_below(root))
    assert names == [
        f"{line}/channel_{channel}/field_{field:02d}.png"
        for line in ("sim-A", "sim-B", "sim-C")
        for channel in (1, 2)
        for field in (1, 2, 3)
    ]
    for name in names:
        with Image.open(root / name) as image:
            assert (image.mode, image.size) == ("L", (160, 120))
            assert np.ptp(np.asarray(image)) > 20
    assert [path.name for path in root.parent.iterdir()] == ["sample"]
    assert "seed 0, 3 cell lines x 2 channels x 3 fields" in (root / "SOURCE.md").read_text()


def test_a_field_depends_on_seed_line_channel_and_number_alone(tmp_path):
    sizes = {"one": (0, 1, 1), "many": (0, 2, 2), "again": (0, 2, 2), "other": (1, 2, 2)}
    samples = {}
    for name, (seed, channels, fields) in sizes.items():
        synthetic.write_sample(
            tmp_path / name,
            seed=seed,
            channels_per_class=channels,
            fields_per_channel=fields,
            **SMALL,
        )
        samples[name] = pixels_below(tmp_path / name)
    assert samples["many"] == samples["again"]
    assert samples["one"].items() <= samples["many"].items()
    assert len(samples["one"]) == 3
    assert not set(samples["other"].values()) & set(samples["many"].values())
    assert len(set(samples["many"].values())) == 12


def test_lines_share_channels_and_settings_but_no_cells(tmp_path, monkeypatch):
    drawn = {}

    def record(rng, line, channel, acquisition, *, height, width):
        pixels = np.full((height, width), len(drawn), np.uint8)
        drawn[len(drawn)] = (rng.random(), line.name, channel, acquisition)
        return pixels

    monkeypatch.setattr(synthetic, "simulate_field", record)
    monkeypatch.setattr(synthetic, "parallel_map", lambda write, names, title: [*map(write, names)])
    for seed in (0, 1):
        synthetic.write_sample(
            tmp_path / str(seed), seed=seed, channels_per_class=2, fields_per_channel=2, **SMALL
        )
    cells, lines, channels, settings = zip(*drawn.values(), strict=True)
    assert len(set(cells)) == 2 * 3 * 2 * 2
    assert lines == ("sim-A",) * 4 + ("sim-B",) * 4 + ("sim-C",) * 4 + lines[:12]
    assert channels[:4] == channels[4:8] == channels[8:12]
    assert channels[0] == channels[1] != channels[2] == channels[3]
    assert settings[:4] == settings[4:8] == settings[8:12]
    assert len(set(settings)) == 2 * 4
    assert len(set(channels)) == 2 * 2


def test_a_whole_sample_is_left_as_it_is(tmp_path, monkeypatch):
    root = tmp_path / "sample"
    settings = {"channels_per_class": 1, "fields_per_channel": 2, **SMALL}
    synthetic.write_sample(root, **settings)
    monkeypatch.setattr(synthetic, "simulate_field", None)  # writing again would raise
    synthetic.write_sample(root, **settings)

    with pytest.raises(Error, match=r"sample: exists, but is not the built-in sample of this seed"):
        synthetic.write_sample(root, seed=1, **settings)
    (root / "sim-B" / "channel_1" / "field_02.png").unlink()
    missing = r"lacks 1 of the sample's 6 fields, such as sim-B/channel_1/field_02\.png; remove it"
    with pytest.raises(Error, match=missing):
        synthetic.write_sample(root, **settings)


def test_a_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("notes")
    with pytest.raises(Error, match="is not the built-in sample"):
        synthetic.write_sample(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")])
def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch, interruption):
    written: list[Path] = []
    save = Image.Image.save

    def save_some(image, path):
        if len(written) >= 3:
            raise interruption
        written.append(path)
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", save_some)
    with pytest.raises((KeyboardInterrupt, OSError)):
        synthetic.write_sample(tmp_path / "sample", channels_per_class=1, **SMALL)
    assert len(written) >= 3
    assert not list(tmp_path.iterdir())
