"""Blended attacks: a faint pattern over the whole image (Chen et al. 2017; BaDLoss, section 5.1)."""

import numpy as np

from badloss_jax.attacks.trigger import ImageShape, Trigger, blend
from badloss_jax.core.seeding import generator


def blend_r(image_shape: ImageShape, seed: int = 0, strength: float = 0.075) -> Trigger:
    """Blends in uniform noise, one value per pixel and channel, drawn once from `seed`."""
    pattern = generator(seed, "blend_r").random(image_shape, np.float32)
    return blend(pattern, strength)


def blend_p(image_shape: ImageShape, seed: int = 0, strength: float = 0.025) -> Trigger:
    """Blends in a grid: 1 where row and column are even, else 0."""
    pattern = np.zeros(image_shape, np.float32)
    pattern[::2, ::2] = 1
    return blend(pattern, strength)
