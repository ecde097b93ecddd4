"""Residual networks (He et al. 2016).

Images of at least 112 px get the usual stem, a 7x7 convolution of stride 2; smaller ones, as in the paper, a 3x3
convolution of stride 1. The 3x3 max-pool of stride 2 follows either way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float

from badloss_jax.models.convolution import max_pool
from badloss_jax.models.layers import ConvNorm, Head, is_large


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs, **dtypes: Any):
        layers = [
            ConvNorm(inputs, width, 3, stride, rngs=rngs, **dtypes),
            ConvNorm(width, width, 3, 1, rngs=rngs, **dtypes),
        ]
        self.layers = nnx.List(layers)
        self.shortcut = _shortcut(inputs, width, stride, rngs=rngs, **dtypes)

    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, expansion * width]."""
        return _residual(self, x, train, mask)


class Bottleneck(nnx.Module):
    """1x1, 3x3 (which carries the stride) and 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs, **dtypes: Any):
        outputs = self.expansion * width
        layers = [
            ConvNorm(inputs, width, 1, 1, rngs=rngs, **dtypes),
            ConvNorm(width, width, 3, stride, rngs=rngs, **dtypes),
            ConvNorm(width, outputs, 1, 1, rngs=rngs, **dtypes),
        ]
        self.layers = nnx.List(layers)
        self.shortcut = _shortcut(inputs, outputs, stride, rngs=rngs, **dtypes)

    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, expansion * width]."""
        return _residual(self, x, train, mask)


def _shortcut(inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs, **dtypes: Any) -> ConvNorm | None:
    """Returns the 1x1 convolution past a block, or None where shapes agree without one."""
    if stride == 1 and inputs == outputs:
        return None
    return ConvNorm(inputs, outputs, 1, stride, rngs=rngs, **dtypes)


def _residual(block: BasicBlock | Bottleneck, x: Array, train: bool, mask: Array | None) -> Array:
    """Applies a block: the last ReLU comes after the sum."""
    *inner, last = block.layers

    y = x
    for layer in inner:
        y = nnx.relu(layer(y, train, mask))
    y = last(y, train, mask)

    if block.shortcut is not None:
        x = block.shortcut(x, train, mask)
    return nnx.relu(y + x)


@dataclass(frozen=True)
class Architecture:
    """What tells one residual network from another.

    Attributes:
      block: its building block.
      widths: of each stage's blocks.
      depths: blocks of each stage.
      stem: size and stride of the first convolution.
      max_pool: whether a 3x3 max-pool of stride 2 follows.
    """

    block: type[BasicBlock] | type[Bottleneck]
    widths: Sequence[int]
    depths: Sequence[int]
    stem: tuple[int, int]
    max_pool: bool


class ResNet(nnx.Module):
    """Stem, stages of residual blocks (each but the first halves the resolution), mean over pixels, linear head."""

    def __init__(self, channels: int, num_classes: int, architecture: Architecture, *, rngs: nnx.Rngs, **dtypes: Any):
        self.stem = ConvNorm(channels, architecture.widths[0], *architecture.stem, rngs=rngs, **dtypes)
        self.max_pool = architecture.max_pool

        blocks = []
        inputs = architecture.widths[0]
        for stage, (width, depth) in enumerate(zip(architecture.widths, architecture.depths, strict=True)):
            for position in range(depth):
                # The first stage works at the resolution that the stem leaves.
                stride = 2 if stage > 0 and position == 0 else 1
                blocks.append(architecture.block(inputs, width, stride, rngs=rngs, **dtypes))
                inputs = architecture.block.expansion * width

        self.blocks = nnx.List(blocks)
        self.head = Head(inputs, num_classes, rngs=rngs, **dtypes)

    def __call__(
        self, images: Float[Array, "B H W C"], *, train: bool, mask: Bool[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B K"], Float[Array, "B F"]]:
        """Returns logits and penultimate features, in float32 or wider.

        Args:
          images: in [0, 1].
          train: normalise by the batch's statistics, and update the running ones.
          mask: False for padding, which then does not count in the statistics.

        Returns:
          float [B, K] and [B, F].
        """
        x = nnx.relu(self.stem(images, train, mask))
        if self.max_pool:
            x = max_pool(x, 3, padding=1)
        for block in self.blocks:
            x = block(x, train, mask)
        return self.head(x)


def _resnet(
    block: type[BasicBlock] | type[Bottleneck],
    depths: Sequence[int],
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    stages: Any,
    stem_stride: Any,
    rngs: nnx.Rngs,
    **dtypes: Any,
) -> ResNet:
    """Returns a network of He et al.; its stages and its stem are theirs, whatever the caller has for others."""
    stem = (7, 2) if is_large(image_shape) else (3, 1)
    architecture = Architecture(block, widths=(64, 128, 256, 512), depths=depths, stem=stem, max_pool=True)
    return ResNet(image_shape[-1], num_classes, architecture, rngs=rngs, **dtypes)


resnet18: Callable[..., ResNet] = partial(_resnet, BasicBlock, (2, 2, 2, 2))
resnet34: Callable[..., ResNet] = partial(_resnet, BasicBlock, (3, 4, 6, 3))
resnet50: Callable[..., ResNet] = partial(_resnet, Bottleneck, (3, 4, 6, 3))


def resnet_small(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    stages: Sequence[int],
    stem_stride: int,
    rngs: nnx.Rngs,
    **dtypes: Any,
) -> ResNet:
    """Returns one basic block a stage, without a max-pool: (16, 32, 64) is a ResNet-8.

    Args:
      image_shape: H, W, C.
      num_classes: K.
      stages: channels of each stage.
      stem_stride: of the first convolution.
      rngs: draw the weights.
      **dtypes: dtype, of the computation, and param_dtype.
    """
    depths = (1,) * len(stages)
    architecture = Architecture(BasicBlock, widths=stages, depths=depths, stem=(3, stem_stride), max_pool=False)
    return ResNet(image_shape[-1], num_classes, architecture, rngs=rngs, **dtypes)
