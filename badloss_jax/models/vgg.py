"""VGG-16 with batch norm (Simonyan and Zisserman 2015), for the ablation of architectures.

The convolutions are the original ones; a mean over pixels and one linear layer stand for the three large linear layers,
as is usual for small images. Pooling stops where nothing is left to pool.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float

from badloss_jax.models.convolution import max_pool
from badloss_jax.models.layers import ConvNorm, Head

# Channels of the convolutions of each stage.
_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nnx.Module):
    """Five stages of 3x3 convolutions, each but the last followed by a 2x2 max-pool."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        stages: Any,
        stem_stride: Any,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        convolutions = []
        inputs = image_shape[-1]
        for widths in _WIDTHS:
            for width in widths:
                convolutions.append(ConvNorm(inputs, width, 3, 1, rngs=rngs, **dtypes))
                inputs = width

        self.convolutions = nnx.List(convolutions)
        self.head = Head(inputs, num_classes, rngs=rngs, **dtypes)

    def __call__(
        self, images: Float[Array, "B H W C"], *, train: bool, mask: Bool[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B K"], Float[Array, "B F"]]:
        """Returns logits and penultimate features.

        Args:
          images, train, mask: as of `ResNet`.
        """
        convolutions = iter(self.convolutions)
        x = images
        for stage, widths in enumerate(_WIDTHS):
            # Before a stage and not after it, for the last one is not pooled.
            if stage > 0 and min(x.shape[1:3]) > 1:
                x = max_pool(x, 2)
            for _ in widths:
                x = nnx.relu(next(convolutions)(x, train, mask))
        return self.head(x)


vgg16_bn = VGG
