"""Networks. Each is an nnx.Module with `logits, features = model(images, train=..., mask=...)`.

Imports nothing else of the package. Begin with `resnet`, the paper's networks, and `layers`, which all of them share.

A new one is a function `(image_shape, num_classes, *, rngs, dtype, ...) -> module` with a `Head` called `head`, and one
line in `MODELS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
from flax import nnx

from badloss_jax.models.frequency_cnn import frequency_cnn
from badloss_jax.models.mobilenet import mobilenet_v2
from badloss_jax.models.normalization import BatchNorm
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
    """What determines a network but its weights; hashable, so that compiled steps can be kept by it.

    Attributes:
      name: of `MODELS`.
      image_shape: H, W, C.
      num_classes: K.
      stages: channels of each stage, for those networks that ask for them.
      stem_stride: of the first convolution, for those networks that ask for it.
      dtype: of the computation, by name; parameters are never narrower than float32.
      ghost_batch: images that the statistics of batch norm are of in training, which divides B; 0 is the whole batch.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    stages: tuple[int, ...] = (16, 32, 64)
    stem_stride: int = 2
    dtype: str = "float32"
    ghost_batch: int = 0

    @property
    def num_features(self) -> int:
        """F, the width of the penultimate layer."""
        return _num_features(self)

    @property
    def param_dtype(self) -> jnp.dtype:
        """The dtype of weights, and of images before the first layer: float32, or float64 for a float64 computation."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def build(self, rngs: nnx.Rngs) -> Any:
        """Returns the network with fresh weights of `param_dtype`.

        Raises:
          ValueError: it has no batch norm that could have ghost batches.
        """
        model = MODELS[self.name](
            self.image_shape,
            self.num_classes,
            rngs=rngs,
            dtype=jnp.dtype(self.dtype),
            param_dtype=self.param_dtype,
            stages=self.stages,
            stem_stride=self.stem_stride,
        )

        # Set afterwards, so that networks need not hand it on to their layers.
        if self.ghost_batch:
            model.set_attributes(BatchNorm, ghost_batch=self.ghost_batch)
        return model


@lru_cache(maxsize=32)
def _num_features(spec: ModelSpec) -> int:
    return nnx.eval_shape(lambda: spec.build(nnx.Rngs(0))).head.linear.in_features


__all__ = ["MODELS", "ModelSpec"]
