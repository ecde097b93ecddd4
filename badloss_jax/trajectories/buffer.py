"""The trajectory buffer on the devices: one row an example id, one column an epoch, sharded over rows.

An update gathers ids and values of one batch and nothing else: every device scatters what falls into its own rows. NaN
means "not recorded".
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from badloss_jax.core.mesh import by_rows, local_rows, process_blocks, round_up
from badloss_jax.trajectories.kinds import Kinds

Buffer = dict[str, jax.Array]


def buffer_bytes(kinds: Kinds, num_examples: int, num_epochs: int, mesh: Mesh) -> int:
    """Counts what a buffer takes on each device; arguments as of `create_buffer`."""
    rows = round_up(num_examples, mesh) // mesh.size
    width = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in kinds.layout().values())
    return rows * num_epochs * width


def create_buffer(kinds: Kinds, num_examples: int, num_epochs: int, mesh: Mesh) -> Buffer:
    """Creates an empty buffer where it will live.

    Args:
      kinds: what is recorded.
      num_examples: N.
      num_epochs: T.
      mesh: the devices, which share the rows.

    Returns:
      kind -> [N', T, ...] of NaN, in the dtype of `Kinds.layout`; N' is N rounded up to a multiple of the devices.
    """
    empty = _make_empty(kinds, round_up(num_examples, mesh), num_epochs, mesh)
    return empty()


@lru_cache(maxsize=32)
def _make_empty(kinds: Kinds, rows: int, num_epochs: int, mesh: Mesh) -> Callable[[], Buffer]:
    def empty() -> Buffer:
        return {
            name: jnp.full((rows, num_epochs, *shape), jnp.nan, dtype)
            for name, (shape, dtype) in kinds.layout().items()
        }

    return jax.jit(empty, out_shardings=by_rows(mesh))


def padding_id(num_examples: int, mesh: Mesh) -> int:
    """Returns the id that fills up batches: no row of the buffer, so that writes to it are dropped.

    Args:
      num_examples: N.
      mesh: the devices, which share the buffer.
    """
    return round_up(num_examples, mesh)


def write(buffer: Buffer, ids: Int[Array, "B"], epoch: Int[Array, ""], values: dict[str, Array]) -> Buffer:
    """Writes a batch into a column, for use inside jit; ids past the end are dropped.

    Args:
      buffer: kind -> [N', T, ...].
      ids: int32 [B], the rows, none of them twice and none negative.
      epoch: the column.
      values: kind -> [B, ...]; kinds that it lacks stay as they are.

    Returns:
      The buffer, with the values in its own dtypes.
    """
    return buffer | {
        name: buffer[name].at[ids, epoch].set(value.astype(buffer[name].dtype), mode="drop")
        for name, value in values.items()
    }


@lru_cache(maxsize=8)
def make_write(mesh: Mesh) -> Any:
    """Compiles `write`, for batches that are sharded by rows like the buffer, which is donated.

    Args:
      mesh: the devices.

    Returns:
      The jitted function, the same one for equal arguments.
    """
    return jax.jit(write, donate_argnums=0, out_shardings=by_rows(mesh))


def read_column(buffer: Buffer, epoch: int, num_examples: int) -> dict[str, list[np.ndarray]]:
    """Copies a column of every kind to the hosts, each its own rows and none of the padding.

    Args:
      buffer: kind -> [N', T, ...].
      epoch: the column.
      num_examples: N.

    Returns:
      kind -> the runs of rows that this process holds (`mesh.process_blocks`), in order.
    """
    columns = _column(buffer, np.int32(epoch))

    mesh = buffer["loss"].sharding.mesh  # type: ignore[attr-defined]
    here = jax.process_index()
    our_runs = [(start, stop) for start, stop, process in process_blocks(num_examples, mesh) if process == here]
    return {name: [local_rows(column, *run) for run in our_runs] for name, column in columns.items()}


@jax.jit
def _column(buffer: Buffer, epoch: Int[Array, ""]) -> Buffer:
    return {name: jax.lax.dynamic_index_in_dim(array, epoch, 1, keepdims=False) for name, array in buffer.items()}
