"""What a training minimises: by default the mean loss of a batch. Defences bring others."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from badloss_jax.models import ModelSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forward:
    """A batch, and what the network in training says of it; padding is not `real`."""

    images: Float[Array, "B H W C"]
    labels: Int[Array, "B"]
    real: Bool[Array, "B"]
    losses: Float[Array, "B"]
    logits: Float[Array, "B K"]
    features: Float[Array, "B F"]

    def mean(self, values: Float[Array, "B"]) -> Float[Array, ""]:
        """Averages over the examples, padding left out."""
        return jnp.sum(jnp.where(self.real, values, 0)) / self.real.sum()


@dataclass(frozen=True)
class MeanLoss:
    """The mean cross-entropy; the base of all objectives, which are hashable, for compiled steps are kept by them.

    Attributes:
      clamp: a single example's loss counts at most this much (as in the authors' program).
    """

    clamp: float = 100.0

    def init(self, key: jax.Array, spec: ModelSpec) -> Any:
        """Returns parameters that are learned beside the network's, such as an adversary's; {} by default."""
        return {}

    def __call__(self, forward: Forward, beside: Any, given: Any) -> Float[Array, ""]:
        """Returns the scalar to minimise.

        Args:
          forward: the batch and the network's outputs.
          beside: the parameters of `init`.
          given: arrays that the caller hands to every step, such as another network's weights.
        """
        return forward.mean(jnp.minimum(forward.losses, self.clamp))


@dataclass(frozen=True)
class Flooding(MeanLoss):
    """|mean loss - level| + level: descends above the level and ascends below it (Ishida et al., ICML 2020)."""

    level: float = 0.5

    def __call__(self, forward: Forward, beside: Any, given: Any) -> Float[Array, ""]:
        """Returns the scalar to minimise."""
        return jnp.abs(super().__call__(forward, beside, given) - self.level) + self.level


@dataclass(frozen=True)
class Ascent(MeanLoss):
    """The negative mean loss: what is trained on is unlearned."""

    def __call__(self, forward: Forward, beside: Any, given: Any) -> Float[Array, ""]:
        """Returns the scalar to minimise."""
        return -super().__call__(forward, beside, given)
