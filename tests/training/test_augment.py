import jax
import numpy as np
import pytest

from jaxcells.training.augment import augment


def images(num, height, width, channels=2):
    return np.random.default_rng(0).standard_normal((num, height, width, channels), np.float32)


def symmetries(image):
    """Flips and quarter turns of one [H, W, C] image, by NumPy."""
    return [np.rot90(flipped, k) for flipped in (image, image[:, ::-1]) for k in range(4)]


def test_off_changes_nothing():
    batch = images(3, 5, 5)
    np.testing.assert_array_equal(augment(batch, jax.random.key(0)), batch)


def test_dihedral_draws_each_of_the_eight_symmetries_equally_often():
    batch = images(800, 3, 3)
    out = np.asarray(augment(batch, jax.random.key(1), dihedral=True))
    drawn = [
        [np.array_equal(after, symmetry) for symmetry in symmetries(before)]
        for before, after in zip(batch, out, strict=True)
    ]
    assert np.array_equal(np.sum(drawn, axis=1), np.ones(800))
    # 100 each are expected, with a deviation of 9.4.
    assert np.all(np.abs(np.sum(drawn, axis=0) - 100) < 40)


def test_dihedral_keeps_the_shape_of_images_that_are_not_square():
    batch = images(200, 3, 4)
    out = np.asarray(augment(batch, jax.random.key(1), dihedral=True))
    drawn = [
        [np.array_equal(a, b[::y, ::x]) for y in (1, -1) for x in (1, -1)]
        for b, a in zip(batch, out, strict=True)
    ]
    assert np.array_equal(np.sum(drawn, axis=1), np.ones(200))
    assert np.all(np.sum(drawn, axis=0) > 25)


def test_intensity_is_one_gain_and_one_offset_for_each_image():
    batch = images(200, 4, 4)
    out = np.asarray(augment(batch, jax.random.key(2), intensity=0.2))
    fits = [np.polyfit(b.ravel(), a.ravel(), 1) for b, a in zip(batch, out, strict=True)]
    for (gain, offset), before, after in zip(fits, batch, out, strict=True):
        np.testing.assert_allclose(after, gain * before + offset, atol=1e-5)
    gains, offsets = np.transpose(fits)
    for values in (gains - 1, offsets):
        assert np.all(np.abs(values) <= 0.2 + 1e-5)
        assert values.min() < -0.15
        assert values.max() > 0.15
    assert abs(np.corrcoef(gains, offsets)[0, 1]) < 0.3


@pytest.mark.parametrize("kind", [{"dihedral": True}, {"intensity": 0.1}])
def test_the_key_alone_decides(kind):
    batch = images(20, 4, 4)
    first, again = (augment(batch, jax.random.key(3), **kind) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, augment(batch, jax.random.key(4), **kind))
