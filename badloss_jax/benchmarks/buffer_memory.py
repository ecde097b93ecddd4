"""What is recorded, at any size: an epoch's column on the devices, writing it, reading it back, scoring all epochs."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from badloss_jax.benchmarks.memory import peak_rss
from badloss_jax.benchmarks.timing import seconds_of, summary, timed
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.mesh import by_rows, place, round_up
from badloss_jax.core.order import cut_batches
from badloss_jax.core.seeding import generator
from badloss_jax.scoring import knn_distances
from badloss_jax.trajectories.buffer import Column, column_bytes, create_column, local_runs, make_write, padding_id
from badloss_jax.trajectories.kinds import Kinds

_LARGE = 2**16  # rows in a batch of the columns whose writing is not timed
_SCORINGS = 3


def measure_buffer(
    kinds: Kinds,
    num_examples: int,
    num_epochs: int,
    mesh: Mesh,
    *,
    batch_size: int = 256,
    num_probes: int = 250,
    k: int = 50,
) -> dict[str, Any]:
    """Allocates each epoch's column, fills it, checks what it holds, and scores the losses of all.

    The first epoch is written in batches of `batch_size`, each timed, the others in large ones. What is written is
    random; every column of the losses is compared with it.

    Args:
      kinds: what is recorded beside the losses (num_features is not used).
      num_examples: N.
      num_epochs: T.
      mesh: the devices that share the rows.
      batch_size: a multiple of the devices.
      num_probes: P, of the scoring.
      k: nearest probes, of the scoring.

    Returns:
      Sizes, and
      bytes_per_device: what each device holds of a column, and what it should by N' / devices x width x bytes.
      write_temporary_bytes: that a device needs beside the column while a batch is written.
      peak_rss_bytes: of this process, where CPU devices have their memory too; the host's copy of the losses, of N x T
        x 4 bytes, and what scoring takes are in the last one.
      seconds: of each part; rows_per_second of the scoring.

    Raises:
      UsageError: more probes than examples, k outside 1..probes, or a batch that the devices cannot share.
      DataError: a column does not hold what was written into it.
    """
    if batch_size % mesh.size:
        raise UsageError(f"--batch_size {batch_size} is not divisible by the {mesh.size} devices")
    if not 1 <= k <= num_probes <= num_examples:
        raise UsageError(f"--k {k}, --probes {num_probes}, --examples {num_examples}: expected 1 <= k <= P <= N")

    # The peak only ever rises: each is taken before the next step can need more.
    rss = {"before": peak_rss()}
    writer = _Writer(kinds, num_examples, mesh)
    column, allocating = timed(writer.empty)
    rss["allocated"] = peak_rss()
    layout = {name: [list(array.shape), str(array.dtype)] for name, array in column.items()}
    bytes_per_device = _bytes_per_device(column)
    temporary_bytes = writer.temporary_bytes(column, batch_size)

    draw = generator(0, "benchmark")
    losses = draw.gamma(2.0, size=(num_epochs, num_examples)).astype(np.float32)
    trajectories, seconds = writer.record(losses, batch_size)
    rss["recorded"] = peak_rss()

    probes = trajectories[np.sort(draw.choice(num_examples, num_probes, replace=False))]
    # The first scoring compiles, and stands apart.
    scorings = [seconds_of(partial(knn_distances, trajectories, probes, k, mesh)) for _ in range(_SCORINGS)]
    score = summary(scorings[1:])
    rss["scored"] = peak_rss()

    expected = column_bytes(kinds, num_examples, mesh)
    seconds = {"allocate": allocating} | seconds | {"score_first": scorings[0], "score": score}
    return {
        "examples": num_examples,
        "epochs": num_epochs,
        "devices": mesh.size,
        "batch_size": batch_size,
        "probes": num_probes,
        "k": k,
        "layout": layout,
        "bytes_per_device": {"measured": bytes_per_device, "expected": expected},
        "write_temporary_bytes": temporary_bytes,
        "peak_rss_bytes": rss,
        "seconds": seconds,
        "rows_per_second": num_examples / score["median"],
    }


class _Writer:
    """Records epochs as the trainer does: a donated column, ids and values sharded by rows."""

    def __init__(self, kinds: Kinds, num_examples: int, mesh: Mesh):
        self._kinds = kinds
        self._size = num_examples
        self._mesh = mesh
        self._write = make_write(mesh)

    def empty(self) -> Column:
        """Returns an empty column of all kinds."""
        return create_column(self._kinds, tuple(self._kinds.layout()), self._size, self._mesh)

    def temporary_bytes(self, column: Column, batch_size: int) -> int | None:
        """Asks the compiler what a device needs to write one batch.

        Args:
          column: to write to; it stays as it is.
          batch_size: of the batch.

        Returns:
          Bytes, or None where the compiler does not tell.
        """
        ids, values = self._batch(np.zeros(batch_size, np.int32), np.zeros(self._size, np.float32))
        # Compiled and not run, so that the column is not donated.
        analysis = self._write.lower(column, ids, values).compile().memory_analysis()
        return int(analysis.temp_size_in_bytes) if analysis else None

    def record(
        self, losses: Float[np.ndarray, "T N"], batch_size: int
    ) -> tuple[Float[np.ndarray, "N T"], dict[str, Any]]:
        """Writes all epochs, the first in timed batches of `batch_size`, the others in large ones; reads each back.

        Args:
          losses: float32 [T, N].
          batch_size: of the first epoch.

        Returns:
          The losses as they were read back, and the seconds of the first epoch (its first batch, the others, all) and
          of reading a column.
        """
        num_epochs, num_examples = losses.shape
        large = round_up(min(_LARGE, num_examples), self._mesh)
        trajectories = np.empty((num_examples, num_epochs), np.float32)
        writing: list[float] = []
        reading: list[float] = []

        for epoch in range(num_epochs):
            column, of_batches = self._write_epoch(epoch, losses[epoch], large if epoch else batch_size)
            runs, of_column = timed(partial(local_runs, column, num_examples, self._mesh))
            writing = writing or of_batches
            reading.append(of_column)

            # One run, as a single process holds all rows.
            (read,) = runs["loss"]
            if not np.array_equal(read, losses[epoch]):
                raise DataError(f"the column of epoch {epoch} is not what was written into it")
            trajectories[:, epoch] = read

        # The first batch compiles, and stands apart.
        first, *others = writing
        return trajectories, {
            "write_first_batch": first,
            # A small column is written in one batch.
            "write_batch": summary(others or [first]),
            "write_epoch": sum(others) + first,
            "read_column": summary(reading),
        }

    def _write_epoch(self, epoch: int, losses: Float[np.ndarray, "N"], batch_size: int) -> tuple[Column, list[float]]:
        """Writes a column; returns it, and the seconds of each batch.

        Copying ids and values to the devices is not counted: in training they are made there.
        """
        column = self.empty()
        shuffled = generator(epoch, "benchmark", "order").permutation(self._size)
        seconds = []
        for batch_ids in cut_batches(shuffled, batch_size, padding_id(self._size, self._mesh)):
            ids, values = jax.block_until_ready(self._batch(batch_ids, losses))
            column, of_batch = timed(partial(self._write, column, ids, values))
            seconds.append(of_batch)
        return column, seconds

    def _batch(
        self, ids: Int[np.ndarray, "B"], losses: Float[np.ndarray, "N"]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Places ids and, for every kind, values: the loss, repeated over the width."""
        # An id that only pads has no loss; any will do, as it is not written.
        known = losses[np.minimum(ids, self._size - 1)]

        values = {}
        for name, (shape, dtype) in self._kinds.layout().items():
            column = known.reshape(-1, *(1 for _ in shape))
            values[name] = np.broadcast_to(column, (len(ids), *shape)).astype(dtype)
        return place((ids, values), by_rows(self._mesh))


def _bytes_per_device(column: Column) -> list[int]:
    total: dict[jax.Device, int] = {}
    for array in column.values():
        for shard in array.addressable_shards:
            total[shard.device] = total.get(shard.device, 0) + shard.data.nbytes
    return list(total.values())
