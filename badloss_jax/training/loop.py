"""The one training loop: recording, retraining and the undefended model all go through it.

Order of operations in an epoch: shuffle, step over every batch, let the recorder end the epoch, report.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from badloss_jax.data.order import epoch_batches
from badloss_jax.errors import NonFiniteLossError
from badloss_jax.models import ModelSpec
from badloss_jax.progress import Progress
from badloss_jax.seeding import derived_seed
from badloss_jax.training.resident import ResidentData
from badloss_jax.training.state import AdamW, TrainState, create_state
from badloss_jax.training.step import make_train_step
from badloss_jax.trajectories.buffer import padding_id
from badloss_jax.trajectories.recorder import Recorder


@dataclass(frozen=True)
class Recipe:
    """How a phase trains. The learning rate follows the cosine of `schedule_epochs`, stepped once an epoch."""

    epochs: int
    schedule_epochs: int
    batch_size: int
    learning_rate: float = 1e-3
    optimizer: AdamW = field(default_factory=AdamW)
    loss_clamp: float = 100.0
    augment: str = "none"

    def learning_rate_at(self, epoch: int) -> float:
        """Returns the rate of a whole epoch."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / self.schedule_epochs))


def train(
    spec: ModelSpec,
    recipe: Recipe,
    data: ResidentData,
    example_ids: Int[np.ndarray, "M"],
    *,
    seed: int,
    phase: str,
    mesh: Mesh,
    recorder: Recorder | None = None,
    progress: Progress | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> TrainState:
    """Trains a fresh network on the given examples.

    Args:
      spec: the network.
      recipe: epochs, batch size, optimiser, augmentation.
      data: the data set on the devices.
      example_ids: int [M], the examples to train on; each is seen once an epoch.
      seed, phase: determine weights, order and augmentation.
      mesh: the devices.
      recorder: records trajectories of all N examples as it goes.
      progress: shows rate and ETA.
      on_epoch: is called with {epoch, loss, learning_rate, examples_per_second} after each epoch.

    Raises:
      NonFiniteLossError: a loss became NaN or infinite; names the step. What was recorded is stored before.
    """
    state = create_state(spec, recipe.optimizer, derived_seed(seed, phase, "weights"), mesh)
    kinds = recorder.step_kinds if recorder else None
    step = make_train_step(spec, recipe.optimizer, recipe.loss_clamp, recipe.augment, kinds, mesh)
    padding = padding_id(len(data), mesh)
    key = jax.random.key(derived_seed(seed, phase, "augmentation"))
    buffer = recorder.buffer if recorder else {}
    progress = progress or Progress(None)
    progress.begin(recipe.epochs * len(example_ids))
    for epoch in range(recipe.epochs):
        started, losses = time.monotonic(), []
        batches = epoch_batches(example_ids, recipe.batch_size, padding, seed=seed, phase=phase, epoch=epoch)
        learning_rate = np.float32(recipe.learning_rate_at(epoch))
        for number, batch in enumerate(batches):
            state, buffer, loss = step(state, buffer, data, batch, np.int32(epoch), learning_rate, key)
            if recorder:
                recorder.buffer = buffer
            losses.append(loss)
            if number:  # the loss before, so that the devices never wait for the host
                _check_finite(losses[-2], epoch, number - 1, len(batches), phase, recorder)
            progress.advance(int(np.count_nonzero(batch < padding)), f"epoch {epoch + 1}/{recipe.epochs}")
        _check_finite(losses[-1], epoch, len(batches) - 1, len(batches), phase, recorder)
        if recorder:
            recorder.end_epoch(spec, state, data, epoch)
            buffer = recorder.buffer
        weights = (batches < padding).sum(1)
        mean_loss = float(np.average(np.array(losses, np.float64), weights=weights))
        seconds = time.monotonic() - started
        progress.say(f"epoch {epoch + 1}/{recipe.epochs}  loss {mean_loss:.4f}")
        if on_epoch:
            on_epoch({"epoch": epoch, "loss": mean_loss, "learning_rate": float(learning_rate),
                      "examples_per_second": len(example_ids) / seconds})  # fmt: skip
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params)):
        raise NonFiniteLossError(f"the last update of phase {phase!r} made the network's weights NaN or infinite")
    progress.end()
    return state


def _check_finite(loss: jax.Array, epoch: int, number: int, steps: int, phase: str, recorder: Recorder | None) -> None:
    if math.isfinite(float(loss)):
        return
    kept = ""
    if recorder:
        recorder.flush(epoch)
        kept = f"; what was recorded up to then is kept in {recorder.store.folder}"
    raise NonFiniteLossError(
        f"the loss became NaN or infinite in phase {phase!r} at step {epoch * steps + number} (epoch {epoch}, batch"
        f" {number}){kept}. A smaller --config.optimizer.learning_rate, or float32 instead of bfloat16, usually"
        " helps, in another --workdir"
    )
