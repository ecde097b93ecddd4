"""Trajectories wherever they lie, in memory or on disk, and how they are read: a chunk at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

CHUNK_VALUES = 2**22  # of trajectories held at a time for each device, twice, whatever N is
CPU_DISTANCES = 2**19  # from rows to probes that XLA holds at a time on each CPU device,
ACCELERATOR_DISTANCES = 2**27  # and on each accelerator; TPUs hold them twice


class Rows(Protocol):
    """Trajectories in memory or on disk: an array, a memory map, or `TrajectoryStore.rows`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, T) or (N, T, width)."""

    @property
    def dtype(self) -> Any:
        """A NumPy dtype."""

    def __getitem__(self, rows: Any) -> Any:
        """Reads a slice, or a sorted array of ids."""


@dataclass(frozen=True)
class RowRange:
    """The rows from `begin` to `end` of others; nothing is read before it is indexed."""

    rows: Rows
    begin: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, T) or (N, T, width)."""
        return self.end - self.begin, *self.rows.shape[1:]

    @property
    def dtype(self) -> Any:
        """A NumPy dtype."""
        return self.rows.dtype

    def __getitem__(self, rows: Any) -> Any:
        """Reads a slice, or a sorted array of ids, which count from `begin`."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.end - self.begin)
            return self.rows[self.begin + start : self.begin + stop]
        return self.rows[self.begin + rows]


def row_chunks(rows: Rows, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Cuts a range of rows into chunks, each small enough to be held in memory.

    Args:
      rows: trajectories.
      begin: the first row.
      end: the row after the last.

    Yields:
      (start, stop) of consecutive chunks.
    """
    return parts_of_range(begin, end, chunk_size(rows))


def chunk_size(rows: Rows) -> int:
    """Returns how many rows are held at a time, 1 at least."""
    return chunk_size_of(math.prod(rows.shape[1:]))


def chunk_size_of(values: int) -> int:
    """Returns how many rows of so many values are held at a time, 1 at least."""
    return max(1, CHUNK_VALUES // max(1, values))


def rows_of_chunk(values: int, num_probes: int, platform: str) -> int:
    """Returns how many rows a device is given at a time, at the most.

    Args:
      values: of a row.
      num_probes: P.
      platform: of the device.
    """
    most = ACCELERATOR_DISTANCES
    if platform == "cpu":
        most = CPU_DISTANCES
    return min(chunk_size_of(values), max(1, most // num_probes))


def parts_of_range(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Cuts a range into parts of one size, of which the last may be smaller.

    Args:
      begin: where the range begins.
      end: where it ends.
      size: of a part, 1 at least.

    Yields:
      (start, stop) of consecutive parts.
    """
    for start in range(begin, end, size):
        yield start, min(end, start + size)
