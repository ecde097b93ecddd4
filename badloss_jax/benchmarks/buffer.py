"""The trajectory buffer at any size: its memory per device, writing, reading back, scoring."""

import resource
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from badloss_jax.benchmarks.timing import seconds_of, summary
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.mesh import by_rows, place, round_up
from badloss_jax.core.order import cut_batches
from badloss_jax.core.seeding import generator
from badloss_jax.scoring import knn_distances
from badloss_jax.trajectories.buffer import Buffer, create_buffer, padding_id, read_column, write
from badloss_jax.trajectories.kinds import Kinds

_LARGE = 2**16  # rows in a batch of the columns whose writing is not timed
_SCORINGS = 3


def measure_buffer(
    kinds: Kinds, num_examples: int, num_epochs: int, mesh: Mesh, *, batch_size: int = 256, num_probes: int = 250,
    k: int = 50,
) -> dict[str, Any]:  # fmt: skip
    """Allocates a buffer, fills it, checks what it holds, and scores its losses.

    The first epoch is written in batches of `batch_size`, each timed, the others in large ones. What is written is
    random; every column of the losses is compared with it.

    Args:
      kinds: what is recorded beside the losses (num_features is not used).
      num_examples, num_epochs: N and T.
      mesh: the devices that share the rows.
      batch_size: a multiple of the devices.
      num_probes, k: of the scoring.

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
    buffer: Buffer = {}
    rss = {"before": _peak_rss()}

    def allocate() -> Buffer:
        buffer.update(create_buffer(kinds, num_examples, num_epochs, mesh))
        return buffer

    seconds: dict[str, Any] = {"allocate": seconds_of(allocate)}
    rss["allocated"] = _peak_rss()
    measured = _bytes_per_device(buffer)
    writer = _Writer(kinds, num_examples, mesh)
    temporary = writer.temporary_bytes(buffer, batch_size)
    draw = generator(0, "benchmark")
    losses = draw.gamma(2.0, size=(num_epochs, num_examples)).astype(np.float32)
    buffer, first, spent = writer.write_epoch(buffer, 0, losses[0], batch_size)
    seconds |= {"write_first_batch": first, "write_batch": summary(spent or [first]), "write_epoch": sum(spent) + first}
    for epoch in range(1, num_epochs):
        buffer, *_ = writer.write_epoch(buffer, epoch, losses[epoch], round_up(min(_LARGE, num_examples), mesh))
    rss["written"] = _peak_rss()

    reads, trajectories = [], np.empty((num_examples, num_epochs), np.float32)
    for epoch in range(num_epochs):
        columns: dict[str, list[np.ndarray]] = {}
        reads.append(seconds_of(lambda epoch=epoch, columns=columns: columns.update(  # type: ignore[misc]
            read_column(buffer, epoch, num_examples))))  # fmt: skip
        (column,) = columns["loss"]
        if not np.array_equal(column, losses[epoch]):
            raise DataError(f"column {epoch} of the buffer is not what was written into it")
        trajectories[:, epoch] = column
    seconds["read_column"] = summary(reads)
    probes = trajectories[np.sort(draw.choice(num_examples, num_probes, replace=False))]
    scored = [seconds_of(partial(knn_distances, trajectories, probes, k, mesh)) for _ in range(_SCORINGS)]
    seconds |= {"score_first": scored[0], "score": summary(scored[1:])}
    rss["scored"] = _peak_rss()
    return {
        "examples": num_examples,
        "epochs": num_epochs,
        "devices": mesh.size,
        "batch_size": batch_size,
        "probes": num_probes,
        "k": k,
        "layout": {name: [list(array.shape), str(array.dtype)] for name, array in buffer.items()},
        "bytes_per_device": {"measured": measured, "expected": expected_bytes(kinds, num_examples, num_epochs, mesh)},
        "write_temporary_bytes": temporary,
        "peak_rss_bytes": rss,
        "seconds": seconds,
        "rows_per_second": num_examples / seconds["score"]["median"],
    }


def expected_bytes(kinds: Kinds, num_examples: int, num_epochs: int, mesh: Mesh) -> int:
    """Computes the bytes that a device should hold: N' / devices x T x width x bytes, over all kinds."""
    rows = round_up(num_examples, mesh) // mesh.size
    widths = (int(np.prod(shape, dtype=int)) * dtype.itemsize for shape, dtype in kinds.layout().values())
    return rows * num_epochs * sum(widths)


class _Writer:
    """Writes epochs as the steps do: a donated buffer, ids and values sharded by rows."""

    def __init__(self, kinds: Kinds, num_examples: int, mesh: Mesh):
        self._kinds, self._size, self._mesh = kinds, num_examples, mesh
        self._write = jax.jit(write, donate_argnums=0, out_shardings=by_rows(mesh))

    def temporary_bytes(self, buffer: Buffer, batch_size: int) -> int | None:
        """Returns what a device needs to write one batch, as far as its compiler tells."""
        arguments = self._batch(np.zeros(batch_size, np.int32), np.zeros(self._size, np.float32))
        ids, values = arguments
        analysis = self._write.lower(buffer, ids, np.int32(0), values).compile().memory_analysis()
        return int(analysis.temp_size_in_bytes) if analysis else None

    def write_epoch(
        self, buffer: Buffer, epoch: int, losses: Float[np.ndarray, "N"], batch_size: int
    ) -> tuple[Buffer, float, list[float]]:
        """Writes a column; returns the buffer, the seconds of the first batch, and those of each of the others.

        Copying ids and values to the devices is not counted: in training they are made there.
        """
        shuffled = generator(epoch, "benchmark", "order").permutation(self._size)
        spent = []
        for ids in cut_batches(shuffled, batch_size, padding_id(self._size, self._mesh)):
            placed, values = jax.block_until_ready(self._batch(ids, losses))
            box = [buffer]

            def work(box: list[Buffer] = box, placed: Any = placed, values: Any = values) -> Buffer:
                box[0] = self._write(box[0], placed, np.int32(epoch), values)
                return box[0]

            spent.append(seconds_of(work))
            buffer = box[0]
        return buffer, spent[0], spent[1:]

    def _batch(self, ids: np.ndarray, losses: Float[np.ndarray, "N"]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Places ids and, for every kind, values: the loss, repeated over the width."""
        seen = losses[np.minimum(ids, self._size - 1)]
        values = {
            name: np.broadcast_to(seen.reshape(-1, *(1 for _ in shape)), (len(ids), *shape)).astype(dtype)
            for name, (shape, dtype) in self._kinds.layout().items()
        }
        return place((ids, values), by_rows(self._mesh))


def _bytes_per_device(buffer: Buffer) -> list[int]:
    held: dict[jax.Device, int] = {}
    for array in buffer.values():
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return list(held.values())


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
