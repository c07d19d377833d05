"""Tensors made from their names alone, so that a reference need not carry weights.

`tools/make_parity_reference.py` gives them to torchvision's networks and saves what comes out;
`test_parity.py` gives the same to ours. Names, shapes and axes are torchvision's.
"""

import hashlib

import numpy as np

SIZES = (200, 224)
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
NUM_CLASSES = 1000
_NUM_SAMPLES = 256

# Keeps activations of order one to the end of 152 layers although the running statistics are not
# those of the data: a branch adds less than a fifth of the variance of its input.
_RANGES = {
    "weight": (0.3, 0.8),
    "bias": (-0.2, 0.2),
    "running_mean": (-0.3, 0.3),
    "running_var": (0.5, 1.5),
}


def seeded_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the float32 values of the tensor `name` of a torchvision ResNet."""
    if len(shape) > 1:  # a kernel [O, I, ...]
        gain = 2.0 if len(shape) == 4 else 1.0  # what a ReLU before it takes away; none before fc
        bound = np.sqrt(3.0 * gain / np.prod(shape[1:]))
        low, high = -bound, bound
    else:
        low, high = _RANGES[name.rpartition(".")[2]]
    return (low + (high - low) * _uniform(name, shape)).astype(np.float32)


def seeded_image(size: int) -> np.ndarray:
    """Returns one image, float32 `[1, 3, size, size]`, of mean 0 and variance 1."""
    bound = np.sqrt(3.0)
    uniform = _uniform(f"image{size}", (1, 3, size, size))
    return (bound * (2.0 * uniform - 1.0)).astype(np.float32)


def summarize(stage: str, activation: np.ndarray) -> np.ndarray:
    """Returns mean, standard deviation and 256 values, at places scattered by name.

    Args:
        stage: one of `STAGES`.
        activation: `[1, C, H, W]`.

    Returns:
        float32 `[258]`.
    """
    flat = activation.astype(np.float64).ravel()
    places = (_uniform(stage, (_NUM_SAMPLES,)) * flat.size).astype(np.int64)
    return np.concatenate([[flat.mean(), flat.std()], flat[places]]).astype(np.float32)


def _uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns float64 in [0, 1), from raw bits: NumPy's distributions may change, these not."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    bits = np.random.Philox(key=key).random_raw(int(np.prod(shape)))
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(shape)
