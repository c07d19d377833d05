import hashlib

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from jaxcells.data import sample
from jaxcells.data.parallel import parallel_map
from jaxcells.data.rng import named_generator
from jaxcells.data.sample import CELL_LINES, simulate_field, write_sample
from jaxcells.evaluation.baseline import crop_statistics, linear_classifier
from jaxcells.files import Error

SETTINGS = 10


@pytest.fixture(scope="module")
def fields():
    """Fields of all lines, each recorded with the same ten settings: [3, 10, H, W]."""
    jobs = [(line, number) for line in CELL_LINES for number in range(SETTINGS)]
    found = parallel_map(lambda job: simulate_field(0, *job, 1), jobs, title="fields")
    return np.stack(found).reshape(3, SETTINGS, 480, 640)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sample of 2 channels with 2 fields each."""
    root = tmp_path_factory.mktemp("sample") / "deeper" / "sample"
    write_sample(root, channels=2, fields=2)
    return root


def draw_crops(fields, size, per_field=12):
    """Crops [N, size, size, 1], labels [N] and settings [N]."""
    rng = np.random.default_rng(size)
    limits = (481 - size, 641 - size)
    places = [
        (*f, *rng.integers(limits)) for f in np.ndindex(3, SETTINGS) for _ in range(per_field)
    ]
    crops = [fields[k, n, y : y + size, x : x + size, None] for k, n, y, x in places]
    labels, settings, *_ = np.transpose(places)
    return np.stack(crops), labels, settings


def accuracy_of_brightness(crops, labels, test):
    statistics = crop_statistics(crops)
    found = linear_classifier(statistics[~test], labels[~test], statistics[test])
    return (found == labels[test]).mean()


@pytest.mark.parametrize("size", [100, 200])
def test_mean_and_deviation_do_not_give_the_line_away(fields, size):
    crops, labels, settings = draw_crops(fields, size)
    # Holding out the same settings for all lines: otherwise the balance of the experiment would
    # push a learner of settings below chance, and hide a line that is brighter than the others.
    test = settings % 3 == 0
    assert accuracy_of_brightness(crops, labels, test) < 0.5
    shuffled = np.random.default_rng(0).permutation(SETTINGS * 3).reshape(3, SETTINGS) % 3 == 0
    test = shuffled[labels, settings]
    assert accuracy_of_brightness(crops, labels, test) < 0.6


def test_lines_are_equally_bright_and_contrasted(fields):
    crops, labels, settings = draw_crops(fields, 100, per_field=40)
    statistics = np.stack([crops.mean(axis=(1, 2, 3)), np.log(crops.std(axis=(1, 2, 3)))])
    by_line = [statistics[:, labels == k].mean(axis=1) for k in range(3)]
    by_settings = [statistics[:, settings == n].mean(axis=1) for n in range(SETTINGS)]
    assert np.all(np.ptp(by_line, axis=0) < (2.0, 0.04))  # grey levels, and 4 %
    assert np.all(np.std(by_settings, axis=0) > (6.0, 0.12))


def texture(crops):
    """Shape of the grey values at three scales, blind to brightness and contrast, [N, 5]."""
    pixels = crops[..., 0].astype(float)
    smooth = [gaussian_filter(pixels, (0, scale, scale)) for scale in (0, 1, 2, 4)]
    detail = np.diff(smooth, axis=0)[:, :, 8:-8, 8:-8]
    power = (detail**2).mean(axis=(2, 3))
    skewness = (detail**3).mean(axis=(2, 3)) / power**1.5
    return np.concatenate([np.diff(np.log(power), axis=0), skewness]).T


def test_texture_tells_the_lines_apart(fields):
    crops, labels, settings = draw_crops(fields, 100)
    features, test = texture(crops), settings % 3 == 0
    classifier = LinearDiscriminantAnalysis().fit(features[~test], labels[~test])
    assert classifier.score(features[test], labels[test]) > 0.9


def test_bright_pixels_are_noisier_and_settings_change_the_noise():
    phase, deviations = np.linspace(-1, 1, 640) * np.ones((480, 1)), []
    for number in range(20):
        one, other = (
            sample._record(named_generator(number), named_generator(number, rng), phase)
            for rng in ("one", "other")
        )
        noise = (one.astype(float) - other) / 2**0.5
        assert noise[:, :320].std() < noise[:, 320:].std()
        deviations.append(noise.std())
    assert 1.2 < min(deviations) < 2.2 < 3 < max(deviations) < 5


def test_lines_share_walls_and_settings(monkeypatch):
    monkeypatch.setattr(sample, "_place_cells", lambda *arguments: [])

    def rows(line, channel, field):
        return simulate_field(0, CELL_LINES[line], channel, field).mean(axis=1)

    assert np.abs(rows(0, 1, 1) - rows(1, 1, 1)).max() < 2  # debris and noise
    assert np.abs(rows(0, 1, 1) - rows(0, 1, 2)).max() > 10
    monkeypatch.setattr(sample, "_record", lambda settings, rng, phase: phase)
    correlation = np.corrcoef([rows(0, 1, 1), rows(0, 1, 2), rows(0, 2, 1)])
    assert correlation[0, 1] > 0.9 > 0.7 > correlation[0, 2]


def pixels_below(root):
    return {
        path.relative_to(root).as_posix(): np.asarray(Image.open(path)).tobytes()
        for path in sorted(root.rglob("*.png"))
    }


def test_sample_has_the_folders_and_images_asked_for(whole):
    assert list(pixels_below(whole)) == [
        f"sim-{line}/channel_{channel}/field_{field:02d}.png"
        for line in "ABC"
        for channel in (1, 2)
        for field in (1, 2)
    ]
    with Image.open(whole / "sim-A" / "channel_1" / "field_01.png") as image:
        assert (image.mode, image.size) == ("L", (640, 480))
    assert [path.name for path in whole.parent.iterdir()] == ["sample"]
    assert "seed 0, 3 lines x 2 channels x 2 fields" in (whole / "SOURCE.md").read_text()


def test_a_field_depends_on_seed_line_channel_and_number_alone(whole, tmp_path):
    pixels = pixels_below(whole)
    write_sample(tmp_path / "one", channels=1, fields=1)
    write_sample(tmp_path / "other", seed=1, channels=1, fields=1)
    assert pixels_below(tmp_path / "one").items() <= pixels.items()
    assert len(set(pixels.values()) | set(pixels_below(tmp_path / "other").values())) == 12 + 3


def test_pixels_are_those_of_every_machine(whole):
    """Where this fails by a change of the simulation, raise `sample._VERSION` and set these."""
    found = [
        hashlib.sha256(pixels_below(whole)[f"sim-{line}/channel_1/field_01.png"]).hexdigest()[:16]
        for line in "AB"
    ]
    assert (sample._VERSION, found) == (2, ["176cd1d7e4cc74bc", "f0c201a439f471ab"])


def test_a_whole_sample_is_left_as_it_is_and_no_other_folder_touched(whole, monkeypatch):
    monkeypatch.setattr(sample, "simulate_field", None)  # writing again would raise
    write_sample(whole, channels=2, fields=2)
    refused = "is not the whole sample of this version, seed and size; delete the folder"
    with pytest.raises(Error, match=refused):
        write_sample(whole, seed=1, channels=2, fields=2)
    with pytest.raises(Error, match=refused):
        write_sample(whole.parent)
    field = whole / "sim-B" / "channel_1" / "field_02.png"
    field.rename(field.with_suffix(".away"))
    with pytest.raises(Error, match=refused):
        write_sample(whole, channels=2, fields=2)
    field.with_suffix(".away").rename(field)
    monkeypatch.setattr(sample, "_VERSION", sample._VERSION + 1)
    with pytest.raises(Error, match=refused):
        write_sample(whole, channels=2, fields=2)


def test_interrupted_writing_leaves_nothing_that_passes_for_a_sample(tmp_path, monkeypatch):
    written = []

    def save_some(image, path):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)

    monkeypatch.setattr(Image.Image, "save", save_some)
    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path / "sample", channels=1)
    assert len(written) == 3
    assert not (tmp_path / "sample").exists()
