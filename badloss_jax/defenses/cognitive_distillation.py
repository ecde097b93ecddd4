"""Cognitive distillation (Huang et al., ICLR 2023, section 3): a trigger is all that a network looks at.

For each image, the smallest mask is optimised that leaves the attacked network's logits as they are when what it hides
is replaced by random colours. Images that small a part suffices for are removed.

Masks, steps and weights are those of the paper's logit variant, as in its authors' program: one mask for all channels,
(tanh + 1) / 2 of what Adam moves, its betas 0.1; at every step one colour an image. A share is removed, as in BaDLoss'
comparison, in place of a threshold on the probes' mean and deviation. Each image has random numbers of its own, so that
neither batches nor devices change its mask, and its objective is summed over a batch, not averaged.

The steps are a loop in Python, and each is compiled: a convolution in a `lax` loop is slow on CPUs, and on accelerators
a step of a whole batch takes longer than its dispatch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from badloss_jax.core.mesh import by_rows, jit_on, replicated
from badloss_jax.core.seeding import derived_seed
from badloss_jax.defenses.context import Context, Suspicion
from badloss_jax.models import ModelSpec
from badloss_jax.scoring import reject
from badloss_jax.training.batch import Batch
from badloss_jax.training.state import TrainState
from badloss_jax.training.step import network_of

_NAME = "cognitive_distillation"
_BETAS = 0.1, 0.1  # of Adam, as in the authors' program: it all but follows the gradients' signs


@dataclass(frozen=True)
class Distillation:
    """How masks are optimised.

    Attributes:
      steps: of Adam.
      learning_rate: of Adam.
      l1_weight: of the sum of a mask.
      variation_weight: of its total variation.
    """

    steps: int
    learning_rate: float
    l1_weight: float
    variation_weight: float

    def optimizer(self) -> optax.GradientTransformation:
        """Returns the optax transformation."""
        return optax.adam(self.learning_rate, *_BETAS)


def mask_of(raw: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Maps what is optimised to a mask, in (0, 1)."""
    return (jnp.tanh(raw) + 1) / 2


def total_variation(masks: Float[Array, "B H W 1"]) -> Float[Array, "B"]:
    """Sums the squared differences of neighbours, down and across, divided by the number of pixels."""
    down = jnp.diff(masks, axis=1)
    across = jnp.diff(masks, axis=2)
    squares = jnp.sum(down**2, (1, 2, 3)) + jnp.sum(across**2, (1, 2, 3))
    return squares / (masks.shape[1] * masks.shape[2])


def objective(
    raw: Float[Array, "B H W 1"],
    images: Float[Array, "B H W C"],
    logits: Float[Array, "B K"],
    colours: Float[Array, "B 1 1 C"],
    network: Callable[[Float[Array, "B H W C"]], Float[Array, "B K"]],
    how: Distillation,
) -> Float[Array, "B"]:
    """Computes mean |logits' change| + l1_weight * sum(mask) + variation_weight * total variation, of each image.

    Args:
      raw: what `mask_of` makes masks of.
      images: in [0, 1].
      logits: of the images as they are.
      colours: in [0, 1], of what the masks hide.
      network: from images to logits.
      how: the weights.
    """
    masks = mask_of(raw)
    shown = images * masks + colours * (1 - masks)
    changed = jnp.abs(network(shown) - logits).mean(-1)

    return changed + how.l1_weight * masks.sum((1, 2, 3)) + how.variation_weight * total_variation(masks)


@lru_cache(maxsize=8)
def make_distill(
    spec: ModelSpec, how: Distillation, mesh: Mesh
) -> Callable[[Batch, TrainState, Int[np.ndarray, ""]], Float[Array, "B"]]:
    """Returns (batch, network's state, seed) -> L1 norms of the images' masks, float32 [B] in (0, H W).

    Args:
      spec: the network that is looked into.
      how: the masks are optimised.
      mesh: the devices that share a batch.
    """
    rows = by_rows(mesh)
    # Adam's count is the only part of the moments that has no rows.
    example = how.optimizer().init(jnp.ones((1, 1, 1, 1)))
    of_moments = jax.tree.map(lambda leaf: rows if leaf.ndim else replicated(mesh), example)

    begin = jit_on(_begin_of(spec, how), mesh, out_shardings=(rows, rows, rows, of_moments))
    step = jit_on(_step_of(spec, how), mesh, donate_argnums=(0, 1), out_shardings=(rows, of_moments))
    norm = jax.jit(lambda raw: mask_of(raw).sum((1, 2, 3)), out_shardings=rows)

    def distill(batch: Batch, state: TrainState, seed: Int[np.ndarray, ""]) -> Float[Array, "B"]:
        images, logits, raw, moments = begin(batch, state)
        for number in range(how.steps):
            raw, moments = step(raw, moments, batch.ids, images, logits, state, seed, np.int32(number))
        return norm(raw)

    return distill


def _begin_of(spec: ModelSpec, how: Distillation) -> Callable[[Batch, TrainState], tuple[Array, Array, Array, Any]]:
    """Returns (batch, state) -> (images, their logits, what masks are made of, Adam's moments)."""

    def begin(batch: Batch, state: TrainState) -> tuple[Array, Array, Array, Any]:
        images = batch.images.astype(spec.param_dtype)
        raw = jnp.ones((*images.shape[:3], 1), images.dtype)
        return images, network_of(spec, state)(images), raw, how.optimizer().init(raw)

    return begin


def _step_of(spec: ModelSpec, how: Distillation) -> Callable[..., tuple[Array, Any]]:
    """Returns one step of Adam: (raw, moments, ...) -> (raw, moments)."""
    optimizer = how.optimizer()

    def step(
        raw: Array,
        moments: Any,
        ids: Array,
        images: Array,
        logits: Array,
        state: TrainState,
        seed: Int[Array | np.ndarray, ""],
        number: Int[Array | np.integer, ""],
    ) -> tuple[Array, Any]:
        # By example, so that neither batches nor devices change an image's colours.
        key = jax.random.fold_in(jax.random.key(seed), number)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
        colours = jax.vmap(lambda k: jax.random.uniform(k, (1, 1, images.shape[-1]), images.dtype))(keys)

        network = network_of(spec, state)
        gradient = jax.grad(lambda r: objective(r, images, logits, colours, network, how).sum())(raw)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(raw, updates), moments

    return step


def cognitive_distillation(context: Context, settings: Mapping[str, Any]) -> Suspicion:
    """Removes the share of the examples whose masks are smallest.

    Args:
      context: what every defence is given.
      settings: `config.defenses.cognitive_distillation`.

    Returns:
      Scores, minus the masks' L1 norms in pixels.
    """
    how = Distillation(
        steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        l1_weight=settings["l1_weight"],
        variation_weight=settings["variation_weight"],
    )
    distill = make_distill(context.spec, how, context.mesh)
    seed = np.uint32(derived_seed(context.seed, _NAME))
    norms = context.map(distill, context.attacked(), seed, title=f"{_NAME} masks")

    scores = -norms.astype(np.float64)
    no_p_values = np.ones(len(scores))  # a share of the ranks needs none
    removed = reject("fraction", settings["fraction"], scores, no_p_values, context.is_probe)
    return Suspicion(scores, removed=removed)
