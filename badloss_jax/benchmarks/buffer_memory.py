"""The trajectory buffer at any size: its memory per device, writing, reading back, scoring."""

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
from badloss_jax.trajectories.buffer import Buffer, create_buffer, make_write, padding_id, read_column
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
    """Allocates a buffer, fills it, checks what it holds, and scores its losses.

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
      bytes_per_device: what each device holds, and what it should by N' / devices x T x width x bytes.
      write_temporary_bytes: that a device needs beside the buffer while a batch is written.
      peak_rss_bytes: of this process, where CPU devices have their memory too; the host's copy of the losses, of N x T
        x 4 bytes, and what scoring takes are in the last one.
      seconds: of each part; rows_per_second of the scoring.

    Raises:
      UsageError: more probes than examples, k outside 1..probes, or a batch that the devices cannot share.
      DataError: the buffer does not hold what was written into it.
    """
    if batch_size % mesh.size:
        raise UsageError(f"--batch_size {batch_size} is not divisible by the {mesh.size} devices")
    if not 1 <= k <= num_probes <= num_examples:
        raise UsageError(f"--k {k}, --probes {num_probes}, --examples {num_examples}: expected 1 <= k <= P <= N")

    # The peak only ever rises: each is taken before the next step can need more.
    rss = {"before": peak_rss()}
    buffer, allocating = timed(lambda: create_buffer(kinds, num_examples, num_epochs, mesh))
    rss["allocated"] = peak_rss()
    layout = {name: [list(array.shape), str(array.dtype)] for name, array in buffer.items()}
    bytes_per_device = _bytes_per_device(buffer)

    writer = _Writer(kinds, num_examples, mesh)
    temporary_bytes = writer.temporary_bytes(buffer, batch_size)
    draw = generator(0, "benchmark")
    losses = draw.gamma(2.0, size=(num_epochs, num_examples)).astype(np.float32)
    buffer, writing = writer.fill(buffer, losses, batch_size)
    rss["written"] = peak_rss()

    trajectories, reading = _read_back(buffer, losses)
    probes = trajectories[np.sort(draw.choice(num_examples, num_probes, replace=False))]
    # The first scoring compiles, and stands apart.
    scorings = [seconds_of(partial(knn_distances, trajectories, probes, k, mesh)) for _ in range(_SCORINGS)]
    score = summary(scorings[1:])
    rss["scored"] = peak_rss()

    expected = expected_bytes(kinds, num_examples, num_epochs, mesh)
    seconds = {"allocate": allocating} | writing | reading | {"score_first": scorings[0], "score": score}
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


def expected_bytes(kinds: Kinds, num_examples: int, num_epochs: int, mesh: Mesh) -> int:
    """Computes the bytes that a device should hold: N' / devices x T x width x bytes, over all kinds.

    Args:
      kinds: what is recorded.
      num_examples: N; N' is the next multiple of the devices.
      num_epochs: T.
      mesh: the devices that share the rows.

    Returns:
      Bytes of one device.
    """
    rows = round_up(num_examples, mesh) // mesh.size
    widths = (int(np.prod(shape, dtype=int)) * dtype.itemsize for shape, dtype in kinds.layout().values())
    return rows * num_epochs * sum(widths)


class _Writer:
    """Writes epochs as the steps do: a donated buffer, ids and values sharded by rows."""

    def __init__(self, kinds: Kinds, num_examples: int, mesh: Mesh):
        self._kinds = kinds
        self._size = num_examples
        self._mesh = mesh
        self._write = make_write(mesh)

    def temporary_bytes(self, buffer: Buffer, batch_size: int) -> int | None:
        """Asks the compiler what a device needs to write one batch.

        Args:
          buffer: to write to; it stays as it is.
          batch_size: of the batch.

        Returns:
          Bytes, or None where the compiler does not tell.
        """
        ids, values = self._batch(np.zeros(batch_size, np.int32), np.zeros(self._size, np.float32))
        # Compiled and not run, so that the buffer is not donated.
        analysis = self._write.lower(buffer, ids, np.int32(0), values).compile().memory_analysis()
        return int(analysis.temp_size_in_bytes) if analysis else None

    def fill(self, buffer: Buffer, losses: Float[np.ndarray, "T N"], batch_size: int) -> tuple[Buffer, dict[str, Any]]:
        """Writes all epochs, the first in timed batches of `batch_size`, the others in large ones.

        Args:
          buffer: to write to; it is donated.
          losses: float32 [T, N].
          batch_size: of the first epoch.

        Returns:
          The buffer, and the seconds of the first epoch: of its first batch, of the others, of all.
        """
        # The first batch compiles, and stands apart.
        buffer, (first, *others) = self._write_epoch(buffer, 0, losses[0], batch_size)
        large = round_up(min(_LARGE, self._size), self._mesh)
        for epoch in range(1, len(losses)):
            buffer, *_ = self._write_epoch(buffer, epoch, losses[epoch], large)

        seconds = {
            "write_first_batch": first,
            # A small buffer is written in one batch.
            "write_batch": summary(others or [first]),
            "write_epoch": sum(others) + first,
        }
        return buffer, seconds

    def _write_epoch(
        self, buffer: Buffer, epoch: int, losses: Float[np.ndarray, "N"], batch_size: int
    ) -> tuple[Buffer, list[float]]:
        """Writes a column; returns the buffer, and the seconds of each batch.

        Copying ids and values to the devices is not counted: in training they are made there.
        """
        shuffled = generator(epoch, "benchmark", "order").permutation(self._size)
        seconds = []
        for batch_ids in cut_batches(shuffled, batch_size, padding_id(self._size, self._mesh)):
            ids, values = jax.block_until_ready(self._batch(batch_ids, losses))
            buffer, of_batch = timed(partial(self._write, buffer, ids, np.int32(epoch), values))
            seconds.append(of_batch)
        return buffer, seconds

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


def _read_back(buffer: Buffer, losses: Float[np.ndarray, "T N"]) -> tuple[Float[np.ndarray, "N T"], dict[str, Any]]:
    """Reads every column, and compares; returns the trajectories, and the seconds of a column."""
    num_epochs, num_examples = losses.shape
    trajectories = np.empty((num_examples, num_epochs), np.float32)
    seconds = []
    for epoch in range(num_epochs):
        columns, of_column = timed(partial(read_column, buffer, epoch, num_examples))
        seconds.append(of_column)

        # One part, as a single process holds all rows.
        (column,) = columns["loss"]
        if not np.array_equal(column, losses[epoch]):
            raise DataError(f"column {epoch} of the buffer is not what was written into it")
        trajectories[:, epoch] = column
    return trajectories, {"read_column": summary(seconds)}


def _bytes_per_device(buffer: Buffer) -> list[int]:
    total: dict[jax.Device, int] = {}
    for array in buffer.values():
        for shard in array.addressable_shards:
            total[shard.device] = total.get(shard.device, 0) + shard.data.nbytes
    return list(total.values())
