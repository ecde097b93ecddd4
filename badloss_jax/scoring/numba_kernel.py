"""The kernel for the CPU, which Numba compiles, and keeps on disk so that no later process compiles it again.

Importing this module imports Numba, so `kernels` does that when a distance is first needed. Compiling takes 2 s, and
reading what was compiled before a few hundredths. It is kept in this folder's `__pycache__`, in the user's own cache if
that cannot be written, or in `NUMBA_CACHE_DIR`; where none of these can be used, every process compiles for itself.

Four rows and four columns of the probes are in registers together, and each value that is read is used four times. So
direct differences, which do not cancel, take no longer than the product of matrices that others use (`badloss bench
scorer --epochs 960`).
"""

import pickle
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numba import njit

# What Numba keeps is valid as long as this file is the same: what the kernel is made of has to stand in here.
TOGETHER = 64  # columns whose squares are added up in the trajectories' own precision
ROWS = 16  # rows that share such columns of the probes while these are in the core's cache
LINE = 16  # probes: of float32 as many as a line of the cache holds, and the widest registers

# Sums may be taken in any order, so that they are taken eight or sixteen at a time. NaN stays NaN.
_compiled = partial(njit, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
# Here they may not, so that a row's squares have the same bits whichever rows and probes are beside it.
_compiled_in_order = partial(njit, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
_UNUSABLE = (OSError, EOFError, pickle.UnpicklingError)  # of a cache that is full, another user's, or damaged


@dataclass(frozen=True)
class Workspace:
    """What one thread works in.

    Attributes:
      ours: [4, 64], a block of columns of four rows, 0 beyond their last column.
      squares: [4, P'], of the same dtype; P' is P rounded up to 16.
      bits: [4, P'], the same memory as signed integers.
      infinite: the integer that has the bits of infinity.
      totals: float64 [16, P'].
    """

    ours: Float[np.ndarray, "4 64"]
    squares: Float[np.ndarray, "4 P"]
    bits: Int[np.ndarray, "4 P"]
    infinite: Any
    totals: Float[np.ndarray, "16 P"]

    @classmethod
    def for_columns(cls, columns: Float[np.ndarray, "D P"]) -> "Workspace":
        """Makes one for probes as `columns_of` returns them."""
        dtype = columns.dtype
        integer = np.int32 if dtype == np.float32 else np.int64
        num_probes = columns.shape[1]
        squares = _aligned_zeros(4, num_probes, dtype)
        return cls(
            ours=_aligned_zeros(4, TOGETHER, dtype),
            squares=squares,
            bits=squares.view(integer),
            infinite=np.array(np.inf, dtype).view(integer)[()],
            totals=_aligned_zeros(ROWS, num_probes, np.float64),
        )


def columns_of(probes: Float[np.ndarray, "P D"]) -> Float[np.ndarray, "D P"]:
    """Lays probes out as the kernel reads them, column by column.

    Args:
      probes: [P, D], float32 or float64.

    Returns:
      [D', P'], of the same dtype: D rounded up to 4, P to 16, filled up with 0.
    """
    count, width = probes.shape
    columns = _aligned_zeros(-(-width // 4) * 4, -(-count // LINE) * LINE, probes.dtype)
    columns[:width, :count] = probes.T
    return columns


def _aligned_zeros(count: int, width: int, dtype: Any) -> np.ndarray:
    """Returns zeros that begin where a line of the cache does: reading across two lines takes half as long again."""
    line = 64  # bytes
    size = count * width * np.dtype(dtype).itemsize
    memory = np.zeros(size + line, np.uint8)
    begin = -memory.ctypes.data % line
    return memory[begin : begin + size].view(dtype).reshape(count, width)


def mean_of_nearest(
    rows: Float[np.ndarray, "R D"],
    ids: Int[np.ndarray, "M"],
    columns: Float[np.ndarray, "D P"],
    choice: Int[np.ndarray, "R 3"],
    k: int,
    workspace: Workspace,
    out: Float[np.ndarray, "R"],
) -> None:
    """Computes the mean distances of rows to the k nearest probes, in one thread that does not hold the GIL.

    Args:
      rows: [R, D], float32 or float64.
      ids: int64 [M], of the rows to score; those that take the same probes are best next to each other.
      columns: [D', P'], the probes by `columns_of`, of the same dtype.
      choice: int32 [R, 3], as of `kernels.on_cpu`.
      k: 1 to the number of probes that each row is left with.
      workspace: this thread's own.
      out: [R], is filled at `ids`; NaN for rows that hold NaN or infinity, or whose squares overflow.
    """
    work = workspace
    arguments = (rows, ids, columns, choice, k, work.ours, work.squares, work.bits, work.infinite, work.totals, out)
    try:
        _cached_kernel(*arguments)
    except _UNUSABLE:
        # The kernel itself raises nothing. It may have run before, and then writes the same once more.
        _plain_kernel(*arguments)


@_compiled_in_order()
def _four(values, first):
    """Takes four values, or four rows of values."""
    return values[first], values[first + 1], values[first + 2], values[first + 3]


@_compiled_in_order()
def _add_four(total, ours, theirs):
    """Adds the squares of four differences, one after the other."""
    difference = ours[0] - theirs[0]
    total += difference * difference
    difference = ours[1] - theirs[1]
    total += difference * difference
    difference = ours[2] - theirs[2]
    total += difference * difference
    difference = ours[3] - theirs[3]
    total += difference * difference
    return total


@_compiled_in_order()
def _add_squares(ours, columns, begin, end, squares):
    """Adds the squared differences of four rows and the probes from `begin` to `end`, column by column."""
    row0, row1, row2, row3 = _four(ours, 0)
    squares0 = squares[0][begin:end]
    squares1 = squares[1][begin:end]
    squares2 = squares[2][begin:end]
    squares3 = squares[3][begin:end]

    # Four columns at a time: what is read of the probes serves four rows, and sums are read and written once for four.
    for d in range(0, len(columns), 4):
        ours0 = _four(row0, d)
        ours1 = _four(row1, d)
        ours2 = _four(row2, d)
        ours3 = _four(row3, d)
        column0 = columns[d][begin:end]
        column1 = columns[d + 1][begin:end]
        column2 = columns[d + 2][begin:end]
        column3 = columns[d + 3][begin:end]

        for p in range(end - begin):
            theirs = (column0[p], column1[p], column2[p], column3[p])
            squares0[p] = _add_four(squares0[p], ours0, theirs)
            squares1[p] = _add_four(squares1[p], ours1, theirs)
            squares2[p] = _add_four(squares2[p], ours2, theirs)
            squares3[p] = _add_four(squares3[p], ours3, theirs)


@_compiled_in_order()
def _block_squares(rows, ids, left, columns, begin, end, ours, squares):
    """Computes the squared differences of up to four rows over a block of columns, which begins at `left`."""
    # Beyond the last column ours are 0, as the probes' are. Beyond the last row is what was there before: its squares
    # are computed as well, and not looked at.
    width = min(TOGETHER, rows.shape[1] - left)
    for i in range(len(ids)):
        _copy(ours[i][:width], rows[ids[i]][left : left + width])
        _fill(ours[i][width:], 0)

    for i in range(4):
        _fill(squares[i][begin:end], 0)
    _add_squares(ours, columns[left : left + TOGETHER], begin, end, squares)


# Loops of their own over whole arrays, as of slices Numba compiles assignments to slower code.
@_compiled_in_order()
def _fill(array, value):
    for p in range(len(array)):
        array[p] = value


@_compiled_in_order()
def _copy(array, values):
    for p in range(len(array)):
        array[p] = values[p]


@_compiled_in_order()
def _add(array, values):
    for p in range(len(array)):
        array[p] += values[p]


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
def _same_choice(ids, choice):
    """Returns the ids before the first of a row that takes other probes than the first row."""
    _, begin, end = choice[ids[0]]
    for i in range(1, len(ids)):
        if choice[ids[i], 1] != begin or choice[ids[i], 2] != end:
            return ids[:i]
    return ids


@_compiled()
def _score(choice, squares, bits, infinite, k):
    """Returns a row's mean distance to the k nearest of the probes that it takes."""
    own, begin, end = choice
    return _mean_of_smallest(squares[begin:end], bits[begin:end], infinite, own - begin, k)


def _kernel(rows, ids, columns, choice, k, ours, squares, bits, infinite, totals, out):
    """Scores rows; see `mean_of_nearest`."""
    width = rows.shape[1]
    first = 0
    while first < len(ids):
        some = _same_choice(ids[first : first + ROWS], choice)
        first += len(some)

        # Whole lines of probes: what is computed beside those that the rows take is not looked at.
        _, begin, end = choice[some[0]]
        begin = begin // LINE * LINE
        end = -(-end // LINE) * LINE
        for i in range(len(some)):
            _fill(totals[i][begin:end], 0)

        for left in range(0, max(1, width), TOGETHER):
            for i in range(0, len(some), 4):
                four = some[i : i + 4]
                _block_squares(rows, four, left, columns, begin, end, ours, squares)
                for j in range(len(four)):
                    # Those of wide rows are added up in float64, so that errors do not add up with them.
                    if width > TOGETHER:
                        _add(totals[i + j][begin:end], squares[j][begin:end])
                    else:
                        out[four[j]] = _score(choice[four[j]], squares[j], bits[j], infinite, k)

        if width > TOGETHER:
            for i in range(len(some)):
                _copy(squares[0][begin:end], totals[i][begin:end])
                out[some[i]] = _score(choice[some[i]], squares[0], bits[0], infinite, k)


# Both are compiled only when they are called.
_plain_kernel = _compiled()(_kernel)
try:
    _cached_kernel = _compiled(cache=True)(_kernel)
except RuntimeError:  # no folder to keep it in can be written
    _cached_kernel = _plain_kernel
