"""How much of a crop shows cells, told by texture rather than by brightness.

Illumination, staining and phase contrast make cells brighter or darker than their surroundings, or
both; what they share is local contrast. A block of 8x8 pixels counts as foreground when its
standard deviation exceeds twice that of the field's background, which is the tenth percentile over
its blocks.
"""

import numpy as np

BLOCK = 8
_BACKGROUND_PERCENTILE = 10
_RATIO = 2.0


def foreground_map(image: np.ndarray) -> np.ndarray:
    """Returns which blocks of a field are foreground.

    Args:
      image: [H, W, C], any dtype.

    Returns:
      bool [H // 8, W // 8].
    """
    deviation = local_contrast(image, BLOCK)
    # Blocks without any variation are vignetted corners or saturation, not background.
    varied = deviation[deviation > 0]
    if not varied.size:
        return deviation > 0
    return deviation > _RATIO * np.percentile(varied, _BACKGROUND_PERCENTILE)


def local_contrast(image: np.ndarray, side: int) -> np.ndarray:
    """Returns the standard deviation of grey in square blocks, float32 [H // side, W // side]."""
    height, width = (n // side for n in image.shape[:2])
    deviation = np.empty((height, width), np.float32)
    for row in range(height):  # by strips: a float copy of a large field would double its memory
        strip = image[row * side : (row + 1) * side, : width * side].astype(np.float32)
        deviation[row] = strip.mean(-1).reshape(side, width, side).std(axis=(0, 2))
    return deviation


def foreground_fraction(foreground: np.ndarray, y: int, x: int, height: int, width: int) -> float:
    """Returns the fraction of foreground among the blocks wholly inside a rectangle at (y, x)."""
    rows = slice(-(-y // BLOCK), (y + height) // BLOCK)
    columns = slice(-(-x // BLOCK), (x + width) // BLOCK)
    blocks = foreground[rows, columns]
    return float(blocks.mean()) if blocks.size else 0.0
