"""Narcissus: a clean-label attack by one perturbation that shouts the target class (Zeng et al. 2023).

The authors of BaDLoss load the perturbation from a file that is not public. Here it is optimised on a surrogate
network, which the experiment trains on the clean training set and hands over.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from badloss_jax.attacks.trigger import ImageShape, Trigger, add
from badloss_jax.core.errors import UsageError
from badloss_jax.core.seeding import generator

_BATCH = 128


def narcissus(
    image_shape: ImageShape,
    seed: int = 0,
    strength: float = 1.0,
    *,
    perturbation: Int[np.ndarray, "..."] | None = None,
) -> Trigger:
    """Adds `strength` times the perturbation, and clips.

    Args:
      image_shape: (H, W, C).
      seed: not used.
      strength: factor of the perturbation; 1 leaves it as it was optimised.
      perturbation: integers in 1/255, [H, W, C] or flattened.

    Returns:
      The trigger.

    Raises:
      UsageError: there is no perturbation, or it does not fit the images.
    """
    if perturbation is None:
        raise UsageError("attack 'narcissus' needs its perturbation: optimise one, or take a manifest that has it")
    if perturbation.size != np.prod(image_shape):
        raise UsageError(f"a perturbation of {perturbation.size} values does not fit images of {image_shape}")
    return add(strength * perturbation.reshape(image_shape) / 255)


def optimise_perturbation(
    logits_of: Callable[[Float[Array, "B H W C"]], Float[Array, "B K"]],
    images: UInt8[np.ndarray, "M H W C"],
    target: int,
    epsilon: int,
    steps: int,
    seed: int,
) -> Int[np.ndarray, "H W C"]:
    """Finds one perturbation that makes images of the target class look even more like it (Zeng et al. 2023).

    Projected gradient descent on the mean cross-entropy of the target class over batches of 128 images: steps along the
    gradient's sign, of epsilon / 10 falling linearly to 0, each followed by a projection onto the ball.

    Args:
      logits_of: the surrogate, differentiable; images are in [0, 1].
      images: uint8 [M, H, W, C], clean images of the target class.
      target: the class.
      epsilon: the largest absolute change of a pixel, in 1/255.
      steps: of gradient descent.
      seed: of the batches.

    Returns:
      int8 [H, W, C] in 1/255, from -epsilon to epsilon.
    """

    def loss(perturbation: Array, batch: Array) -> Array:
        logits = logits_of(jnp.clip(batch + perturbation, 0, 1))
        labels = jnp.full(len(batch), target)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(perturbation: Array, batch: Array, size: Array) -> Array:
        moved = perturbation - size * jnp.sign(jax.grad(loss)(perturbation, batch))
        return jnp.clip(moved, -epsilon / 255, epsilon / 255)

    draw = generator(seed, "perturbation")
    # Batches have one size, so that `step` is compiled once; of fewer images some come twice.
    too_few = len(images) < _BATCH
    perturbation = jnp.zeros(images.shape[1:], jnp.float32)
    for number in range(steps):
        rows = draw.choice(len(images), _BATCH, replace=too_few)
        batch = images[rows].astype(np.float32) / 255
        size = np.float32(epsilon / 255 / 10 * (1 - number / steps))
        perturbation = step(perturbation, batch, size)

    return np.round(np.asarray(perturbation) * 255).astype(np.int8)
