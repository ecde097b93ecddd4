"""The kinds of trajectory: what of a network's output is kept for each example and epoch."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

_LOWEST = -1e4  # of what is stored as float16, whose range ends at 65504


@dataclass(frozen=True)
class Kinds:
    """Which kinds are recorded beside the loss, and how wide they are (hashable, for compiled steps).

    Attributes:
      names: of "step", "prob", "logits", "ranked", "features".
      num_classes: K.
      num_features: F, penultimate features of the network.
      feature_dim: d, columns of the Gaussian projection of the features.
      ranked_others: m, at most K - 1 are taken.
      seed: of the projection.
      observed: which of all, the loss with them, `observe` computes; () are all.
    """

    names: tuple[str, ...]
    num_classes: int
    num_features: int
    feature_dim: int = 64
    ranked_others: int = 5
    seed: int = 0
    observed: tuple[str, ...] = ()

    def layout(self) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
        """Returns for each recorded kind its shape per example and epoch, and its dtype."""
        others = min(self.ranked_others, self.num_classes - 1)
        half, single = jnp.dtype(jnp.float16), jnp.dtype(jnp.float32)
        layouts = {
            "step": ((), single),
            "prob": ((), single),
            "logits": ((self.num_classes,), half),
            "ranked": ((1 + others,), half),
            "features": ((self.feature_dim,), half),
        }
        return {"loss": ((), single)} | {name: layouts[name] for name in self.names}

    def observe(
        self, logits: Float[Array, "B K"], features: Float[Array, "B F"], labels: Int[Array, "B"]
    ) -> dict[str, Array]:
        """Computes the kinds to observe: [B] or [B, width]; "loss" is the cross-entropy, and so is "step".

        "prob" is the labelled class's probability; "ranked" its log-probability followed by the m largest of the other
        classes', in descending order; "features" are multiplied by a seeded Gaussian matrix of variance 1/d.
        """
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        seen: dict[str, Array] = {}
        for name, (_, dtype) in self.layout().items():
            if self.observed and name not in self.observed:
                continue
            if name in ("loss", "step"):
                seen[name] = losses
            elif name == "prob":
                seen[name] = jnp.exp(-losses)
            elif name == "logits":
                seen[name] = logits
            elif name == "ranked":
                log_p = jax.nn.log_softmax(logits)
                others = jnp.where(jax.nn.one_hot(labels, self.num_classes, dtype=bool), -jnp.inf, log_p)
                largest, _ = jax.lax.top_k(others, min(self.ranked_others, self.num_classes - 1))
                seen[name] = jnp.concatenate([-losses[:, None], largest], axis=1)
            elif name == "features":
                seen[name] = jnp.dot(features, self._projection(features.dtype), precision=jax.lax.Precision.HIGHEST)
            if dtype == jnp.float16:
                seen[name] = jnp.clip(seen[name], _LOWEST, -_LOWEST)
        return seen

    def _projection(self, dtype: jnp.dtype) -> Float[Array, "F d"]:
        key = jax.random.key(self.seed)
        matrix = jax.random.normal(key, (self.num_features, self.feature_dim), jnp.float32)
        return (matrix / self.feature_dim**0.5).astype(dtype)
