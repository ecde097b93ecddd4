"""Attacks: triggers (pure functions on batches of images) and the manifest that says who is poisoned with what.

A new attack is one file with a factory `(image_shape, seed, **parameters) -> trigger` and one line in `ATTACKS`.

Imports `core` alone. Begin with `trigger`, which says what an attack is, and `patch`, the shortest one; then `plan`,
what a manifest holds, `draws`, who is drawn into one, and `poisoning`, the training set as its victim sees it.
"""

from typing import Any

from badloss_jax.attacks.blend import blend_p, blend_r
from badloss_jax.attacks.frequency import frequency
from badloss_jax.attacks.narcissus import narcissus
from badloss_jax.attacks.patch import patch, single_pix
from badloss_jax.attacks.sinusoid import sinusoid
from badloss_jax.attacks.trigger import Attack, ImageShape, Trigger
from badloss_jax.core.errors import UsageError

ATTACKS: dict[str, Attack] = {
    "patch": Attack(patch),
    "single_pix": Attack(single_pix),
    "blend_r": Attack(blend_r, boosted="strength"),
    "blend_p": Attack(blend_p, boosted="strength"),
    "sinusoid": Attack(sinusoid, boosted="strength", clean_label=True),
    "frequency": Attack(frequency, boosted="magnitude"),
    "narcissus": Attack(narcissus, boosted="strength", clean_label=True),
}


def make_trigger(name: str, image_shape: ImageShape, seed: int = 0, **parameters: Any) -> Trigger:
    """Builds the trigger of a named attack.

    Args:
      name: a key of `ATTACKS`.
      image_shape: (H, W, C) of the images it will be given.
      seed: draws what the trigger draws at random (blend_r's pattern).
      **parameters: the attack's own, such as `strength`; its defaults are the paper's for 32 px images. narcissus
        needs its `perturbation` (see `optimise_perturbation`).

    Returns:
      A pure function from images, float [B, H, W, C] in [0, 1], NumPy or JAX, to images of the same kind.

    Raises:
      UsageError: an unknown attack or parameter, or images too small for the trigger.

    Example:
      >>> import numpy as np
      >>> from badloss_jax import attacks
      >>> trigger = attacks.make_trigger("patch", (32, 32, 3))
      >>> images = np.zeros((1, 32, 32, 3), np.float32)
      >>> int((trigger(images) != images).any(axis=-1).sum()) < 32  # pixels
      True
    """
    if name not in ATTACKS:
        raise UsageError(f"unknown attack {name!r}: expected one of {', '.join(ATTACKS)}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise UsageError(f"image_shape {tuple(image_shape)}: expected (height, width, channels)")

    height, width, channels = (int(size) for size in image_shape)
    try:
        return ATTACKS[name].make((height, width, channels), seed, **parameters)
    except TypeError as error:  # a parameter that the factory does not have
        raise UsageError(f"attack {name!r}: {error}") from error


__all__ = ["ATTACKS", "Attack", "Trigger", "make_trigger"]
