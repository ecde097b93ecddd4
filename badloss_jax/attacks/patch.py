"""Patch attacks: a small checker, or one pixel, of white (BadNets, Gu et al. 2017; BaDLoss, section 5.1)."""

import numpy as np

from badloss_jax.attacks.trigger import ImageShape, Trigger, stamp
from badloss_jax.core.errors import UsageError

_LARGE = 112  # px; from here on the patch is made of blocks, as single pixels would vanish
_BLOCK = 8  # px


def patch(image_shape: ImageShape, seed: int = 0) -> Trigger:
    """Whitens a 3x3 checker: pixels at the lower right, or from 112 px on 8x8 blocks from (8, 8) on.

    Args:
      image_shape: (H, W, C).
      seed: not used.

    Returns:
      The trigger.

    Raises:
      UsageError: the images are smaller than 4x4 pixels.
    """
    height, width, _ = image_shape
    if min(height, width) >= _LARGE:
        corners = [(row * _BLOCK, col * _BLOCK) for row, col in ((1, 1), (3, 1), (1, 3), (2, 2))]
        return stamp(_mask(image_shape, corners, _BLOCK))

    if min(height, width) < 4:
        raise UsageError(f"attack 'patch' needs images of at least 4x4 pixels, got {height}x{width}")
    corners = [(height - row, width - col) for row, col in ((2, 2), (4, 2), (2, 4), (3, 3))]
    return stamp(_mask(image_shape, corners, 1))


def single_pix(image_shape: ImageShape, seed: int = 0) -> Trigger:
    """Whitens the pixel at (H - 2, W - 2).

    Args:
      image_shape: (H, W, C).
      seed: not used.

    Returns:
      The trigger.

    Raises:
      UsageError: the images are smaller than 2x2 pixels.
    """
    height, width, _ = image_shape
    if min(height, width) < 2:
        raise UsageError(f"attack 'single_pix' needs images of at least 2x2 pixels, got {height}x{width}")
    return stamp(_mask(image_shape, [(height - 2, width - 2)], 1))


def _mask(image_shape: ImageShape, corners: list[tuple[int, int]], size: int) -> np.ndarray:
    """Returns bool [H, W, 1], true in the squares of this size with these upper left corners."""
    mask = np.zeros((*image_shape[:2], 1), bool)
    for row, col in corners:
        mask[row : row + size, col : col + size] = True
    return mask
