import jax
import numpy as np
import pytest

from jaxcells.training.augment import augment


def images(num, height, width, channels=2):
    return np.random.default_rng(0).standard_normal((num, height, width, channels), np.float32)


@pytest.mark.parametrize(("width", "expected"), [(3, [100] * 8), (4, [200, 0] * 4)])
def test_dihedral_draws_each_symmetry_that_keeps_the_shape_equally_often(width, expected):
    batch = images(800, 3, width)
    out = np.asarray(augment(batch, jax.random.key(1), dihedral=True))
    drawn = [
        [np.array_equal(after, np.rot90(flip, k)) for flip in (b, b[:, ::-1]) for k in range(4)]
        for b, after in zip(batch, out, strict=True)
    ]
    assert np.array_equal(np.sum(drawn, axis=1), np.ones(800))
    # The deviation is 9.4 and 12.2.
    np.testing.assert_allclose(np.sum(drawn, axis=0), expected, atol=45)
    assert not np.array_equal(out, augment(batch, jax.random.key(2), dihedral=True))


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
    assert not np.array_equal(out, augment(batch, jax.random.key(3), intensity=0.2))
