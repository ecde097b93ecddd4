"""The kernel for the CPU, which Numba compiles, and keeps on disk so that no later process compiles it again.

Importing this module imports Numba, so `kernels` does that when a distance is first needed. Compiling takes 1.5 s, and
reading what was compiled before a few hundredths. It is kept in this folder's `__pycache__`, in the user's own cache if
that cannot be written, or in `NUMBA_CACHE_DIR`; where none of these can be used, every process compiles for itself.
"""

import pickle
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numba import njit

# What Numba keeps is valid as long as this file is the same: what the kernel is made of has to stand in here.
TOGETHER = 64  # columns whose squares are added up in the trajectories' own precision
ROWS = 16  # rows that share such columns of the probes while these are in the core's cache

# Sums may be taken in any order, so that they are taken eight or sixteen at a time. NaN stays NaN.
_compiled = partial(njit, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
_UNUSABLE = (OSError, EOFError, pickle.UnpicklingError)  # of a cache that is full, another user's, or damaged


def mean_of_nearest(
    rows: Float[np.ndarray, "R D"],
    columns: Float[np.ndarray, "D P"],
    choice: Int[np.ndarray, "R 3"],
    k: int,
    squares: Float[np.ndarray, "P"],
    bits: Int[np.ndarray, "P"],
    infinite: Any,
    totals: Float[np.ndarray, "16 P"],
    out: Float[np.ndarray, "R"],
) -> None:
    """Computes the mean distances of rows to the k nearest probes, in one thread that does not hold the GIL.

    Args:
      rows: [R, D], float32 or float64.
      columns: [D, P], the probes, transposed, of the same dtype.
      choice: int32 [R, 3], as of `kernels.on_cpu`.
      k: 1 to the number of probes that each row is left with.
      squares: [P], of the same dtype, to work in.
      bits: [P], the same memory as signed integers.
      infinite: the integer that has the bits of infinity.
      totals: float64 [16, P], to work in.
      out: [R], is filled; NaN for rows that hold NaN or infinity, or whose squares overflow.
    """
    arguments = (rows, columns, choice, k, squares, bits, infinite, totals, out)
    try:
        _cached_kernel(*arguments)
    except _UNUSABLE:
        # The kernel itself raises nothing. It may have run before, and then writes the same once more.
        _plain_kernel(*arguments)


@_compiled()
def _add_squares(row, columns, begin, end, squares):
    """Adds the squared differences of a row and the probes from `begin` to `end`, column by column."""
    # Two columns at a time, so that sums are read and written half as often.
    for d in range(0, len(row) - 1, 2):
        one = columns[d][begin:end]
        two = columns[d + 1][begin:end]
        for p in range(len(squares)):
            first = row[d] - one[p]
            second = row[d + 1] - two[p]
            squares[p] += first * first + second * second

    if len(row) % 2:
        last = columns[len(row) - 1][begin:end]
        for p in range(len(squares)):
            difference = row[-1] - last[p]
            squares[p] += difference * difference


@_compiled()
def _bounds(bits):
    """Finds the least and the greatest of the bits."""
    low = bits[0]
    high = bits[0]
    for p in range(len(bits)):
        low = min(low, bits[p])
        high = max(high, bits[p])
    return low, high


@_compiled()
def _smallest_bits(bits, low, high, k):
    """Finds bits that k of the squares do not exceed, or if there are ties those of the k-th smallest square."""
    # At most `low` are fewer than k squares, at most `high` at least k.
    while high - low > 1:
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
    return high


@_compiled()
def _mean_of_smallest(squares, bits, infinite, leave_out, k):
    """Returns the mean root of the k smallest squares, but for that of `leave_out`; NaN if one is not finite."""
    low, high = _bounds(bits)
    if low < 0 or high >= infinite:
        return squares.dtype.type(np.nan)

    if leave_out >= 0:
        bits[leave_out] = infinite
        high = infinite
    high = _smallest_bits(bits, low - bits.dtype.type(1), high, k)

    total = squares.dtype.type(0)
    taken = np.int32(0)
    for p in range(len(bits)):
        near = bits[p] <= high
        taken += np.int32(near)
        total += np.sqrt(squares[p]) if near else squares.dtype.type(0)

    # With ties `high` is the k-th smallest itself, and it was taken too often.
    if taken > k:
        for p in range(len(bits)):
            if bits[p] == high:
                total -= (taken - k) * np.sqrt(squares[p])
                break
    return total / k


@_compiled()
def _narrow(rows, columns, choice, k, squares, bits, infinite, out):
    """Scores rows of so few columns that their squares are added up at once."""
    for i in range(len(rows)):
        own, begin, end = choice[i]
        squares[: end - begin] = 0
        _add_squares(rows[i], columns, begin, end, squares[: end - begin])
        out[i] = _mean_of_smallest(squares[: end - begin], bits[: end - begin], infinite, own - begin, k)


@_compiled()
def _wide(rows, columns, choice, k, squares, bits, infinite, totals, out):
    """Scores rows whose squares are added up block by block, in float64, so that errors do not add up with them."""
    count, width = rows.shape
    for first in range(0, count, ROWS):
        last = min(count, first + ROWS)
        totals[:] = 0
        for left in range(0, width, TOGETHER):
            right = min(width, left + TOGETHER)
            for i in range(first, last):
                _, begin, end = choice[i]
                squares[: end - begin] = 0
                _add_squares(rows[i, left:right], columns[left:right], begin, end, squares[: end - begin])
                for p in range(end - begin):
                    totals[i - first, p] += squares[p]

        for i in range(first, last):
            own, begin, end = choice[i]
            for p in range(end - begin):
                squares[p] = totals[i - first, p]
            out[i] = _mean_of_smallest(squares[: end - begin], bits[: end - begin], infinite, own - begin, k)


def _kernel(rows, columns, choice, k, squares, bits, infinite, totals, out):
    """Scores rows; see `mean_of_nearest`."""
    if rows.shape[1] <= TOGETHER:
        _narrow(rows, columns, choice, k, squares, bits, infinite, out)
    else:
        _wide(rows, columns, choice, k, squares, bits, infinite, totals, out)


# Both are compiled only when they are called.
_plain_kernel = _compiled()(_kernel)
try:
    _cached_kernel = _compiled(cache=True)(_kernel)
except RuntimeError:  # no folder to keep it in can be written
    _cached_kernel = _plain_kernel
