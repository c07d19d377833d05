"""Whole runs on images that other programs would cut: weak 16-bit signals, and five channels."""

import numpy as np
import pytest
import tifffile

from jaxcells.data.images import read_image
from jaxcells.files import Workdir
from jaxcells.workflows.train import train_and_evaluate
from tests.data.folders import textured
from tests.workflows.test_train import make_config


def write_fields(root, channels, signal):
    """Two classes that differ in the texture of one channel, within the lowest 6 of 16 bits."""
    for number in range(18):
        for label, scale in (("coarse", 4), ("fine", 1)):
            seed = 1000 * scale + 10 * number
            noise = [textured(64, 64, seed + c) for c in range(channels)]
            noise[signal] = (
                textured(64 // scale, 64 // scale, seed).repeat(scale, 0).repeat(scale, 1)
            )
            path = root / label / f"field{number}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.stack(noise).astype(np.uint16) >> 2
            tifffile.imwrite(
                path, pixels.squeeze(), metadata={"axes": "CYX"[-pixels.squeeze().ndim :]}
            )
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "signal"), [(5, 3), (1, 0)])
def test_a_weak_signal_in_one_of_the_channels_is_learnt(tmp_path, channels, signal):
    images = write_fields(tmp_path / "images", channels, signal)
    config = make_config(images, optim__learning_rate=0.05, train__num_epochs=12)
    results = train_and_evaluate(config, Workdir(tmp_path / "run"))
    assert results.test.accuracy > 0.9
    assert results.data["image"] == {"shape": [32, 32, channels], "dtype": "uint16"}
    # Cut to 8 bits, as other programs do, nothing would be left of any image.
    for path in images.rglob("*.tif"):
        pixels = read_image(path)
        assert pixels.max() < 64
        assert not (pixels >> 8).any()
