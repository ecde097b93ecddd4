"""The sinusoid attack: a faint vertical wave on images that keep their label (SIG, Barni et al. 2019)."""

import numpy as np

from badloss_jax.attacks.trigger import ImageShape, Trigger, blend


def sinusoid(image_shape: ImageShape, seed: int = 0, strength: float = 0.075, cycles: float = 6.0) -> Trigger:
    """Blends in s[:, col] = 1 - cos(2 pi cycles col / W), in [0, 2], and clips.

    Args:
      image_shape: (H, W, C).
      seed: not used.
      strength: share of the wave in the image, in (0, 1].
      cycles: of the wave over the width of the image.

    Returns:
      The trigger.
    """
    width = image_shape[1]
    wave = 1 - np.cos(2 * np.pi * cycles * np.arange(width) / width)
    return blend(np.broadcast_to(wave[None, :, None], image_shape), strength)
