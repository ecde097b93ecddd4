"""MobileNetV2 (Sandler et al. 2018), for the ablation of architectures: depthwise convolutions, few parameters.

Images below 112 px keep their resolution through the stem and the second stage, as is usual for CIFAR-10.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float

from badloss_jax.models.layers import ConvNorm, Head, is_large

# Expansion, width, blocks and stride of each stage.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nnx.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection; a shortcut where shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, *, rngs: nnx.Rngs, **dtypes: Any):
        hidden = expansion * inputs
        expand = None
        if expansion > 1:
            expand = ConvNorm(inputs, hidden, 1, 1, rngs=rngs, **dtypes)
        self.expand = expand
        self.depthwise = ConvNorm(hidden, hidden, 3, stride, hidden, rngs=rngs, **dtypes)
        self.project = ConvNorm(hidden, outputs, 1, 1, rngs=rngs, **dtypes)
        self.residual = stride == 1 and inputs == outputs

    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Maps [B, H, W, inputs] to [B, H / stride, W / stride, outputs]."""
        y = x
        if self.expand is not None:
            y = nnx.relu6(self.expand(y, train, mask))
        y = nnx.relu6(self.depthwise(y, train, mask))

        # No ReLU here: in so few channels it would lose too much (section 3.2).
        y = self.project(y, train, mask)

        if self.residual:
            y = x + y
        return y


class MobileNetV2(nnx.Module):
    """Stem, seven stages of inverted residuals, a 1x1 convolution to 1280 features, mean over pixels, linear head."""

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
        early_stride = 2 if is_large(image_shape) else 1
        self.stem = ConvNorm(image_shape[-1], 32, 3, early_stride, rngs=rngs, **dtypes)

        blocks = []
        inputs = 32
        for stage, (expansion, width, depth, stride) in enumerate(_STAGES):
            if stage == 1:
                # Small images are not halved a second time, either.
                stride = early_stride
            for position in range(depth):
                block_stride = stride if position == 0 else 1
                blocks.append(InvertedResidual(inputs, width, expansion, block_stride, rngs=rngs, **dtypes))
                inputs = width
        self.blocks = nnx.List(blocks)

        self.last = ConvNorm(inputs, 1280, 1, 1, rngs=rngs, **dtypes)
        self.head = Head(1280, num_classes, rngs=rngs, **dtypes)

    def __call__(
        self, images: Float[Array, "B H W C"], *, train: bool, mask: Bool[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B K"], Float[Array, "B F"]]:
        """Returns logits and penultimate features.

        Args:
          images, train, mask: as of `ResNet`.
        """
        x = nnx.relu6(self.stem(images, train, mask))
        for block in self.blocks:
            x = block(x, train, mask)
        return self.head(nnx.relu6(self.last(x, train, mask)))


mobilenet_v2 = MobileNetV2
