"""The small network that tells altered images from clean ones by their DCT (Zeng et al., ICCV 2021, section 4).

Pairs of 3x3 convolutions with batch norm and ELU, each followed by a 2x2 max-pool, of 32, 64 and 128 channels, and one
linear layer on everything that is left: unlike in photographs, what a coefficient means depends on where it stands.
The paper's dropout is left out, for the one trainer draws nothing inside a network.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from badloss_jax.models.convolution import max_pool
from badloss_jax.models.layers import ConvNorm


class FlatHead(nnx.Module):
    """All pixels side by side, the penultimate features, and a linear layer, in float32 or wider."""

    def __init__(self, inputs: int, num_classes: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.linear = nnx.Linear(inputs, num_classes, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B K"], Float[Array, "B F"]]:
        """Returns logits and features, F = H W C."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        features = x.astype(wide).reshape(len(x), -1)
        return self.linear(features).astype(wide), features


class FrequencyCNN(nnx.Module):
    """Two convolutions a stage; pooling stops where nothing is left to pool."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        stages: tuple[int, ...],
        stem_stride: Any,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        height, width, inputs = image_shape
        convolutions = []
        for outputs in stages:
            for channels in (inputs, outputs):
                convolutions.append(ConvNorm(channels, outputs, 3, 1, rngs=rngs, **dtypes))
            inputs = outputs

            # As `__call__` pools: the head has to know how many pixels are left.
            if min(height, width) > 1:
                height //= 2
                width //= 2

        self.convolutions = nnx.List(convolutions)
        self.head = FlatHead(height * width * inputs, num_classes, rngs=rngs, **dtypes)

    def __call__(
        self, images: Float[Array, "B H W C"], *, train: bool, mask: Bool[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B K"], Float[Array, "B F"]]:
        """Returns logits and penultimate features.

        Args:
          images, train, mask: as of `ResNet`.
        """
        x = images
        for position, convolution in enumerate(self.convolutions):
            x = nnx.elu(convolution(x, train, mask))

            is_last_of_stage = position % 2 == 1
            if is_last_of_stage and min(x.shape[1:3]) > 1:
                x = max_pool(x, 2)
        return self.head(x)


frequency_cnn = FrequencyCNN
