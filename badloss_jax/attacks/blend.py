"""Blended attacks: a faint pattern over the whole image (Chen et al. 2017; BaDLoss, section 5.1)."""

import numpy as np

from badloss_jax.attacks.trigger import ImageShape, Trigger, blend
from badloss_jax.core.seeding import generator


def blend_r(image_shape: ImageShape, seed: int = 0, strength: float = 0.075) -> Trigger:
    """Blends in uniform noise, one value per pixel and channel.

    Args:
      image_shape: (H, W, C).
      seed: of the noise, which is drawn once.
      strength: share of the pattern in the image, in (0, 1].

    Returns:
      The trigger.
    """
    pattern = generator(seed, "blend_r").random(image_shape, np.float32)
    return blend(pattern, strength)


def blend_p(image_shape: ImageShape, seed: int = 0, strength: float = 0.025) -> Trigger:
    """Blends in a grid: 1 where row and column are even, else 0.

    Args:
      image_shape: (H, W, C).
      seed: not used.
      strength: share of the pattern in the image, in (0, 1].

    Returns:
      The trigger.
    """
    pattern = np.zeros(image_shape, np.float32)
    pattern[::2, ::2] = 1
    return blend(pattern, strength)
