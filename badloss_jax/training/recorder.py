"""The recorder that the trainer carries along: after each epoch every example has one more entry in its trajectory."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from badloss_jax.core.errors import DataError, NonFiniteLossError
from badloss_jax.core.memory import check_device_memory
from badloss_jax.core.mesh import process_blocks
from badloss_jax.core.processes import all_of, on_all, on_first
from badloss_jax.models import ModelSpec
from badloss_jax.training.batch import Batch
from badloss_jax.training.in_flight import InFlight
from badloss_jax.training.state import TrainState
from badloss_jax.training.step import make_sweep_step
from badloss_jax.trajectories.buffer import Column, column_bytes, create_column, local_runs, make_write
from badloss_jax.trajectories.kinds import Kinds
from badloss_jax.trajectories.store import TrajectoryStore


@dataclass
class Recorder:
    """Fills an epoch's column on the devices by "sweep" or "step" capture, and appends it to the store.

    The kind "step" is what the training step itself saw of the loss, in a recording that otherwise sweeps. Finished
    epochs lie in the store alone, so that the devices' memory and a step's work do not depend on how many there are.

    Attributes:
      kinds: what is recorded.
      capture: "sweep", one evaluation pass after each epoch, or "step", the training step's own outputs.
      store: gets each finished epoch's columns.
      mesh: whose devices share the rows.
      batch_size: of the sweep.
      column: what steps have written of the epoch that goes on, and nothing else: it is all that a checkpoint needs.
    """

    kinds: Kinds
    capture: str
    store: TrajectoryStore
    mesh: Mesh
    batch_size: int
    column: Column = field(init=False)

    def __post_init__(self) -> None:
        examples = self.store.num_examples
        needed = column_bytes(self.kinds, examples, self.mesh)
        what = f"what is recorded of {examples:,} examples in an epoch"
        check_device_memory(needed, self.mesh, what, "record fewer kinds (recording.kinds), or take more devices")
        self.column = self._empty(written_by_steps(self.kinds, self.capture))

    @property
    def step_kinds(self) -> Kinds | None:
        """What the training step has to look for beside the losses, which it has anyhow; None is nothing."""
        return step_kinds(self.kinds, self.capture)

    def resume(self, column: Column, epoch: int, checkpoints: Path) -> None:
        """Goes on in the middle of an epoch; what the store has of it, and of later ones, is removed.

        Args:
          column: of a checkpoint.
          epoch: that the training goes on in.
          checkpoints: their folder, for the message.

        Raises:
          DataError: the store lacks an earlier epoch.
        """

        def keep_earlier() -> None:
            try:
                self.store.keep_first(epoch)
            except DataError as error:
                raise DataError(
                    f"{error}: what was recorded before the checkpoint in {checkpoints} is lost. Removing that folder"
                    " begins this training again"
                ) from error

        on_first(keep_earlier)
        self.column = column

    def end_step(self, batch: Batch, losses: jax.Array, values: dict[str, jax.Array]) -> None:
        """Keeps of a training step what is to be recorded of it, if anything.

        Args:
          batch: that it trained on.
          losses: float [B].
          values: kind -> [B, ...], of `step_kinds`.
        """
        if self.capture == "step":
            values = values | {"loss": losses}
        elif "step" in self.kinds.names:
            values = values | {"step": losses}
        if values:
            self._write(batch, values)

    @property
    def swept(self) -> int:
        """N, the examples of a sweep, which have the ids 0 to N - 1; 0 if there are no sweeps."""
        return self.store.num_examples if self.capture == "sweep" else 0

    def end_epoch(self, spec: ModelSpec, state: TrainState, batches: Iterator[Batch], epoch: int) -> None:
        """Sweeps over the training set if that is how it captures, and stores the epoch.

        Args:
          spec: the network.
          state: its weights after the epoch.
          batches: those of the sweep come next.
          epoch: that is over.

        Raises:
          NonFiniteLossError: some example's loss, or another value, is not finite; the epoch is stored all the same.
        """
        if self.capture == "sweep":
            kinds = sweep_kinds(self.kinds)
            self.column |= self._empty(kinds.observed)

            step = make_sweep_step(spec, kinds, self.mesh)
            in_flight = InFlight(jax.block_until_ready, self.mesh)
            for batch in itertools.islice(batches, math.ceil(self.swept / self.batch_size)):
                values = step(state, batch)
                self._write(batch, values)
                in_flight.append(values)

        self.flush(epoch, check=True)
        self.column = self._empty(written_by_steps(self.kinds, self.capture))

    def flush(self, epoch: int, *, check: bool = False) -> None:
        """Stores what is recorded of the epoch, each process its own rows; cells that are not recorded are NaN.

        Args:
          epoch: that goes on, or is over.
          check: that every value is finite, once the epoch is stored.

        Raises:
          NonFiniteLossError: in every process, if it is to be checked and some value is not finite.
        """
        columns = local_runs(self.column, self.store.num_examples, self.mesh)
        blocks = process_blocks(self.store.num_examples, self.mesh)
        here = jax.process_index()
        our_shards = [number for number, (_, _, process) in enumerate(blocks) if process == here]

        def write() -> None:
            for run, shard in enumerate(our_shards):
                self.store.write_epoch(epoch, {kind: runs[run] for kind, runs in columns.items()}, shard, len(blocks))

        on_all(write)
        if check:
            self._check_finite(epoch, columns)

    def _empty(self, names: Sequence[str]) -> Column:
        return create_column(self.kinds, names, self.store.num_examples, self.mesh)

    def _write(self, batch: Batch, values: dict[str, jax.Array]) -> None:
        write = make_write(self.mesh)
        self.column = write(self.column, batch.ids, values)

    def _check_finite(self, epoch: int, columns: dict[str, list[np.ndarray]]) -> None:
        # Every process asks of every kind, for the answer is one that they all wait for.
        for kind, runs in columns.items():
            if not all_of(all(np.isfinite(run).all() for run in runs)):
                raise NonFiniteLossError(
                    f"after epoch {epoch} the network's {kind} is NaN or infinite for some examples; what was recorded"
                    f" is kept in {self.store.folder}. A smaller --config.optimizer.learning_rate usually helps, in"
                    " another --workdir"
                )


def step_kinds(kinds: Kinds, capture: str) -> Kinds | None:
    """Returns what the training step has to look for; see `Recorder.step_kinds`.

    Args:
      kinds: what is recorded.
      capture: "sweep" or "step".
    """
    beside = tuple(name for name in kinds.names if name != "step")
    if capture == "step" and beside:
        return replace(kinds, observed=beside)
    return None


def written_by_steps(kinds: Kinds, capture: str) -> tuple[str, ...]:
    """Returns which kinds the training steps record, the others being left to the sweep.

    Args:
      kinds: what is recorded.
      capture: "sweep" or "step".
    """
    if capture == "step":
        return tuple(kinds.layout())
    return tuple(name for name in kinds.names if name == "step")


def sweep_kinds(kinds: Kinds) -> Kinds:
    """Returns what a sweep looks for, of what is recorded."""
    return replace(kinds, observed=tuple(name for name in kinds.layout() if name != "step"))
