"""Augmentations, applied inside the jitted step. A new one is a function and one line in `AUGMENTATIONS`."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

_PAD = 4  # px
_AREA = (0.08, 1.0)  # share of the image
_LOG_RATIO = math.log(4 / 3)


def keep(image: Float[Array, "H W C"], key: Key[Array, ""]) -> Float[Array, "H W C"]:
    """Leaves the image as it is.

    Args:
      image: float [H, W, C].
      key: not used.

    Returns:
      The same image.
    """
    return image


def crop_flip(image: Float[Array, "H W C"], key: Key[Array, ""]) -> Float[Array, "H W C"]:
    """Reflect-pads by 4 px, crops back at a random place and flips every second image left to right.

    Args:
      image: float [H, W, C].
      key: draws the place and the flip.

    Returns:
      float [H, W, C].
    """
    crop_key, flip_key = jax.random.split(key)
    padded = jnp.pad(image, ((_PAD, _PAD), (_PAD, _PAD), (0, 0)), mode="reflect")

    row, col = jax.random.randint(crop_key, (2,), 0, 2 * _PAD + 1)
    cropped = jax.lax.dynamic_slice(padded, (row, col, 0), image.shape)
    return jnp.where(jax.random.bernoulli(flip_key), cropped[:, ::-1], cropped)


def resized_crop_flip(image: Float[Array, "H W C"], key: Key[Array, ""]) -> Float[Array, "H W C"]:
    """Cuts out 8 to 100 % of the area, 3:4 to 4:3, resizes it to the whole (bilinear) and flips every second image.

    Where the cut would be wider or higher than the image, it is as wide or high as the image (Szegedy et al. 2015).

    Args:
      image: float [H, W, C].
      key: draws the cut's area, ratio and place, and the flip.

    Returns:
      float [H, W, C].
    """
    area_key, ratio_key, corner_key, flip_key = jax.random.split(key, 4)
    whole = jnp.array(image.shape[:2], image.dtype)

    area = jax.random.uniform(area_key, (), image.dtype, *_AREA) * whole.prod()
    ratio = jnp.exp(jax.random.uniform(ratio_key, (), image.dtype, -_LOG_RATIO, _LOG_RATIO))
    cut = jnp.clip(jnp.round(jnp.sqrt(area * jnp.stack([1 / ratio, ratio]))), 1, whole)
    corner = jnp.floor(jax.random.uniform(corner_key, (2,), image.dtype) * (whole - cut + 1))

    # The cut's size is not known when the step is compiled, so the image is scaled and moved, never sliced.
    scale = whole / cut
    resized = jax.image.scale_and_translate(
        image,
        image.shape,
        (0, 1),
        scale,
        -corner * scale,
        "linear",
        antialias=False,
    )
    return jnp.where(jax.random.bernoulli(flip_key), resized[:, ::-1], resized)


AUGMENTATIONS: dict[str, Callable] = {"none": keep, "crop_flip": crop_flip, "resized_crop_flip": resized_crop_flip}
