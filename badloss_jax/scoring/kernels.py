"""The mean distance to the k nearest probes: one kernel compiled for the CPU by Numba, one for any device by XLA.

Neither holds all distances, sorts, or knows which probes are nearest. Both add up squared differences, since
|a|^2 - 2ab + |b|^2 would cancel where trajectories nearly agree, and find the k-th smallest square by bisection over
its bits, which order positive numbers as their values do: a few counts of P numbers in place of a sort. `numba_kernel`
has what Numba compiles; here are its threads, and the kernel for XLA.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from badloss_jax.core.mesh import AXIS

_UNROLLED = 32  # columns in one loop of XLA's, whose compilation takes long for more
_PARTS = 8  # of the rows for each thread, so that all end at about the same time,
_FEWEST = 64  # but of this many rows at least,
_MOST = 2048  # and of this many at most


def on_cpu(
    rows: Float[np.ndarray, "R D"],
    probes: Float[np.ndarray, "P D"],
    choice: Int[np.ndarray, "R 3"],
    k: int,
) -> Float[np.ndarray, "R"]:
    """Computes the mean distances in threads, one for each core that this process may use.

    Args:
      rows: [R, D], float32 or float64.
      probes: [P, D], of the same dtype.
      choice: int32, for each row the probe that it leaves out, or -1, and the first and the last + 1 that it takes.
      k: 1 to the number of probes that each row is left with.

    Returns:
      [R], of the same dtype; NaN for rows that hold NaN or infinity, or whose squares overflow.
    """
    # Numba takes a third of a second to import, which only those pay who score on a CPU.
    from badloss_jax.scoring.numba_kernel import Workspace, columns_of, mean_of_nearest

    columns = columns_of(probes)
    out = np.empty(len(rows), rows.dtype)
    scratch = threading.local()

    # Rows that take the same probes are computed together.
    order = np.argsort(choice[:, 1], kind="stable")
    share = int(np.clip(len(rows) // (_PARTS * _num_threads()), _FEWEST, _MOST))

    def work(start: int) -> None:
        if not hasattr(scratch, "workspace"):
            scratch.workspace = Workspace.for_columns(columns)
        mean_of_nearest(rows, order[start : start + share], columns, choice, k, scratch.workspace, out)

    # What a thread raises is raised here, where its result is asked for.
    for _ in _threads().map(work, range(0, len(rows), share)):
        pass
    return out


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_num_threads(), "badloss-scoring")


def _num_threads() -> int:
    return len(os.sched_getaffinity(0))


@lru_cache(maxsize=64)
def on_devices(k: int, mesh: Mesh) -> Callable[[Array, Array, Array | None], Array]:
    """Compiles (rows [R, D], probes [P, D], choice [R, 3] or None) -> [R], as `on_cpu`, for the devices of a mesh.

    Every device works on its own rows, and nothing is exchanged. Without `choice` rows take all probes.

    Args:
      k: 1 to the number of probes that each row is left with.
      mesh: the devices, which divide R.

    Returns:
      The compiled function; what it returns is sharded by rows.
    """
    row = PartitionSpec(AXIS)
    whole = PartitionSpec()
    kernel = partial(_mean_of_nearest, k=k)
    return jax.jit(jax.shard_map(kernel, mesh=mesh, in_specs=(row, whole, row), out_specs=row))


def _mean_of_nearest(
    rows: Float[Array, "R D"], probes: Float[Array, "P D"], choice: Int[Array, "R 3"] | None, k: int
) -> Float[Array, "R"]:
    integer = jnp.int32 if rows.dtype == jnp.float32 else jnp.int64
    squares = jax.lax.optimization_barrier(_squares(rows, probes))  # or XLA computes them once for each use

    if choice is not None:
        finite = jnp.isfinite(squares).all(1)
        number = jnp.arange(len(probes))
        own, begin, end = (choice[:, i, None] for i in range(3))
        squares = jnp.where((number == own) | (number < begin) | (number >= end), jnp.inf, squares)

    bits = jax.lax.bitcast_convert_type(squares, integer)
    smallest = bits.min(1)
    largest = bits.max(1)
    infinite = jax.lax.bitcast_convert_type(jnp.array(jnp.inf, rows.dtype), integer)
    valid = finite if choice is not None else (smallest >= 0) & (largest < infinite)

    high = _smallest_bits(bits, smallest, largest, k)
    near = bits <= high[:, None]
    excess = (near.sum(1, dtype=jnp.int32) - k).astype(rows.dtype)
    furthest = jnp.sqrt(jnp.where(near, squares, 0).max(1))
    total = jnp.where(near, jnp.sqrt(squares), 0).sum(1)

    # Without ties nothing is taken away, also where the furthest is infinite.
    total = jnp.where(excess > 0, total - excess * furthest, total)
    return jnp.where(valid, total / k, jnp.nan)


def _smallest_bits(
    bits: Int[Array, "R P"], smallest: Int[Array, "R"], largest: Int[Array, "R"], k: int
) -> Int[Array, "R"]:
    """Finds bits that k of a row's squares do not exceed, or if there are ties those of the k-th smallest square."""

    def open_rows(bounds: tuple[Array, Array]) -> Array:
        low, high = bounds
        return jnp.any(high - low > 1)

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        count = (bits <= middle[:, None]).sum(1, dtype=jnp.int32)
        high = jnp.where(count >= k, middle, high)
        # A row that has its k squares is closed, so that it is not halved on while others are.
        low = jnp.where(count == k, high - 1, jnp.where(count < k, middle, low))
        return low, high

    _, high = jax.lax.while_loop(open_rows, halve, (smallest - 1, largest))
    return high


def _squares(rows: Float[Array, "R D"], probes: Float[Array, "P D"]) -> Float[Array, "R P"]:
    """Adds up squared differences over blocks of columns, each unrolled, so that XLA fuses it into one loop."""

    def block(ours: Array, theirs: Array) -> Array:
        squares = ((ours[:, d, None] - theirs[None, :, d]) ** 2 for d in range(ours.shape[1]))
        return reduce(jnp.add, squares)

    def add_block(total: Array, pair: tuple[Array, ...]) -> tuple[Array, None]:
        return total + block(*pair), None

    # The first block is what the others, of one size, leave over.
    first = rows.shape[1] % _UNROLLED or _UNROLLED
    total = block(rows[:, :first], probes[:, :first])

    if rows.shape[1] > first:
        others = [array[:, first:].reshape(len(array), -1, _UNROLLED).swapaxes(0, 1) for array in (rows, probes)]
        total, _ = jax.lax.scan(add_block, total, tuple(others))
    return total
