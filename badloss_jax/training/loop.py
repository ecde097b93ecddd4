"""The one training loop: recording, retraining and the undefended model all go through it.

Order of operations in an epoch (`_Phase.run_epoch`): shuffle; for every batch pull it, step, check the losses of steps
before, and save a checkpoint where one is due; then let the recorder end the epoch, and report.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from badloss_jax.core.errors import NonFiniteLossError
from badloss_jax.core.mesh import place, replicated, to_host
from badloss_jax.core.order import TrainingPasses
from badloss_jax.core.progress import Progress
from badloss_jax.core.seeding import derived_seed
from badloss_jax.models import ModelSpec
from badloss_jax.training.batch import Batch, Examples
from badloss_jax.training.checkpoint import Checkpoints, Position
from badloss_jax.training.in_flight import InFlight
from badloss_jax.training.objective import MeanLoss
from badloss_jax.training.recorder import Recorder
from badloss_jax.training.state import AdamW, Optimizer, TrainState, create_state
from badloss_jax.training.step import make_train_step
from badloss_jax.training.streamed import StreamedData
from badloss_jax.training.watchdog import Watchdog
from badloss_jax.trajectories.buffer import padding_id


@dataclass(frozen=True)
class Recipe:
    """How a phase trains. The learning rate follows the cosine of `schedule_epochs`, stepped once an epoch.

    Attributes:
      epochs: that it trains for.
      schedule_epochs: after which the learning rate would be 0.
      batch_size: B.
      learning_rate: of the first epoch.
      optimizer: what turns gradients into updates.
      objective: what is minimised.
      augment: of `badloss_jax.data.AUGMENTATIONS`.
    """

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


@dataclass(frozen=True)
class Passengers:
    """What goes along with a training. Nothing of it changes what is learnt.

    Attributes:
      recorder: records trajectories of all N examples.
      checkpoints: open ones; the training goes on from them and is saved in them.
      watchdog: an open one; is told of every step.
      progress: shows rate and ETA.
      on_begin: is called with where the training begins, and how many steps were done before.
      on_epoch: is called with {epoch, loss, learning_rate, examples_per_second, input_wait} after each epoch; the last
        is the share of the time that the loop waited for images.
    """

    recorder: Recorder | None = None
    checkpoints: Checkpoints | None = None
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(0))
    progress: Progress = field(default_factory=lambda: Progress(None))
    on_begin: Callable[[Position, int], None] | None = None
    on_epoch: Callable[[dict[str, Any]], None] | None = None


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
    passengers: Passengers | None = None,
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
      passengers: the recorder, checkpoints and whoever is told how it goes; none by default.

    Returns:
      The state after the last update, replicated over the mesh.

    Raises:
      NonFiniteLossError: a loss became NaN or infinite; names the step. What was recorded is stored before.
      PreemptedError: the run is to stop; a checkpoint is saved.
    """
    state = initial
    if state is None:
        state = create_state(spec, recipe.optimizer, derived_seed(seed, phase, "weights"), mesh, recipe.objective)
    passengers = passengers or Passengers()
    recorder = passengers.recorder
    step_kinds = recorder.step_kinds if recorder else None

    started = time.monotonic()
    begun = Position()
    if passengers.checkpoints:
        # The fresh arrays say which dtypes, shapes and shardings a checkpoint has to fit.
        state, column, begun = passengers.checkpoints.restore(state, recorder.column if recorder else {})
        if recorder:
            recorder.resume(column, begun.epoch, passengers.checkpoints.folder)

    passes = TrainingPasses(
        example_ids,
        recipe.batch_size,
        padding_id(len(data), mesh),
        seed,
        phase,
        recipe.epochs,
        recorder.swept if recorder else 0,
        recorder.batch_size if recorder else 1,
    )
    running = _Phase(
        name=phase,
        spec=spec,
        recipe=recipe,
        data=data,
        passes=passes,
        seed=seed,
        given=given,
        mesh=mesh,
        step=make_train_step(spec, recipe.optimizer, recipe.objective, recipe.augment, step_kinds, mesh),
        recorder=recorder,
        checkpoints=passengers.checkpoints,
        watchdog=passengers.watchdog,
        progress=passengers.progress,
        origin=started - begun.seconds,
    )
    running.progress.begin(recipe.epochs * len(example_ids), running.examples_done(begun))
    if passengers.on_begin:
        passengers.on_begin(begun, running.steps_done(begun))

    with closing(data.stream(passes, passes.number_of(begun.epoch), begun.step)) as batches:
        for epoch in range(begun.epoch, recipe.epochs):
            position = begun if epoch == begun.epoch else Position(epoch)
            state, report = running.run_epoch(state, position, batches)
            if passengers.on_epoch:
                passengers.on_epoch(report)

    # No loss was computed with the weights of the last update. On the host, as a program that looks at hundreds of
    # arrays takes seconds to compile.
    if not all(np.isfinite(to_host(leaf)).all() for leaf in jax.tree.leaves(state.params)):
        raise NonFiniteLossError(f"the last update of phase {phase!r} made the network's weights NaN or infinite")
    running.progress.end()
    return state


@dataclass(frozen=True)
class _Phase:
    """What stays the same through one training, and its epoch.

    Attributes:
      passes: over the examples.
      step: as `make_train_step` compiles it.
      origin: seconds, the monotonic clock's when this training would have begun, had it never been stopped.
    """

    name: str
    spec: ModelSpec
    recipe: Recipe
    data: Examples
    passes: TrainingPasses
    seed: int
    given: Any
    mesh: Mesh
    step: Callable
    recorder: Recorder | None
    checkpoints: Checkpoints | None
    watchdog: Watchdog
    progress: Progress
    origin: float

    @property
    def steps_per_epoch(self) -> int:
        """S; the last batch counts even if it is not full."""
        return math.ceil(self.num_examples / self.recipe.batch_size)

    @property
    def num_examples(self) -> int:
        """M, that are trained on."""
        return len(self.passes.example_ids)

    def steps_done(self, position: Position) -> int:
        """Counts the steps since the beginning of the training."""
        return position.epoch * self.steps_per_epoch + position.step

    def examples_done(self, position: Position) -> int:
        """Counts the examples trained on since the beginning of the training."""
        in_this_epoch = min(position.step * self.recipe.batch_size, self.num_examples)
        return position.epoch * self.num_examples + in_this_epoch

    def run_epoch(
        self, state: TrainState, begun: Position, batches: Iterator[Batch]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Trains from a position to the end of its epoch.

        Args:
          state: is used up, for its arrays are donated.
          begun: where to begin, in the middle of an epoch after a stop.
          batches: from there on.

        Returns:
          The state after the epoch, and what `on_epoch` is called with.
        """
        epoch = begun.epoch
        clock = _Clock()
        step_losses = _Losses(self, begun)
        learning_rate = self.recipe.learning_rate_at(epoch)
        augmentation_seed = derived_seed(self.seed, self.name, "augmentation")
        # Copied to the devices here, and not at each step.
        constants = (np.int32(epoch), np.float32(learning_rate), np.uint32(augmentation_seed))
        constants = place(constants, replicated(self.mesh))

        order = self.passes.order(self.passes.number_of(epoch))
        batch_sizes = (order < self.passes.padding_id).sum(1)

        for number in range(begun.step, self.steps_per_epoch):
            batch = clock.pull(batches)
            state, mean_loss, losses, values = self.step(state, batch, *constants, self.given)
            if self.recorder:
                self.recorder.end_step(batch, losses, values)

            # Waits for the loss of a step before, while the devices are at work on later ones.
            step_losses.append(mean_loss)
            self.watchdog.alive()
            self.progress.advance(int(batch_sizes[number]), self._title(epoch))
            self._save_if_due(state, Position(epoch, number + 1), step_losses)

        # Before the recorder looks: a loss that is not finite is reported with its step.
        settled = step_losses.settled()
        if self.recorder:
            self.recorder.end_epoch(self.spec, state, batches, epoch)
        self.watchdog.alive()

        # The mean is that of the whole epoch, the rate only that of what was trained on since a stop.
        trained_on = int(batch_sizes[begun.step :].sum())
        loss = float(np.average(np.array(settled, np.float64), weights=batch_sizes))
        return state, self._report(epoch, loss, float(np.float32(learning_rate)), trained_on, clock)

    def finite(self, loss: jax.Array, position: Position) -> float:
        """Waits for a step's mean loss.

        Args:
          loss: on the devices.
          position: before the step.

        Returns:
          The loss on the host.

        Raises:
          NonFiniteLossError: it is NaN or infinite; what was recorded is stored before.
        """
        value = float(loss)
        if math.isfinite(value):
            return value

        kept = ""
        if self.recorder and (position.epoch or self.recorder.column):
            self.recorder.flush(position.epoch)
            kept = f"; what was recorded up to then is kept in {self.recorder.store.folder}"
        raise NonFiniteLossError(
            f"the loss became NaN or infinite in phase {self.name!r} at step {self.steps_done(position)} (epoch"
            f" {position.epoch}, batch {position.step}){kept}. A smaller --config.optimizer.learning_rate, or float32"
            " instead of bfloat16, usually helps, in another --workdir"
        )

    def _title(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self.recipe.epochs}"

    def _save_if_due(self, state: TrainState, position: Position, losses: "_Losses") -> None:
        steps_done = self.steps_done(position)
        if self.checkpoints is None:
            return
        if self.checkpoints.times(steps_done):
            losses.settled()
        if not self.checkpoints.due(steps_done):
            return

        # The losses first: nothing is saved of a network that has diverged.
        step_losses = losses.settled()
        seconds = time.monotonic() - self.origin
        column = self.recorder.column if self.recorder else {}
        self.checkpoints.save(state, column, replace(position, losses=step_losses, seconds=seconds), steps_done)

    def _report(
        self, epoch: int, mean_loss: float, learning_rate: float, trained_on: int, clock: "_Clock"
    ) -> dict[str, Any]:
        """Shows how an epoch went, and returns what `on_epoch` is called with."""
        seconds = clock.seconds
        waiting = clock.waited / seconds

        line = f"{self._title(epoch)}  loss {mean_loss:.4f}"
        if isinstance(self.data, StreamedData):
            line += f"  input {100 * waiting:.0f} %"
        self.progress.say(line)

        return {
            "epoch": epoch,
            "loss": mean_loss,
            "learning_rate": learning_rate,
            "examples_per_second": trained_on / seconds,
            "input_wait": waiting,
        }


class _Losses:
    """The mean losses of an epoch's steps, the last of which are in flight."""

    def __init__(self, phase: _Phase, begun: Position):
        self._phase = phase
        self._epoch = begun.epoch
        self._settled = list(begun.losses)
        self._in_flight = InFlight(self._settle, phase.mesh)

    def append(self, loss: jax.Array) -> None:
        """Adds the loss of a step that was just started; may wait for earlier ones."""
        self._in_flight.append(loss)

    def settled(self) -> tuple[float, ...]:
        """Waits for all losses, and returns them."""
        self._in_flight.settle_all()
        return tuple(self._settled)

    def _settle(self, loss: jax.Array) -> None:
        position = Position(self._epoch, len(self._settled))
        self._settled.append(self._phase.finite(loss, position))


class _Clock:
    """The time that an epoch takes, and how much of it the loop waits for images, in seconds."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.waited = 0.0

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return time.monotonic() - self._started

    def pull(self, batches: Iterator[Batch]) -> Batch:
        """Takes the next batch, and adds up how long that took."""
        asked = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - asked
        return batch
