"""Triggers that were never looked at while rules and weights were settled, to judge a scan by.

They are not among the `ATTACKS` of a run for that reason.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from badloss_jax.attacks.trigger import ImageShape, Trigger
from badloss_jax.core.seeding import generator


def warp(image_shape: ImageShape, seed: int, pixels: float = 1.0) -> Trigger:
    """Warps by a smooth random field (WaNet, Nguyen and Tran 2021).

    Args:
      image_shape: (H, W, C).
      seed: of the field.
      pixels: by which it moves, on average.

    Returns:
      A function from images, float [B, H, W, C] in [0, 1], to images of the same kind.
    """
    height, width, _ = image_shape
    # Four by four vectors, made smooth by a spline.
    coarse = generator(seed, "warp").uniform(-1, 1, (2, 4, 4))
    field = np.stack([ndimage.zoom(axis, (height / 4, width / 4), order=3) for axis in coarse])
    field *= pixels / np.abs(field).mean()

    rows, cols = np.mgrid[:height, :width]
    sources = np.stack([rows + field[0], cols + field[1]])

    def warped(image: Float[np.ndarray, "H W C"]) -> Float[np.ndarray, "H W C"]:
        channels = [
            ndimage.map_coordinates(image[..., channel], sources, order=1, mode="nearest")
            for channel in range(image.shape[-1])
        ]
        return np.stack(channels, axis=-1)

    def trigger(images: Float[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B H W C"]:
        return np.stack([warped(image) for image in images]).astype(images.dtype)

    return trigger


def ramp(image_shape: ImageShape, seed: int, strength: float = 0.15) -> Trigger:
    """Brightens from the left, where nothing is added, to the right (SIG's ramp, Barni et al. 2019).

    Args:
      image_shape: (H, W, C).
      seed: not used.
      strength: what is added at the right, of a range of 1.

    Returns:
      A function from images, float [B, H, W, C] in [0, 1], to images of the same kind.
    """
    rise = strength * np.linspace(0, 1, image_shape[1], dtype=np.float32)[None, :, None]
    return lambda images: np.clip(images + rise, 0, 1)


def lattice(image_shape: ImageShape, seed: int, strength: float = 0.1, every: int = 4) -> Trigger:
    """Blends in white lines.

    Args:
      image_shape: (H, W, C).
      seed: not used.
      strength: of the lines, 0 to 1.
      every: one row and one column in so many is a line.

    Returns:
      A function from images, float [B, H, W, C] in [0, 1], to images of the same kind.
    """
    lines = np.zeros(image_shape, np.float32)
    lines[::every] = 1
    lines[:, ::every] = 1
    return lambda images: (1 - strength * lines) * images + strength * lines


def inverted_pixels(image_shape: ImageShape, seed: int, count: int = 6) -> Trigger:
    """Inverts a few pixels.

    Args:
      image_shape: (H, W, C).
      seed: draws the pixels.
      count: how many there are.

    Returns:
      A function from images, float [B, H, W, C] in [0, 1], to images of the same kind.
    """
    height, width, _ = image_shape
    pixels = generator(seed, "inverted_pixels").choice(height * width, count, replace=False)
    mask = np.isin(np.arange(height * width), pixels).reshape(height, width, 1)
    return lambda images: np.where(mask, 1 - images, images)


HELD_OUT: dict[str, Callable[[ImageShape, int], Trigger]] = {
    "warp": warp,
    "ramp": ramp,
    "lattice": lattice,
    "inverted_pixels": inverted_pixels,
}
