"""Poisoned samples by their sensitivity (Chen et al., NeurIPS 2022), and the backdoor's removal: D-BR.

Triggers stand still: turned and shifted, a poisoned image loses what the network saw in it, and its features move
further than a clean one's (section 4.1, "feature consistency towards transformations", FCT). A network that has been
trained for few epochs, without augmentation, tells them apart best: it has learned the triggers and little else. From
the examples that move furthest the attacked network unlearns, from those that move least it relearns, an epoch each in
turns (section 4.3).

- The paper and its program fine-tune the early network to push the classes' mean features apart; here that is left out.
- The paper calls the 20 % clean that move least; here, as in the program of BaDLoss's authors, all below the 0.80
  quantile.
- Both unlearn by SGD with momentum; here the recipe's optimiser does, which goes on from one turn to the next.
- Both sample the nearest pixel of the turned image; here it is bilinear.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from badloss_jax.core.errors import UsageError
from badloss_jax.core.mesh import by_rows, jit_on
from badloss_jax.core.seeding import derived_seed
from badloss_jax.defenses.context import Cleansed, Context
from badloss_jax.models import ModelSpec
from badloss_jax.training.batch import Batch
from badloss_jax.training.objective import Ascent
from badloss_jax.training.state import TrainState, forward_of

_SHIFT = 0.2  # largest, share of the height and of the width


def pss(context: Context, settings: Mapping[str, Any]) -> Cleansed:
    """Splits the training set by feature consistency, unlearns the one part and relearns the other, in turns.

    Args:
      context: what every defence is given.
      settings: `config.defenses.pss`.

    Returns:
      The network, and how many examples were called clean and poisoned.

    Raises:
      UsageError: the quantiles overlap, or leave nothing to learn from.
    """
    early = _train_early(context, settings["early_epochs"])
    moved = _consistency(context, early)
    clean, poisoned = split(moved, settings["clean_quantile"], settings["poisoned_quantile"])

    relearn = replace(context.recipe, epochs=1, schedule_epochs=1, learning_rate=settings["learning_rate"])
    unlearn = replace(relearn, objective=Ascent(relearn.objective.clamp))

    # Each training uses the state up that it begins with, so only the latest is kept.
    state = context.attacked()
    for epoch in range(settings["epochs"]):
        state = context.train(f"unlearn {epoch}", unlearn, ids=poisoned, initial=state)
        state = context.train(f"relearn {epoch}", relearn, ids=clean, initial=state)

    details = {"called_clean": len(clean), "called_poisoned": len(poisoned)}
    return Cleansed(state, details)


def _train_early(context: Context, epochs: int) -> TrainState:
    """Trains the network whose features are compared, without augmentation, for few epochs of the whole schedule."""
    schedule_epochs = max(epochs, context.recipe.schedule_epochs)
    recipe = replace(context.recipe, epochs=epochs, schedule_epochs=schedule_epochs, augment="none")
    return context.train("early", recipe)


def _consistency(context: Context, early: TrainState) -> Float[np.ndarray, "N"]:
    """Measures how far each example's features move when it is turned and shifted."""
    step = make_consistency_step(context.spec, context.mesh)
    seed = np.uint32(derived_seed(context.seed, "pss", "transformation"))
    return context.map(step, early, seed, title="feature consistency")


def trainings_of_pss(settings: Mapping[str, Any]) -> int:
    """Returns how many trainings `pss` asks for: the early network's, then two an epoch."""
    return 1 + 2 * settings["epochs"]


def split(
    moved: Float[np.ndarray, "N"], clean_quantile: float, poisoned_quantile: float
) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "L"]]:
    """Returns the ids below the one quantile, called clean, and above the other, called poisoned; both ascending.

    Ties at a quantile go by id.

    Args:
      moved: [N], how far each example's features move.
      clean_quantile: 0 to 1.
      poisoned_quantile: 0 to 1, at least the other.

    Raises:
      UsageError: the quantiles overlap, or leave nothing to learn from.
    """
    low = int(clean_quantile * len(moved))
    high = int(poisoned_quantile * len(moved))
    if clean_quantile > poisoned_quantile or not low:
        raise UsageError(
            f"defenses.pss.clean_quantile = {clean_quantile} with poisoned_quantile = {poisoned_quantile} and"
            f" {len(moved)} examples: expected some below the first, which is at most the second"
        )

    order = np.argsort(moved, kind="stable")
    return np.sort(order[:low]), np.sort(order[high:])


def transform(image: Float[Array, "H W C"], key: Key[Array, ""]) -> Float[Array, "H W C"]:
    """Turns an image around its centre by any angle, and shifts it by up to 20 % each way; what comes in is black.

    Args:
      image: in [0, 1].
      key: of the angle and the shift.
    """
    for_angle, for_shift = jax.random.split(key)
    angle = jax.random.uniform(for_angle, (), image.dtype, -jnp.pi, jnp.pi)

    size = jnp.array(image.shape[:2], image.dtype)
    shift = size * jax.random.uniform(for_shift, (2,), image.dtype, -_SHIFT, _SHIFT)
    return resample(image, angle, shift)


def resample(image: Float[Array, "H W C"], angle: Float[Array, ""], shift: Float[Array, "2"]) -> Float[Array, "H W C"]:
    """Turns an image counter-clockwise around its centre, then shifts it; bilinear, 0 outside.

    Args:
      image: in [0, 1].
      angle: in radians.
      shift: down and to the right, in pixels.
    """
    height, width, _ = image.shape
    centre = (jnp.array([height, width], image.dtype) - 1) / 2
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")

    # Backwards: where in the image each pixel of the result comes from.
    down = rows - centre[0] - shift[0]
    right = columns - centre[1] - shift[1]
    cosine = jnp.cos(angle)
    sine = jnp.sin(angle)
    sources = [cosine * down + sine * right + centre[0], cosine * right - sine * down + centre[1]]

    def channel(values: Float[Array, "H W"]) -> Float[Array, "H W"]:
        return jax.scipy.ndimage.map_coordinates(values, sources, order=1, mode="constant", cval=0.0)

    return jax.vmap(channel, -1, -1)(image)


@lru_cache(maxsize=32)
def make_consistency_step(spec: ModelSpec, mesh: Mesh) -> Callable:
    """Compiles (batch, state, seed uint32) -> squared distances of the features of each image and of it transformed.

    Float32 or wider [B], in evaluation mode. The transformation is drawn by seed and example id.

    Args:
      spec: the network.
      mesh: the devices that share a batch.
    """

    def step(batch: Batch, state: TrainState, seed: Int[Array, ""]) -> Float[Array, "B"]:
        images = batch.images.astype(spec.param_dtype)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), batch.ids)

        forward = forward_of(spec, state)
        _, features = forward(images)
        _, moved = forward(jax.vmap(transform)(images, keys))
        return jnp.sum((features - moved) ** 2, -1)

    return jit_on(step, mesh, out_shardings=by_rows(mesh))
