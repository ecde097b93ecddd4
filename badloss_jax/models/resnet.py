"""Residual networks (He et al. 2016).

Images of at least 112 px get the usual stem, a 7x7 convolution of stride 2; smaller ones, as in the paper, a 3x3
convolution of stride 1. The 3x3 max-pool of stride 2 follows either way.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float

from badloss_jax.models.layers import ConvNorm, Head, is_large, rows_of


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.layers = nnx.List([
            ConvNorm(inputs, width, 3, stride, rngs=rngs, **dtypes),
            ConvNorm(width, width, 3, 1, rngs=rngs, **dtypes),
        ])  # fmt: skip
        self.shortcut = _shortcut(inputs, width, stride, rngs=rngs, **dtypes)

    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, expansion * width]."""
        return _residual(self, x, train, mask)


class Bottleneck(nnx.Module):
    """1x1, 3x3 (which carries the stride) and 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs, **dtypes: Any):
        outputs = self.expansion * width
        self.layers = nnx.List([
            ConvNorm(inputs, width, 1, 1, rngs=rngs, **dtypes),
            ConvNorm(width, width, 3, stride, rngs=rngs, **dtypes),
            ConvNorm(width, outputs, 1, 1, rngs=rngs, **dtypes),
        ])  # fmt: skip
        self.shortcut = _shortcut(inputs, outputs, stride, rngs=rngs, **dtypes)

    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, expansion * width]."""
        return _residual(self, x, train, mask)


def _shortcut(inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs, **dtypes: Any) -> ConvNorm | None:
    if stride == 1 and inputs == outputs:
        return None
    return ConvNorm(inputs, outputs, 1, stride, rngs=rngs, **dtypes)


def _residual(block: BasicBlock | Bottleneck, x: Array, train: bool, mask: Array | None) -> Array:
    y = x
    for layer in list(block.layers)[:-1]:
        y = nnx.relu(layer(y, train, mask))
    y = block.layers[-1](y, train, mask)
    return nnx.relu(y + (x if block.shortcut is None else block.shortcut(x, train, mask)))


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nnx.Module):
    """Stem, stages of residual blocks (each but the first halves the resolution), mean over pixels, linear head."""

    def __init__(
        self, channels: int, num_classes: int, block: Block, widths: Sequence[int], depths: Sequence[int], *,
        stem: tuple[int, int], max_pool: bool, rngs: nnx.Rngs, **dtypes: Any,
    ):  # fmt: skip
        self.stem = ConvNorm(channels, widths[0], *stem, rngs=rngs, **dtypes)
        self.max_pool = max_pool
        blocks, inputs = [], widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for position in range(depth):
                stride = 2 if stage and not position else 1
                blocks.append(block(inputs, width, stride, rngs=rngs, **dtypes))
                inputs = block.expansion * width
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
        """
        where = rows_of(mask)
        x = nnx.relu(self.stem(images, train, where))
        if self.max_pool:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x, train, where)
        return self.head(x)


def _resnet(
    block: Block, depths: Sequence[int], image_shape: tuple[int, int, int], num_classes: int, *, stages: Any,
    stem_stride: Any, **rest: Any,
) -> ResNet:  # fmt: skip
    widths, stem = (64, 128, 256, 512), (7, 2) if is_large(image_shape) else (3, 1)
    return ResNet(image_shape[-1], num_classes, block, widths, depths, stem=stem, max_pool=True, **rest)


resnet18: Callable[..., ResNet] = partial(_resnet, BasicBlock, (2, 2, 2, 2))
resnet34: Callable[..., ResNet] = partial(_resnet, BasicBlock, (3, 4, 6, 3))
resnet50: Callable[..., ResNet] = partial(_resnet, Bottleneck, (3, 4, 6, 3))


def resnet_small(
    image_shape: tuple[int, int, int], num_classes: int, *, stages: Sequence[int], stem_stride: int, **rest: Any
) -> ResNet:
    """Returns one basic block a stage, without a max-pool: (16, 32, 64) is a ResNet-8."""
    depths, stem = (1,) * len(stages), (3, stem_stride)
    return ResNet(image_shape[-1], num_classes, BasicBlock, stages, depths, stem=stem, max_pool=False, **rest)
