"""The mean distance to the k nearest probes: one kernel compiled for the CPU by Numba, one for any device by XLA.

Neither holds all distances, sorts, or knows which probes are nearest. Both add up squared differences, since
|a|^2 - 2ab + |b|^2 would cancel where trajectories nearly agree, and find the k-th smallest square by bisection over
its bits, which order positive numbers as their values do: a few counts of P numbers in place of a sort.
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

_TOGETHER = 64  # columns whose squares are added up in the trajectories' own precision
_UNROLLED = 32  # columns in one loop of XLA's, whose compilation takes long for more
_ROWS = 16  # rows that share such columns of the probes while these are in the core's cache
_A_THREAD = 2048  # rows that a thread takes at a time


def on_cpu(
    rows: Float[np.ndarray, "R D"], probes: Float[np.ndarray, "P D"], choice: Int[np.ndarray, "R 3"], k: int
) -> Float[np.ndarray, "R"]:
    """Computes the mean distances in threads, one for each core that this process may use.

    Args:
      rows, probes: both float32, or both float64.
      choice: int32, for each row the probe that it leaves out, or -1, and the first and the last + 1 that it takes.
      k: 1 to the number of probes that each row is left with.

    Returns:
      [R], NaN for rows that hold NaN or infinity, or whose squares overflow.
    """
    kernel = _compiled()
    columns, out, scratch = np.ascontiguousarray(probes.T), np.empty(len(rows), rows.dtype), threading.local()
    bits = np.int32 if rows.dtype == np.float32 else np.int64
    infinite = np.array(np.inf, rows.dtype).view(bits)[()]

    def work(start: int) -> None:
        if not hasattr(scratch, "squares"):
            scratch.squares = np.empty(len(probes), rows.dtype)
            scratch.totals = np.empty((_ROWS, len(probes)), np.float64)
        squares, part = scratch.squares, slice(start, start + _A_THREAD)
        kernel(rows[part], columns, choice[part], k, squares, squares.view(bits), infinite, scratch.totals, out[part])

    for _ in _threads().map(work, range(0, len(rows), _A_THREAD)):
        pass
    return out


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "badloss-scoring")


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., None]:
    """Compiles the kernel, which takes a second, when it is first needed."""
    from numba import njit

    # Sums may be taken in any order, so that they are taken eight or sixteen at a time. NaN stays NaN.
    compiled = partial(njit, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})

    @compiled()
    def add_squares(row, columns, begin, end, squares):
        for d in range(0, len(row) - 1, 2):  # two at a time, so that sums are read and written half as often
            one, two = columns[d][begin:end], columns[d + 1][begin:end]
            for p in range(len(squares)):
                first, second = row[d] - one[p], row[d + 1] - two[p]
                squares[p] += first * first + second * second
        if len(row) % 2:
            last = columns[len(row) - 1][begin:end]
            for p in range(len(squares)):
                difference = row[-1] - last[p]
                squares[p] += difference * difference

    @compiled()
    def mean_of_smallest(squares, bits, infinite, leave_out, k):
        low, high = bits[0], bits[0]
        for p in range(len(bits)):
            low, high = min(low, bits[p]), max(high, bits[p])
        if low < 0 or high >= infinite:
            return squares.dtype.type(np.nan)
        if leave_out >= 0:
            bits[leave_out] = infinite
            high = infinite
        low -= bits.dtype.type(1)
        while high - low > 1:  # at most `low` are fewer than k squares, at most `high` at least k
            middle = bits.dtype.type(low + ((high - low) >> 1))
            count = np.int32(0)
            for p in range(len(bits)):
                count += np.int32(bits[p] <= middle)
            if count >= k:
                high = middle
                if count == k:
                    break
            else:
                low = middle
        total, taken = squares.dtype.type(0), np.int32(0)
        for p in range(len(bits)):
            near = bits[p] <= high
            taken += np.int32(near)
            total += np.sqrt(squares[p]) if near else squares.dtype.type(0)
        if taken > k:  # `high` is the k-th smallest itself, and there are ties
            for p in range(len(bits)):
                if bits[p] == high:
                    total -= (taken - k) * np.sqrt(squares[p])
                    break
        return total / k

    @compiled()
    def kernel(rows, columns, choice, k, squares, bits, infinite, totals, out):
        count, width = rows.shape
        if width <= _TOGETHER:
            for i in range(count):
                own, begin, end = choice[i]
                squares[: end - begin] = 0
                add_squares(rows[i], columns, begin, end, squares[: end - begin])
                out[i] = mean_of_smallest(squares[: end - begin], bits[: end - begin], infinite, own - begin, k)
            return
        for first in range(0, count, _ROWS):
            last = min(count, first + _ROWS)
            totals[:] = 0
            for left in range(0, width, _TOGETHER):
                right = min(width, left + _TOGETHER)
                for i in range(first, last):
                    _, begin, end = choice[i]
                    squares[: end - begin] = 0
                    add_squares(rows[i, left:right], columns[left:right], begin, end, squares[: end - begin])
                    for p in range(end - begin):
                        totals[i - first, p] += squares[p]
            for i in range(first, last):
                own, begin, end = choice[i]
                for p in range(end - begin):
                    squares[p] = totals[i - first, p]
                out[i] = mean_of_smallest(squares[: end - begin], bits[: end - begin], infinite, own - begin, k)

    return kernel


@lru_cache(maxsize=64)
def on_devices(k: int, mesh: Mesh) -> Callable[[Array, Array, Array | None], Array]:
    """Compiles (rows [R, D], probes [P, D], choice [R, 3] or None) -> [R], as `on_cpu`, for the devices of a mesh.

    Every device works on its own rows, and nothing is exchanged. Without `choice` rows take all probes.
    """
    row, whole = PartitionSpec(AXIS), PartitionSpec()
    kernel = partial(_mean_of_nearest, k=k)
    return jax.jit(jax.shard_map(kernel, mesh=mesh, in_specs=(row, whole, row), out_specs=row))


def _mean_of_nearest(
    rows: Float[Array, "R D"], probes: Float[Array, "P D"], choice: Int[Array, "R 3"] | None, k: int
) -> Float[Array, "R"]:
    integer = jnp.int32 if rows.dtype == jnp.float32 else jnp.int64
    squares = jax.lax.optimization_barrier(_squares(rows, probes))  # or XLA computes them once for each use
    if choice is not None:
        finite, number = jnp.isfinite(squares).all(1), jnp.arange(len(probes))
        own, begin, end = (choice[:, i, None] for i in range(3))
        squares = jnp.where((number == own) | (number < begin) | (number >= end), jnp.inf, squares)
    bits = jax.lax.bitcast_convert_type(squares, integer)
    smallest, largest = bits.min(1), bits.max(1)
    infinite = jax.lax.bitcast_convert_type(jnp.array(jnp.inf, rows.dtype), integer)
    valid = finite if choice is not None else (smallest >= 0) & (largest < infinite)

    def open_rows(bounds: tuple[Array, Array]) -> Array:
        low, high = bounds
        return jnp.any(high - low > 1)

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        count = (bits <= middle[:, None]).sum(1, dtype=jnp.int32)
        high = jnp.where(count >= k, middle, high)
        return jnp.where(count == k, high - 1, jnp.where(count < k, middle, low)), high

    _, high = jax.lax.while_loop(open_rows, halve, (smallest - 1, largest))
    near = bits <= high[:, None]
    excess = (near.sum(1, dtype=jnp.int32) - k).astype(rows.dtype)
    furthest = jnp.sqrt(jnp.where(near, squares, 0).max(1))
    total = jnp.where(near, jnp.sqrt(squares), 0).sum(1)
    # Without ties nothing is taken away, also where the furthest is infinite.
    total = jnp.where(excess > 0, total - excess * furthest, total)
    return jnp.where(valid, total / k, jnp.nan)


def _squares(rows: Float[Array, "R D"], probes: Float[Array, "P D"]) -> Float[Array, "R P"]:
    """Adds up squared differences over blocks of columns, each unrolled, so that XLA fuses it into one loop."""

    def block(ours: Array, theirs: Array) -> Array:
        squares = ((ours[:, d, None] - theirs[None, :, d]) ** 2 for d in range(ours.shape[1]))
        return reduce(jnp.add, squares)

    first = rows.shape[1] % _UNROLLED or _UNROLLED
    total = block(rows[:, :first], probes[:, :first])
    if rows.shape[1] > first:
        others = [array[:, first:].reshape(len(array), -1, _UNROLLED).swapaxes(0, 1) for array in (rows, probes)]
        total, _ = jax.lax.scan(lambda total, pair: (total + block(*pair), None), total, tuple(others))
    return total
