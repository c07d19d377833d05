"""Noise to write into images, and what every test of reading them asks."""

import numpy as np
import pytest

from jaxcells.data.images import ImageError, inspect_image, read_image


def random_pixels(shape, dtype="uint8", seed=0):
    """Noise that uses the whole range of the type; float32 of both signs."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(0, 1e3, shape).astype(dtype)
    return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def assert_reads(path, expected, *, plane="", notes=()):
    """The pixels, the promises about the array, and that the header alone says the same."""
    pixels = read_image(path, plane=plane)
    np.testing.assert_array_equal(pixels, expected, strict=True)
    assert pixels.dtype.isnative
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    info = inspect_image(path, plane=plane)
    assert (info.height, info.width, info.channels) == expected.shape
    assert info.dtype == expected.dtype.name
    assert len(info.notes) == len(notes), info.notes
    for note, words in zip(info.notes, notes, strict=True):
        assert words in note


def assert_refused(path, *words, plane="", inspect=True):
    """One line, beginning with the path, with these words; from the header too unless told."""
    for function in (read_image, inspect_image) if inspect else (read_image,):
        with pytest.raises(ImageError) as caught:
            function(path, plane=plane)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        for word in words:
            assert word in message.removeprefix(f"{path}: "), message
