"""The jitted steps: one that learns, and three that only look.

None of them sees the data set or the trajectory buffer, so that one program serves sets and recordings of any size.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from badloss_jax.core.mesh import by_rows, jit_on, replicated
from badloss_jax.data import AUGMENTATIONS
from badloss_jax.models import ModelSpec
from badloss_jax.training.batch import Batch
from badloss_jax.training.objective import Forward, MeanLoss
from badloss_jax.training.packed import Packed, pack
from badloss_jax.training.state import Optimizer, TrainState, forward_of, merged, statistics_of
from badloss_jax.trajectories.kinds import Kinds


@lru_cache(maxsize=32)
def make_train_step(
    spec: ModelSpec, optimizer: Optimizer, objective: MeanLoss, augment: str, kinds: Kinds | None, mesh: Mesh
) -> Callable:
    """Compiles (state, batch, epoch, learning_rate, seed, given) -> (state, mean loss, losses [B], values).

    The state is donated; `seed`, uint32, is that of the augmentation; `given` is handed on to the objective. The mean
    is over the batch's examples, each loss clamped for it (and for its gradient); it is not finite if any of them is
    not. `losses` are those of the step's own forward pass, not clamped, and `values`, kind -> [B, ...], what it says of
    each example beside ("step" capture).

    Args:
      spec: the network.
      optimizer: turns gradients into updates, up to the learning rate.
      objective: what is minimised.
      augment: of `AUGMENTATIONS`.
      kinds: of the values, the losses left out; None is none.
      mesh: the devices.

    Returns:
      The jitted step, the same one for equal arguments.
    """
    augmentation = AUGMENTATIONS[augment]

    def step(
        state: TrainState,
        batch: Batch,
        epoch: Int[Array, ""],
        learning_rate: Float[Array, ""],
        seed: Int[Array, ""],
        given: Any,
    ) -> tuple[TrainState, Float[Array, ""], Float[Array, "B"], dict[str, Array]]:
        # A key an example and epoch, so that an image is the same in whatever batch and on whatever device it is.
        key = jax.random.key(seed)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, epoch), i))(batch.ids)
        images = jax.vmap(augmentation)(batch.images.astype(spec.param_dtype), keys)

        def loss_of(learned: tuple[dict[str, Any], Any]) -> tuple[Array, tuple[Packed, Forward]]:
            params, beside = learned
            model = merged(spec, params, state.batch_stats.tree)
            logits, features = model(images, train=True, mask=batch.real)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            forward = Forward(images, batch.labels, batch.real, losses, logits, features)
            return objective(forward, beside, given), (statistics_of(model), forward)

        learned = (state.params.tree, state.beside)
        (_, (stats, forward)), gradients = jax.value_and_grad(loss_of, has_aux=True)(learned)

        updates, opt_state = optimizer.transform().update(gradients, state.optimizer.tree, learned)
        params, beside = jax.tree.map(lambda p, u: p - (learning_rate * u).astype(p.dtype), learned, updates)

        values = kinds.observe(forward.logits, forward.features, batch.labels) if kinds else {}

        # The clamp would hide a loss that is infinite.
        mean = forward.mean(jnp.minimum(forward.losses, objective.clamp))
        finite = jnp.all(jnp.isfinite(forward.losses) | ~batch.real)
        state = TrainState(state.step + 1, pack(params), stats, pack(opt_state), beside)
        return state, jnp.where(finite, mean, jnp.nan), forward.losses, values

    everywhere = replicated(mesh)
    rows = by_rows(mesh)
    return jit_on(
        step,
        mesh,
        donate_argnums=0,
        in_shardings=(everywhere, rows, None, None, None, None),
        out_shardings=(everywhere, everywhere, rows, rows),
    )


@lru_cache(maxsize=32)
def make_sweep_step(spec: ModelSpec, kinds: Kinds, mesh: Mesh) -> Callable:
    """Compiles (state, batch) -> values, kind -> [B, ...]: what an evaluation pass says of each example.

    Args:
      spec: the network.
      kinds: of the values.
      mesh: the devices.

    Returns:
      The jitted step, the same one for equal arguments.
    """

    def step(state: TrainState, batch: Batch) -> dict[str, Array]:
        logits, features = forward_of(spec, state)(batch.images.astype(spec.param_dtype))
        return kinds.observe(logits, features, batch.labels)

    rows = by_rows(mesh)
    return jit_on(step, mesh, in_shardings=(replicated(mesh), rows), out_shardings=rows)


def network_of(spec: ModelSpec, state: TrainState) -> Callable[[Float[Array, "B H W C"]], Float[Array, "B K"]]:
    """Returns the trained network in evaluation mode as a function from images in [0, 1] to logits, differentiable.

    Args:
      spec: the network.
      state: its parameters and statistics.

    Returns:
      `forward_of` without the features.
    """
    forward = forward_of(spec, state)
    return lambda images: forward(images)[0]


@lru_cache(maxsize=32)
def make_predict_step(spec: ModelSpec, mesh: Mesh) -> Callable:
    """Compiles (state, images float32 [B, H, W, C] in [0, 1]) -> predicted classes, int32 [B].

    Args:
      spec: the network.
      mesh: the devices, which share the images.

    Returns:
      The jitted step, the same one for equal arguments.
    """

    def step(state: TrainState, images: Float[Array, "B H W C"]) -> Int[Array, "B"]:
        return network_of(spec, state)(images).argmax(-1)

    return jit_on(step, mesh, in_shardings=(replicated(mesh), by_rows(mesh)), out_shardings=by_rows(mesh))


@lru_cache(maxsize=32)
def make_observe_step(spec: ModelSpec, mesh: Mesh) -> Callable:
    """Compiles (batch, state) -> (logits float32 [B, K], features float32 [B, F]) in evaluation mode.

    Args:
      spec: the network.
      mesh: the devices, which share the results.

    Returns:
      The jitted step, the same one for equal arguments; `map_examples` takes it.
    """

    def step(batch: Batch, state: TrainState) -> tuple[Float[Array, "B K"], Float[Array, "B F"]]:
        return forward_of(spec, state)(batch.images.astype(spec.param_dtype))

    return jit_on(step, mesh, out_shardings=by_rows(mesh))
