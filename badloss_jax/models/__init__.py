"""Networks. Each is an nnx.Module with `logits, features = model(images, train=..., mask=...)`.

A new one is a function `(image_shape, num_classes, *, rngs, dtype, ...) -> module` with a `Head` called `head`, and one
line in `MODELS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from badloss_jax.models.frequency_cnn import frequency_cnn
from badloss_jax.models.mobilenet import mobilenet_v2
from badloss_jax.models.resnet import resnet18, resnet34, resnet50, resnet_small
from badloss_jax.models.vgg import vgg16_bn

MODELS: dict[str, Callable[..., Any]] = {
    "resnet_small": resnet_small,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "vgg16_bn": vgg16_bn,
    "mobilenet_v2": mobilenet_v2,
    "frequency_cnn": frequency_cnn,
}


@dataclass(frozen=True)
class ModelSpec:
    """What determines a network but its weights; hashable, so that compiled steps can be kept by it."""

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    stages: tuple[int, ...] = (16, 32, 64)
    stem_stride: int = 2
    dtype: str = "float32"

    @property
    def num_features(self) -> int:
        """F, the width of the penultimate layer."""
        return nnx.eval_shape(lambda: self.build(nnx.Rngs(0))).head.linear.in_features

    def build(self, rngs: nnx.Rngs) -> Any:
        """Returns the network with fresh weights; these are float32, or float64 for a float64 computation."""
        dtype = jnp.dtype(self.dtype)
        return MODELS[self.name](
            self.image_shape,
            self.num_classes,
            rngs=rngs,
            dtype=dtype,
            param_dtype=jnp.promote_types(dtype, jnp.float32),
            stages=self.stages,
            stem_stride=self.stem_stride,
        )


__all__ = ["MODELS", "ModelSpec"]
