"""Trainings on their way: everything that one needs to go on in the middle of an epoch, to the same bits.

FOLDER/STEP/arrays/    orbax: the network, the optimiser, and what was recorded of the epoch
FOLDER/STEP/about/     JSON: hash of the training, epoch and step, dtypes, shapes and checksums of the arrays

A checkpoint is written aside, asynchronously, and renamed when it is whole; the one before it stays until then.
"""

import math
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from badloss_jax.core.errors import DataError
from badloss_jax.core.preemption import Preemption
from badloss_jax.core.processes import all_of, first, on_first
from badloss_jax.training.state import TrainState
from badloss_jax.trajectories.buffer import Column

_FORMAT = "badloss_jax.checkpoint/2"
_COMPILING = 4  # steps, the first ones, that are not timed
_TIMED = 16  # steps that are


@dataclass(frozen=True)
class Position:
    """How far a training has come.

    Attributes:
      epoch: the one that it is in.
      step: steps of this epoch that are done.
      losses: their mean losses.
      seconds: that the training took so far.
    """

    epoch: int = 0
    step: int = 0
    losses: tuple[float, ...] = ()
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints of one training, saved while it is open.

    Args:
      folder: of this training alone.
      identity: hash of everything that the training depends on.
      num_examples: N; columns have at least so many rows.
      every_steps: save after so many steps; 0 does not count steps.
      every_minutes: or after so many minutes, turned into steps by what a step takes; 0 does not count minutes.
      preemption: save at once and stop when it says so.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        num_examples: int,
        *,
        every_steps: int = 0,
        every_minutes: float = 0.0,
        preemption: Preemption | None = None,
    ):
        self.folder = folder
        self._identity = identity
        self._num_examples = num_examples
        self._every_steps = every_steps
        self._every_minutes = every_minutes
        self._preemption = preemption

        self._manager: ocp.CheckpointManager | None = None
        self._stopping = False
        self._saved_at = 0  # steps done
        self._period = 0  # steps that take `every_minutes`, once that is known
        self._timed_from: tuple[int, float] | None = None  # steps done, and the clock

    def __enter__(self) -> "Checkpoints":
        options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
        try:
            self._manager = ocp.CheckpointManager(self.folder.resolve(), options=options)
        except (OSError, ValueError) as error:
            raise DataError(f"checkpoints cannot be kept in {self.folder}: {error}") from error
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self._manager is None:
            return

        try:
            self._manager.close()
        except (OSError, ValueError) as failure:
            # An error that is on its way already says more.
            if error is None:
                raise self._failed(failure) from failure

    def restore(self, state: TrainState, column: Column) -> tuple[TrainState, Column, Position]:
        """Takes up the last good checkpoint; without one, gives back what it was given.

        Args:
          state, column: fresh; their dtypes, shapes and shardings are what the checkpoint has to fit.

        Returns:
          State, column and how far they are.

        Raises:
          DataError: there are checkpoints, but of another training, or all of them are damaged.
        """
        steps = sorted(on_first(lambda: list(self._open.all_steps())), reverse=True)
        failures: list[str] = []
        for step in steps:
            path = self.folder / str(step)
            failure = ""
            try:
                restored = self._read(step, state, column)
            except Exception as error:  # orbax and tensorstore raise nearly anything on damaged files
                failure = _first_line(error)

            # Every process has to go on from the same one.
            if all_of(not failure):
                for text in failures:
                    warnings.warn(f"{text}; going on from the one before, {path}", stacklevel=2)
                self._saved_at = step
                return restored
            failures.append(f"checkpoint {path} cannot be used: {failure or 'see other processes'}")

        if failures:
            raise DataError(f"{'; '.join(failures)}. Removing {self.folder} begins this training again")
        return state, column, Position()

    def times(self, steps_done: int) -> bool:
        """Whether `due` will look at the clock, so that these steps have to be done, and no others in flight.

        Args:
          steps_done: since the beginning of the training.
        """
        if self._period or self._timed_from is None:
            return False
        begin, _ = self._timed_from
        return steps_done in (begin, begin + _TIMED)

    def due(self, steps_done: int) -> bool:
        """Whether it is time to save; to be asked after every step, in every process.

        Args:
          steps_done: since the beginning of the training.
        """
        self._measure(steps_done)

        # Asked in any case: with several processes each has to ask equally often.
        self._stopping = self._preemption is not None and self._preemption.reached()

        by_steps = self._every_steps and steps_done % self._every_steps == 0
        by_time = self._period and steps_done - self._saved_at >= self._period
        return bool(self._stopping or by_steps or by_time)

    def save(self, state: TrainState, column: Column, position: Position, steps_done: int) -> None:
        """Saves, in the background unless the run is to stop.

        Args:
          state: of the network and the optimiser.
          column: the recorder's, or {}.
          position: how far they are.
          steps_done: since the beginning of the training; names the checkpoint.

        Raises:
          PreemptedError: the run is to stop; all is saved.
          DataError: the checkpoint cannot be written; the last good one stays.
        """
        arrays = _named_arrays(state, column)
        about = {
            "format": _FORMAT,
            "identity": self._identity,
            "epoch": position.epoch,
            "step": position.step,
            "losses": list(position.losses),
            "seconds": position.seconds,
            "arrays": self._describe(arrays),
            "checksums": self._sum_up(arrays),
        }
        try:
            content = ocp.args.Composite(arrays=ocp.args.PyTreeSave(arrays), about=ocp.args.JsonSave(about))
            self._open.save(steps_done, args=content, force=True)
            if self._stopping:
                self._open.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

        self._saved_at = steps_done
        if self._stopping and self._preemption is not None:
            raise self._preemption.stopped(
                f" after step {steps_done}; a checkpoint is saved in {self.folder}, and the same command goes on from"
                " there"
            )

    def remove(self) -> None:
        """Removes all of them, when the training is over and its network is saved."""
        if first():
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            raise ValueError("these checkpoints are closed")
        return self._manager

    def _measure(self, steps_done: int) -> None:
        """Turns minutes into steps once the first steps, which compile, are over; all processes take the first's."""
        if not self._every_minutes or self._period:
            return

        if self._timed_from is None:
            self._timed_from = steps_done + _COMPILING, 0.0
        begin, started = self._timed_from

        if steps_done == begin:
            self._timed_from = begin, time.monotonic()
        elif steps_done == begin + _TIMED:
            seconds = on_first(lambda: (time.monotonic() - started) / _TIMED)
            self._period = max(1, math.ceil(60 * self._every_minutes / seconds))

    def _read(self, step: int, state: TrainState, column: Column) -> tuple[TrainState, Column, Position]:
        """Reads one checkpoint; raises nearly anything if it is damaged or does not fit."""
        fresh = _named_arrays(state, column)
        about = self._read_about(step, fresh)
        restored = self._read_arrays(step, fresh)

        checksums = self._sum_up(restored)
        for name, value in about["checksums"].items():
            if checksums[name] != value:
                raise DataError(f"{name} is damaged: its checksum is not the one that was saved")

        leaves = [restored[name] for name in fresh if not _is_column(name)]
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
        column = {kind: restored[name] for kind, name in zip(column, _column_names(column), strict=True)}

        position = Position(
            epoch=int(about["epoch"]),
            step=int(about["step"]),
            losses=tuple(map(float, about["losses"])),
            seconds=float(about["seconds"]),
        )
        return state, column, position

    def _read_about(self, step: int, fresh: dict[str, jax.Array]) -> dict[str, Any]:
        """Reads what a checkpoint is; raises DataError unless it is of this training, with arrays like the fresh."""
        about = self._open.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        if about["format"] != _FORMAT:
            raise DataError(f"its format is {about['format']!r}, expected {_FORMAT!r}")
        if about["identity"] != self._identity:
            raise DataError("it belongs to a training with other settings, other data or of another version")

        ours = self._describe(fresh)
        theirs = about["arrays"]
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise DataError(f"{name} is {theirs.get(name)}, expected {ours.get(name)}")
        return about

    def _read_arrays(self, step: int, fresh: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Reads the arrays, with the dtypes, shapes and shardings of the fresh ones."""

        def like(array: jax.Array) -> ocp.ArrayRestoreArgs:
            # Not strict: on another number of devices a column has another number of rows that only pad it.
            return ocp.ArrayRestoreArgs(
                dtype=array.dtype, sharding=array.sharding, global_shape=array.shape, strict=False
            )

        wanted = ocp.args.PyTreeRestore(item=fresh, restore_args=jax.tree.map(like, fresh))
        return self._open.restore(step, args=ocp.args.Composite(arrays=wanted))["arrays"]

    def _describe(self, arrays: dict[str, jax.Array]) -> dict[str, str]:
        """Names the dtype and the shape of each array; rows that only pad a column do not count."""
        texts = {}
        for name, array in arrays.items():
            shape = list(array.shape)
            if _is_column(name):
                shape[0] = self._num_examples
            texts[name] = f"{array.dtype} {shape}"
        return texts

    def _sum_up(self, arrays: dict[str, jax.Array]) -> dict[str, int]:
        """Returns a checksum of each array; rows that only pad a column do not count."""
        rows = tuple(self._num_examples if _is_column(name) else None for name in arrays)
        sums = _checksums(tuple(arrays.values()), rows)
        return dict(zip(arrays, map(int, sums), strict=True))

    def _failed(self, error: Exception) -> DataError:
        return DataError(f"a checkpoint cannot be written in {self.folder}: {error}; the last good one stays")


def _first_line(error: Exception) -> str:
    """Returns the first line that an error says, which is never empty."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _named_arrays(state: TrainState, column: Column) -> dict[str, jax.Array]:
    """Names every array, in the order of the tree; orbax makes files of these names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    named = {f"state{number:04}{_as_name(path)}": leaf for number, (path, leaf) in enumerate(leaves)}
    return named | dict(zip(_column_names(column), column.values(), strict=True))


def _as_name(path: Sequence[Any]) -> str:
    text = jax.tree_util.keystr(tuple(path), simple=True, separator="_")
    return "_" + "".join(letter if letter.isalnum() else "_" for letter in text)


def _column_names(column: Column) -> list[str]:
    return [f"column_{kind}" for kind in column]


def _is_column(name: str) -> bool:
    return name.startswith("column")


@partial(jax.jit, static_argnums=1)
def _checksums(arrays: Sequence[jax.Array], rows: Sequence[int | None]) -> list[jax.Array]:
    """Sums the bits of each array, weighted by where they stand, modulo 2^32: the same however they are sharded."""
    sums = []
    for array, count in zip(arrays, rows, strict=True):
        part = array if count is None else array[:count]
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(part.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(part, unsigned).astype(jnp.uint32)

        # Knuth's multiplicative hash of the indices, made odd: so that a change of any one bit changes the sum.
        position = jnp.ones(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):
            position = position * jnp.uint32(2654435761) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        sums.append(jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32))
    return sums
