"""Pixels to network inputs: fitted once on the training split, stored, and used by every verb.

ImageNet's mean and standard deviation are those of torchvision's pre-trained weights
(https://pytorch.org/vision/stable/models.html).
"""

import dataclasses
from typing import Any

import numpy as np

from jaxcells.files import Error

IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)
PERCENTILES = (0.5, 99.5)
_MAX_PIXELS = 10_000_000


@dataclasses.dataclass(frozen=True)
class Normalization:
    """(pixel - low) / (high - low), then (… - mean) / std, per channel; no value is clipped.

    Attributes:
      kind: "imagenet" or "percentile".
      low: per channel of the image, what becomes 0.
      high: per channel of the image, what becomes 1.
      mean: per channel of the network's input.
      std: per channel of the network's input.
    """

    kind: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Any) -> Any:
        """Normalises a batch, as a NumPy array or inside a jitted JAX function.

        Args:
          images: [B, H, W, C], uint8, uint16 or float32.

        Returns:
          float32 [B, H, W, C'], where C' is 3 for C = 1 (three equal channels) and C otherwise.
        """
        low = np.asarray(self.low, np.float32)
        span = np.asarray(self.high, np.float32) - low
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        # One multiplication and one addition a pixel: the constants are folded beforehand.
        return images.astype(np.float32) * (1 / (span * std)) - (low / span + mean) / std


def fit_normalization(images: np.ndarray, kind: str) -> Normalization:
    """Fits the normalisation to the images of the training split.

    Args:
      images: [N, H, W, C], may be memory-mapped.
      kind: "imagenet": 8-bit pixels over 255. "percentile": the 0.5 and 99.5 percentiles of each
        channel become 0 and 1; of more than ten million pixels, those of a regular sample. Both
        then apply ImageNet's mean and standard deviation, or their average where the image has
        neither one nor three channels. "auto": "imagenet" for 8-bit grey and RGB, "percentile" for
        anything else.

    Raises:
      Error: "imagenet" for pixels that are not 8-bit grey or RGB, or a channel without contrast.
    """
    channels = images.shape[-1]
    eight_bit_colour = images.dtype == np.uint8 and channels in (1, 3)
    if kind == "auto":
        kind = "imagenet" if eight_bit_colour else "percentile"
    if kind == "imagenet":
        if not eight_bit_colour:
            raise Error(
                "data.normalize=imagenet is for 8-bit grey or RGB images, and these are "
                f"{images.dtype.name} with {channels} channels; use data.normalize=percentile"
            )
        low, high = (0.0,) * channels, (255.0,) * channels
    else:
        # Whole images would leave out others, so every image is thinned.
        step = -(-images.size // (channels * _MAX_PIXELS))
        pixels = images.reshape(len(images), -1, channels)[:, ::step]
        bounds = np.percentile(pixels, PERCENTILES, axis=(0, 1), method="lower").astype(float)
        low, high = map(tuple, bounds.tolist())
        if flat := [c for c in range(channels) if low[c] == high[c]]:
            raise Error(
                f"channel {flat[0]} of the training crops has no contrast: its 0.5 and 99.5 "
                f"percentiles are both {low[flat[0]]:g}; leave that channel out, or raise "
                "data.min_foreground if most crops are empty"
            )
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if channels not in (1, 3):
        mean, std = (np.mean(mean).item(),) * channels, (np.mean(std).item(),) * channels
    return Normalization(kind, low, high, mean, std)
