"""The one training loop: recording, retraining and the undefended model all go through it.

Order of operations in an epoch: shuffle, step over every batch, checkpointing where it is due, let the recorder end the
epoch, report.
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

from badloss_jax.core.errors import NonFiniteLossError
from badloss_jax.core.order import epoch_batches
from badloss_jax.core.progress import Progress
from badloss_jax.core.seeding import derived_seed
from badloss_jax.models import ModelSpec
from badloss_jax.training.batch import Examples
from badloss_jax.training.checkpoint import Checkpoints, Position
from badloss_jax.training.objective import MeanLoss
from badloss_jax.training.recorder import Recorder
from badloss_jax.training.state import AdamW, Optimizer, TrainState, create_state
from badloss_jax.training.step import make_train_step
from badloss_jax.training.streamed import StreamedData
from badloss_jax.training.watchdog import Watchdog
from badloss_jax.trajectories.buffer import padding_id


@dataclass(frozen=True)
class Recipe:
    """How a phase trains. The learning rate follows the cosine of `schedule_epochs`, stepped once an epoch."""

    epochs: int
    schedule_epochs: int
    batch_size: int
    learning_rate: float = 1e-3
    optimizer: Optimizer = field(default_factory=AdamW)
    objective: MeanLoss = field(default_factory=MeanLoss)
    augment: str = "none"

    def learning_rate_at(self, epoch: int) -> float:
        """Returns the rate of a whole epoch."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / self.schedule_epochs))


def train(
    spec: ModelSpec,
    recipe: Recipe,
    data: Examples,
    example_ids: Int[np.ndarray, "M"],
    *,
    seed: int,
    phase: str,
    mesh: Mesh,
    initial: TrainState | None = None,
    given: Any = None,
    recorder: Recorder | None = None,
    checkpoints: Checkpoints | None = None,
    watchdog: Watchdog | None = None,
    progress: Progress | None = None,
    on_begin: Callable[[Position, int], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> TrainState:
    """Trains a network on the given examples, from the last checkpoint if there is one.

    Args:
      spec: the network.
      recipe: epochs, batch size, optimiser, augmentation.
      data: the data set, on the devices or on its way to them.
      example_ids: int [M], the examples to train on; each is seen once an epoch.
      seed, phase: determine weights, order and augmentation.
      mesh: the devices.
      initial: where to begin in place of fresh weights; it is used up, for its arrays are donated.
      given: what the recipe's objective asks for at every step.
      recorder: records trajectories of all N examples as it goes.
      checkpoints: open ones; the training goes on from them and is saved in them.
      watchdog: an open one; is told of every step.
      progress: shows rate and ETA.
      on_begin: is called with where the training begins, and how many steps were done before.
      on_epoch: is called with {epoch, loss, learning_rate, examples_per_second, input_wait} after each epoch; the last
        is the share of the time that the loop waited for images.

    Raises:
      NonFiniteLossError: a loss became NaN or infinite; names the step. What was recorded is stored before.
      PreemptedError: the run is to stop; a checkpoint is saved.
    """
    weights_seed = derived_seed(seed, phase, "weights")
    state = initial or create_state(spec, recipe.optimizer, weights_seed, mesh, recipe.objective)
    kinds = recorder.step_kinds if recorder else None
    step = make_train_step(spec, recipe.optimizer, recipe.objective, recipe.augment, kinds, mesh)
    padding = padding_id(len(data), mesh)
    augmentation_seed = np.uint32(derived_seed(seed, phase, "augmentation"))
    buffer, begun, began = recorder.buffer if recorder else {}, Position(), time.monotonic()
    if checkpoints:
        state, buffer, begun = checkpoints.restore(state, buffer)
        if recorder:
            recorder.resume(buffer, begun.epoch)
    progress, watchdog = progress or Progress(None), watchdog or Watchdog(0)
    steps = -(-len(example_ids) // recipe.batch_size)
    done = begun.epoch * len(example_ids) + min(begun.step * recipe.batch_size, len(example_ids))
    progress.begin(recipe.epochs * len(example_ids), done)
    if on_begin:
        on_begin(begun, begun.epoch * steps + begun.step)
    for epoch in range(begun.epoch, recipe.epochs):
        at = begun if epoch == begun.epoch else Position(epoch)
        started, waited, first_step = time.monotonic(), 0.0, at.step
        order = epoch_batches(example_ids, recipe.batch_size, padding, seed=seed, phase=phase, epoch=epoch)
        learning_rate = np.float32(recipe.learning_rate_at(epoch))
        batches, losses = data.batches(order, at.step), []
        for number in range(at.step, steps):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            state, buffer, loss = step(state, buffer, batch, np.int32(epoch), learning_rate, augmentation_seed,
                                       given)  # fmt: skip
            if recorder:
                recorder.buffer = buffer
            losses.append(loss)
            if len(losses) > 1:  # the loss before, so that the devices never wait for the host
                losses[-2] = _finite(losses[-2], epoch, number - 1, steps, phase, recorder)
            watchdog.alive()
            progress.advance(int(np.count_nonzero(order[number] < padding)), f"epoch {epoch + 1}/{recipe.epochs}")
            if checkpoints and checkpoints.due(epoch * steps + number + 1):
                losses[-1] = _finite(loss, epoch, number, steps, phase, recorder)
                spent = begun.seconds + time.monotonic() - began
                at = Position(epoch, number + 1, at.losses + tuple(losses), spent)
                losses = []
                checkpoints.save(state, buffer, at, epoch * steps + number + 1)
        if losses:
            losses[-1] = _finite(losses[-1], epoch, steps - 1, steps, phase, recorder)
        if recorder:
            recorder.end_epoch(spec, state, data, epoch)
            buffer = recorder.buffer
        watchdog.alive()
        weights = (order < padding).sum(1)
        mean_loss = float(np.average(np.array(at.losses + tuple(losses), np.float64), weights=weights))
        seconds = time.monotonic() - started
        seen = int(weights[first_step:].sum())
        share = f"  input {100 * waited / seconds:.0f} %" if isinstance(data, StreamedData) else ""
        progress.say(f"epoch {epoch + 1}/{recipe.epochs}  loss {mean_loss:.4f}{share}")
        if on_epoch:
            on_epoch({"epoch": epoch, "loss": mean_loss, "learning_rate": float(learning_rate),
                      "examples_per_second": seen / seconds, "input_wait": waited / seconds})  # fmt: skip
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params)):
        raise NonFiniteLossError(f"the last update of phase {phase!r} made the network's weights NaN or infinite")
    progress.end()
    return state


def _finite(loss: jax.Array, epoch: int, number: int, steps: int, phase: str, recorder: Recorder | None) -> float:
    """Waits for a step's mean loss, and returns it."""
    value = float(loss)
    if math.isfinite(value):
        return value
    kept = ""
    if recorder:
        recorder.flush(epoch)
        kept = f"; what was recorded up to then is kept in {recorder.store.folder}"
    raise NonFiniteLossError(
        f"the loss became NaN or infinite in phase {phase!r} at step {epoch * steps + number} (epoch {epoch}, batch"
        f" {number}){kept}. A smaller --config.optimizer.learning_rate, or float32 instead of bfloat16, usually"
        " helps, in another --workdir"
    )
