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
    """A batch, and what the network in training says of it.

    Attributes:
      images: as the network got them, augmented.
      labels: int32, in 0 to K - 1.
      real: which rows are examples, and not padding.
      losses: the cross-entropy of each row, not clamped.
      logits: of the K classes.
      features: of the penultimate layer.
    """

    images: Float[Array, "B H W C"]
    labels: Int[Array, "B"]
    real: Bool[Array, "B"]
    losses: Float[Array, "B"]
    logits: Float[Array, "B K"]
    features: Float[Array, "B F"]

    def mean(self, values: Float[Array, "B"]) -> Float[Array, ""]:
        """Averages over the examples, padding left out."""
        total = jnp.sum(jnp.where(self.real, values, 0))
        return total / self.real.sum()


@dataclass(frozen=True)
class MeanLoss:
    """The mean cross-entropy; the base of all objectives, which are hashable, for compiled steps are kept by them.

    Attributes:
      clamp: a single example's loss counts at most this much (as in the authors' program).
    """

    clamp: float = 100.0

    def init(self, key: jax.Array, spec: ModelSpec) -> Any:
        """Returns parameters that are learned beside the network's, such as an adversary's; {} by default.

        Args:
          key: to draw them with.
          spec: the network that is trained.

        Returns:
          A tree of arrays.
        """
        return {}

    def __call__(self, forward: Forward, beside: Any, given: Any) -> Float[Array, ""]:
        """Returns the scalar to minimise.

        Args:
          forward: the batch and the network's outputs.
          beside: the parameters of `init`.
          given: arrays that the caller hands to every step, such as another network's weights.

        Returns:
          float [].
        """
        return forward.mean(jnp.minimum(forward.losses, self.clamp))


@dataclass(frozen=True)
class Flooding(MeanLoss):
    """|mean loss - level| + level: descends above the level and ascends below it (Ishida et al., ICML 2020).

    Attributes:
      level: of the mean loss, at least 0.
    """

    level: float = 0.5

    def __call__(self, forward: Forward, beside: Any, given: Any) -> Float[Array, ""]:
        """Returns the scalar to minimise; see `MeanLoss`."""
        mean_loss = super().__call__(forward, beside, given)
        return jnp.abs(mean_loss - self.level) + self.level


@dataclass(frozen=True)
class Ascent(MeanLoss):
    """The negative mean loss: what is trained on is unlearned."""

    def __call__(self, forward: Forward, beside: Any, given: Any) -> Float[Array, ""]:
        """Returns the scalar to minimise; see `MeanLoss`."""
        return -super().__call__(forward, beside, given)
