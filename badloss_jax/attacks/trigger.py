"""What a trigger is, and the ways in which triggers are put on an image."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

ImageShape = tuple[int, int, int]
Trigger = Callable[[Any], Any]  # images, float [B, H, W, C] in [0, 1] -> the same


@dataclass(frozen=True)
class Attack:
    """An attack: how its trigger is made, which parameter makes it stronger, whether it keeps labels."""

    make: Callable[..., Trigger]
    boosted: str | None = None
    clean_label: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the trigger's own parameters, all numbers."""
        # The first two are the image shape and the seed; what only takes a keyword is optimised, not set.
        own = list(inspect.signature(self.make).parameters.values())[2:]
        return tuple(parameter.name for parameter in own if parameter.kind is not parameter.KEYWORD_ONLY)

    @property
    def optimised(self) -> bool:
        """Whether the trigger is a perturbation that has to be optimised on a surrogate network first."""
        return "perturbation" in inspect.signature(self.make).parameters


def stamp(mask: np.ndarray) -> Trigger:
    """Returns the trigger that whitens the pixels of `mask`, bool [H, W, 1]."""

    def trigger(images: Any) -> Any:
        xp = images.__array_namespace__()
        return xp.where(mask, xp.ones((), images.dtype), images)

    return trigger


def blend(pattern: np.ndarray, strength: float) -> Trigger:
    """Returns the trigger clip((1 - strength) x + strength pattern).

    Args:
      pattern: float [H, W, C].
      strength: share of the pattern in the image, in (0, 1].

    Returns:
      The trigger.
    """

    def trigger(images: Any) -> Any:
        xp = images.__array_namespace__()
        # Of the images' type, which a wider pattern would change.
        overlay = xp.asarray(strength * pattern, dtype=images.dtype)
        return xp.clip((1 - strength) * images + overlay, 0, 1)

    return trigger


def add(pattern: np.ndarray) -> Trigger:
    """Returns the trigger clip(x + pattern), the pattern being float [H, W, C] or broadcast to it."""

    def trigger(images: Any) -> Any:
        xp = images.__array_namespace__()
        return xp.clip(images + xp.asarray(pattern, dtype=images.dtype), 0, 1)

    return trigger
