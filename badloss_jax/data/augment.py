"""Augmentations, applied inside the jitted step. A new one is a function and one line in `AUGMENTATIONS`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

_PAD = 4  # px


def keep(image: Float[Array, "H W C"], key: Key[Array, ""]) -> Float[Array, "H W C"]:
    """Leaves the image as it is."""
    return image


def crop_flip(image: Float[Array, "H W C"], key: Key[Array, ""]) -> Float[Array, "H W C"]:
    """Reflect-pads by 4 px, crops back at a random place and flips every second image left to right."""
    for_crop, for_flip = jax.random.split(key)
    padded = jnp.pad(image, ((_PAD, _PAD), (_PAD, _PAD), (0, 0)), mode="reflect")
    row, col = jax.random.randint(for_crop, (2,), 0, 2 * _PAD + 1)
    cropped = jax.lax.dynamic_slice(padded, (row, col, 0), image.shape)
    return jnp.where(jax.random.bernoulli(for_flip), cropped[:, ::-1], cropped)


AUGMENTATIONS: dict[str, Callable] = {"none": keep, "crop_flip": crop_flip}
