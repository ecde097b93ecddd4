"""What is recorded, on the devices: one row an example id, sharded over rows. NaN means "not recorded".

Training holds the column of the epoch at hand, [N', ...] of each kind: those of finished epochs are in the store. Loops
of one's own hold all T epochs, [N', T, ...]. N' is N rounded up to a multiple of the devices.

An update gathers ids and values of one batch and nothing else: every device scatters what falls into its own rows.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from badloss_jax.core.mesh import AnyMesh, by_rows, local_rows, process_blocks, round_up
from badloss_jax.trajectories.kinds import Kinds

Column = dict[str, jax.Array]
Buffer = dict[str, jax.Array]


def padding_id(num_examples: int, mesh: Mesh) -> int:
    """Returns the id that fills up batches: no row of a column, so that writes to it are dropped.

    Args:
      num_examples: N.
      mesh: the devices, which share the rows.
    """
    return round_up(num_examples, mesh)


# --- one epoch


def column_bytes(kinds: Kinds, num_examples: int, mesh: AnyMesh) -> int:
    """Counts what the column of an epoch takes on each device.

    Args:
      kinds: what is recorded.
      num_examples: N.
      mesh: the devices, which share the rows.

    Returns:
      Bytes, of all kinds together.
    """
    return round_up(num_examples, mesh) // mesh.size * sum(kinds.widths().values())


def create_column(kinds: Kinds, names: Sequence[str], num_examples: int, mesh: Mesh) -> Column:
    """Creates an empty column where it will live.

    Args:
      kinds: what is recorded.
      names: of the kinds that it is to hold.
      num_examples: N.
      mesh: the devices, which share the rows.

    Returns:
      kind -> [N', ...] of NaN, in the dtype of `Kinds.layout`.
    """
    shapes = shapes_of_column(kinds, names, num_examples, mesh)
    return {name: _make_empty(shape.shape, shape.dtype, mesh)() for name, shape in shapes.items()}


def shapes_of_column(
    kinds: Kinds, names: Sequence[str], num_examples: int, mesh: AnyMesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and shardings of a column; arguments as of `create_column`."""
    rows = round_up(num_examples, mesh)
    layout = kinds.layout()
    sharding = by_rows(mesh)
    return {name: jax.ShapeDtypeStruct((rows, *layout[name][0]), layout[name][1], sharding=sharding) for name in names}


def write(column: Column, ids: Int[Array, "B"], values: dict[str, Array]) -> Column:
    """Writes a batch, for use inside jit; ids past the end are dropped.

    Args:
      column: kind -> [N', ...].
      ids: int32 [B], the rows, none of them twice and none negative.
      values: kind -> [B, ...]; kinds that it lacks stay as they are.

    Returns:
      The column, with the values in its own dtypes.
    """
    return _written(column, (ids,), values)


@lru_cache(maxsize=8)
def make_write(mesh: Mesh) -> Any:
    """Compiles `write`, for batches that are sharded by rows like the column, which is donated.

    Args:
      mesh: the devices.

    Returns:
      The jitted function, the same one for equal arguments.
    """
    return jax.jit(write, donate_argnums=0, out_shardings=by_rows(mesh))


def local_runs(column: Column, num_examples: int, mesh: Mesh) -> dict[str, list[np.ndarray]]:
    """Copies a column to the hosts, each its own rows and none of the padding.

    Args:
      column: kind -> [N', ...].
      num_examples: N.
      mesh: the devices, which share the rows.

    Returns:
      kind -> the runs of rows that this process holds (`mesh.process_blocks`), in order.
    """
    here = jax.process_index()
    our_runs = [(start, stop) for start, stop, process in process_blocks(num_examples, mesh) if process == here]
    return {name: [local_rows(array, *run) for run in our_runs] for name, array in column.items()}


# --- all epochs


def create_buffer(kinds: Kinds, num_examples: int, num_epochs: int, mesh: Mesh) -> Buffer:
    """Creates an empty buffer where it will live.

    Args:
      kinds: what is recorded.
      num_examples: N.
      num_epochs: T.
      mesh: the devices, which share the rows.

    Returns:
      kind -> [N', T, ...] of NaN, in the dtype of `Kinds.layout`.
    """
    rows = round_up(num_examples, mesh)
    return {
        name: _make_empty((rows, num_epochs, *shape), dtype, mesh)() for name, (shape, dtype) in kinds.layout().items()
    }


def write_epoch(buffer: Buffer, ids: Int[Array, "B"], epoch: Int[Array, ""], values: dict[str, Array]) -> Buffer:
    """Writes a batch into a column of a buffer, for use inside jit; as `write`.

    Args:
      buffer: kind -> [N', T, ...].
      ids: int32 [B], the rows, none of them twice and none negative.
      epoch: the column.
      values: kind -> [B, ...]; kinds that it lacks stay as they are.

    Returns:
      The buffer, with the values in its own dtypes.
    """
    return _written(buffer, (ids, epoch), values)


@jax.jit
def column_of(buffer: Buffer, epoch: Int[Array, ""]) -> Column:
    """Returns the column of an epoch.

    Args:
      buffer: kind -> [N', T, ...].
      epoch: which.

    Returns:
      kind -> [N', ...].
    """
    return {name: jax.lax.dynamic_index_in_dim(array, epoch, 1, keepdims=False) for name, array in buffer.items()}


def _written(arrays: dict[str, jax.Array], where: tuple[Array, ...], values: dict[str, Array]) -> dict[str, jax.Array]:
    return arrays | {
        name: arrays[name].at[where].set(value.astype(arrays[name].dtype), mode="drop")
        for name, value in values.items()
    }


@lru_cache(maxsize=64)
def _make_empty(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.full(shape, jnp.nan, dtype), out_shardings=by_rows(mesh))
