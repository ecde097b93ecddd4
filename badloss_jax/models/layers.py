"""What the networks share: convolution and batch norm, the head, and which images count as large.

As in the authors' program: He-normal (fan-out) convolutions, batch norm that keeps 0.9 of its running statistics with
eps 1e-5 and takes its statistics over the whole (global, masked) batch, or over ghost batches if asked to.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from badloss_jax.models.convolution import convolve
from badloss_jax.models.normalization import BatchNorm

_LARGE = 112  # px; from here on networks begin as they do on ImageNet
_he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def is_large(image_shape: tuple[int, int, int]) -> bool:
    """Says whether images get the stem of 224 px networks rather than that of 32 px ones."""
    return min(image_shape[:2]) >= _LARGE


class ConvNorm(nnx.Module):
    """A convolution without bias, padded to keep its size, and batch norm."""

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int, groups: int = 1, *, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (size, size),
            strides=stride,
            padding=[(size // 2, size // 2)] * 2,
            feature_group_count=groups,
            use_bias=False,
            kernel_init=_he_normal,
            conv_general_dilated=convolve,
            rngs=rngs,
            **dtypes,
        )
        self.norm = BatchNorm(outputs, momentum=0.9, epsilon=1e-5, rngs=rngs, **dtypes)

    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, outputs]."""
        return self.norm(self.conv(x), use_running_average=not train, mask=mask)


class Head(nnx.Module):
    """The mean over pixels, the penultimate features, and a linear layer, in float32 or wider."""

    def __init__(self, inputs: int, num_classes: int, *, rngs: nnx.Rngs, **dtypes: Any):
        # Logits of eight bits would leave little of the loss of what is well learnt.
        wide = jnp.promote_types(dtypes["dtype"], jnp.float32)
        self.linear = nnx.Linear(inputs, num_classes, rngs=rngs, **dtypes | {"dtype": wide})

    def __call__(self, x: Float[Array, "B H W F"]) -> tuple[Float[Array, "B K"], Float[Array, "B F"]]:
        """Returns logits and features."""
        # The mean of many pixels in bfloat16 would lose most of its digits.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        features = x.astype(wide).mean((1, 2))
        return self.linear(features), features
