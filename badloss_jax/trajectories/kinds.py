"""The kinds of trajectory: what of a network's output is kept for each example and epoch."""

import math
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
        half = jnp.dtype(jnp.float16)
        single = jnp.dtype(jnp.float32)
        layouts = {
            "step": ((), single),
            "prob": ((), single),
            "logits": ((self.num_classes,), half),
            "ranked": ((1 + self._num_ranked_others,), half),
            "features": ((self.feature_dim,), half),
        }
        return {"loss": ((), single)} | {name: layouts[name] for name in self.names}

    def widths(self) -> dict[str, int]:
        """Returns for each recorded kind the bytes of an example and epoch."""
        return {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in self.layout().items()}

    def observe(
        self, logits: Float[Array, "B K"], features: Float[Array, "B F"], labels: Int[Array, "B"]
    ) -> dict[str, Array]:
        """Computes the kinds to observe, for use inside jit.

        "loss" is the cross-entropy, and so is "step"; "prob" the labelled class's probability; "ranked" its
        log-probability followed by the m largest of the other classes', in descending order; "features" are multiplied
        by a seeded Gaussian matrix of variance 1/d.

        Args:
          logits: of the K classes.
          features: of the penultimate layer.
          labels: int, as trained on.

        Returns:
          kind -> [B] or [B, width]; what is stored as float16 is cut off to its range.
        """
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        values: dict[str, Array] = {}
        for name, (_, dtype) in self.layout().items():
            if self.observed and name not in self.observed:
                continue

            if name in ("loss", "step"):
                values[name] = losses
            elif name == "prob":
                values[name] = jnp.exp(-losses)
            elif name == "logits":
                values[name] = logits
            elif name == "ranked":
                values[name] = self._ranked(logits, labels, losses)
            elif name == "features":
                values[name] = self._projected(features)

            if dtype == jnp.float16:
                values[name] = jnp.clip(values[name], _LOWEST, -_LOWEST)
        return values

    @property
    def _num_ranked_others(self) -> int:
        return min(self.ranked_others, self.num_classes - 1)

    def _ranked(
        self, logits: Float[Array, "B K"], labels: Int[Array, "B"], losses: Float[Array, "B"]
    ) -> Float[Array, "B 1+m"]:
        log_p = jax.nn.log_softmax(logits)
        is_label = jax.nn.one_hot(labels, self.num_classes, dtype=bool)
        others = jnp.where(is_label, -jnp.inf, log_p)
        largest, _ = jax.lax.top_k(others, self._num_ranked_others)
        return jnp.concatenate([-losses[:, None], largest], axis=1)

    def _projected(self, features: Float[Array, "B F"]) -> Float[Array, "B d"]:
        # Drawn anew in each program: from the seed, it is the same on every machine and needs no file.
        key = jax.random.key(self.seed)
        matrix = jax.random.normal(key, (self.num_features, self.feature_dim), jnp.float32)
        matrix = (matrix / self.feature_dim**0.5).astype(features.dtype)

        # At the highest precision, as TPUs, and GPUs with TF32, would round what they multiply.
        return jnp.dot(features, matrix, precision=jax.lax.Precision.HIGHEST)
