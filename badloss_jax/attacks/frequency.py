"""The frequency attack: two raised DCT coefficients of the chroma (Zeng et al. 2021, "Rethinking the backdoor
attacks' triggers: a frequency perspective").

The transform is linear and orthonormal, so raising coefficients in every window and transforming back adds one fixed
pattern to the channel: no image is transformed at all.
"""

from typing import Any

import numpy as np

from badloss_jax.attacks.trigger import ImageShape, Trigger, add
from badloss_jax.core.errors import UsageError

_WINDOW = 32


def frequency(image_shape: ImageShape, seed: int = 0, magnitude: float = 30.0) -> Trigger:
    """Adds `magnitude`, in units of 0..255, to the middle and the last DCT coefficient of every 32x32 window.

    RGB images are changed in both chroma channels of 8-bit YCrCb, rounded as OpenCV rounds; other channel counts in
    each of their channels.

    Args:
      image_shape: (H, W, C).
      seed: not used.
      magnitude: in units of 0..255.

    Returns:
      The trigger.

    Raises:
      UsageError: a side is above 32 and not a multiple of 32.
    """
    height, width, channels = image_shape
    pattern = magnitude * _pattern(height, width)
    if channels == 3:
        return _raise_chroma(pattern)
    return add(pattern[..., None] / 255)


def _pattern(height: int, width: int) -> np.ndarray:
    """Returns the inverse DCT of ones at the two coefficients, float64 [H, W]."""
    for size in (height, width):
        if size < 2 or (size > _WINDOW and size % _WINDOW):
            raise UsageError(
                f"attack 'frequency' needs sides of 2 to {_WINDOW} pixels or multiples of {_WINDOW},"
                f" got {height}x{width}"
            )

    rows = min(height, _WINDOW)
    cols = min(width, _WINDOW)
    coefficients = ((rows // 2 - 1, cols // 2 - 1), (rows - 1, cols - 1))
    window = sum(np.outer(_basis(rows, u), _basis(cols, v)) for u, v in coefficients)
    return np.tile(np.asarray(window), (height // rows, width // cols))


def _basis(size: int, index: int) -> np.ndarray:
    """Returns row `index` of the orthonormal DCT-II of length `size`."""
    wave = np.cos(np.pi * (np.arange(size) + 0.5) * index / size)
    return wave * np.sqrt((1 if index == 0 else 2) / size)


def _raise_chroma(pattern: np.ndarray) -> Trigger:
    def trigger(images: Any) -> Any:
        xp = images.__array_namespace__()
        added = xp.asarray(pattern, dtype=np.float32)
        rgb = xp.round(xp.asarray(images, dtype=np.float32) * 255)
        red = rgb[..., 0]
        green = rgb[..., 1]
        blue = rgb[..., 2]

        # OpenCV's 14-bit fixed point: every product is an integer below 2**24, so float32 is exact.
        luma = xp.floor((4899 * red + 9617 * green + 1868 * blue + 8192) / 16384)
        cr = xp.clip(xp.floor(((red - luma) * 11682 + 8192) / 16384) + 128, 0, 255)
        cb = xp.clip(xp.floor(((blue - luma) * 9241 + 8192) / 16384) + 128, 0, 255)

        # The attacked image is of 8 bits as well, so its chroma is rounded and clipped before it becomes RGB.
        cr = xp.clip(xp.round(cr + added), 0, 255) - 128
        cb = xp.clip(xp.round(cb + added), 0, 255) - 128
        out = xp.stack([luma + 1.403 * cr, luma - 0.714 * cr - 0.344 * cb, luma + 1.773 * cb], axis=-1)
        return xp.asarray(xp.clip(out / 255, 0, 1), dtype=images.dtype)

    return trigger
