"""Mean Euclidean distance of each trajectory to its k nearest probes (BaDLoss, section 4).

Rows are taken in chunks, the next one being read while one is computed, so memory does not depend on N. Two kernels do
the work (see `kernels`): "numba" on the CPU, "xla" on any device of JAX. "auto" takes "xla" on GPUs and TPUs, and
"numba" where JAX runs on the CPU: two to seven times as fast from 10,000 rows on (configs/results/README.md).

Of several processes each reads and scores the rows of its own devices, from the first to the last, and all distances
are gathered once, at the end. A chunk of a device is as large as if there was no other.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from badloss_jax.core.errors import UsageError
from badloss_jax.core.mesh import (
    by_rows,
    local_mesh,
    make_mesh,
    place,
    place_rows,
    process_blocks,
    replicated,
    round_up,
    to_host,
)
from badloss_jax.scoring.kernels import on_cpu, on_devices
from badloss_jax.scoring.rows import CHUNK_VALUES, Rows, chunk_size, parts_of_range, rows_of_chunk

KERNELS = ("auto", "numba", "xla")
_NAMED = 10  # ids in a message


def knn_distances(
    trajectories: Float[Array | np.ndarray, "N *T"] | Rows,
    probes: Float[Array | np.ndarray, "P *T"],
    k: int,
    mesh: Mesh | None = None,
    *,
    labels: Int[np.ndarray, "N"] | None = None,
    probe_labels: Int[np.ndarray, "P"] | None = None,
    kernel: str = "auto",
    exclude_non_finite: bool = False,
) -> Float[np.ndarray, "N"]:
    """Computes each trajectory's mean distance to the k nearest probes.

    Args:
      trajectories: [N, T] or [N, T, width], finite; computed in float32, or float64 if they are and x64 is on. What is
        not in memory is read chunk by chunk.
      probes: [P, T] or [P, T, width], finite.
      k: 1 to P; with labels, to the number of probes of each label.
      mesh: the devices that share the rows, by default one. Its processes each read and score their own rows.
      labels: int [N], to compare a trajectory with the probes of its own label alone.
      probe_labels: int [P], likewise; both or neither.
      kernel: "numba", "xla", or "auto".
      exclude_non_finite: give rows with NaN or infinity the distance NaN, in place of the error.

    Returns:
      float32 [N] (or float64), at least 0. Within 1e-5 relative of exact arithmetic, 1e-6 absolute near zero.

    Raises:
      UsageError: shapes that do not fit (both are named), k outside 1..P, a label with fewer than k probes, an unknown
        kernel, NaN or infinite rows (ids are named), or a distance that its dtype cannot hold.

    Example:
      >>> import numpy as np
      >>> from badloss_jax import knn_distances
      >>> probes = np.array([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
      >>> knn_distances(np.array([[0.0, 0.0], [0.0, 3.0]]), probes, k=2).tolist()
      [0.5, 2.5]
    """
    rows, flat = _check(trajectories, probes)
    if not 1 <= k <= len(flat):
        raise UsageError(f"k = {k} with {len(flat)} probes: expected 1 <= k <= {len(flat)}")
    if (labels is None) != (probe_labels is None):
        raise UsageError("labels and probe_labels go together: one of them is None")

    flat, choice = _choose(flat, rows.shape[0], k, labels, probe_labels, leave_out=False)
    distances = _distances(_Comparison(rows, flat, choice, k), mesh, kernel)

    # The kernels leave NaN where a row has any; which rows those are is looked up once.
    bad = np.flatnonzero(~np.isfinite(distances))
    if len(bad) and not exclude_non_finite:
        raise UsageError(f"{len(bad)} trajectories are NaN or infinite, {_named(bad)}")
    return distances


def leave_one_out_distances(
    probes: Float[Array | np.ndarray, "P *T"],
    k: int,
    *,
    labels: Int[np.ndarray, "P"] | None = None,
    kernel: str = "auto",
) -> Float[np.ndarray, "P"]:
    """Computes each probe's mean distance to the k nearest of the other probes.

    Args:
      probes: [P, T] or [P, T, width], finite.
      k: 1 to P - 1; with labels, to the number of probes of each label less 1.
      labels: int [P], to compare a probe with those of its own label alone.
      kernel: "numba", "xla", or "auto".

    Returns:
      float32 [P] (or float64), at least 0.

    Raises:
      UsageError: k outside 1..P-1, a label with no more than k probes, NaN or infinite rows, or an unknown kernel.

    Example:
      >>> import numpy as np
      >>> from badloss_jax import leave_one_out_distances
      >>> leave_one_out_distances(np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), k=1).tolist()
      [1.0, 1.0, 2.0]
    """
    rows, flat = _check(probes, probes)
    if not 1 <= k < len(flat):
        raise UsageError(
            f"k = {k} with {len(flat)} probes: expected 1 <= k < {len(flat)}, as a probe leaves itself out"
        )

    flat, choice = _choose(flat, len(flat), k, labels, labels, leave_out=True)
    return _distances(_Comparison(rows, flat, choice, k), None, kernel)


def nearest_probes(
    trajectories: Float[np.ndarray, "M *T"], probes: Float[np.ndarray, "P *T"], k: int
) -> Int[np.ndarray, "M k"]:
    """Finds the k nearest probes of a few trajectories, to show them.

    Distances of which nearly the same is taken from nearly the same come out in either order.

    Args:
      trajectories: [M, T] or [M, T, width], finite.
      probes: [P, T] or [P, T, width], finite.
      k: at least 1; of fewer probes, all are returned.

    Returns:
      int64 [M, k], rows of `probes`, the nearest first.
    """
    references = _flat(np.asarray(probes), np.float32)
    k = min(k, len(references))
    squares = (references**2).sum(1)

    nearest = np.empty((len(trajectories), k), np.int64)
    for start, stop in parts_of_range(0, len(nearest), max(1, CHUNK_VALUES // max(references.shape))):
        chunk = _flat(np.asarray(trajectories[start:stop]), np.float32)
        # The square of the trajectory itself is left out: it is the same for all probes.
        nearest[start:stop] = np.argsort(squares - 2 * chunk @ references.T, axis=1, kind="stable")[:, :k]
    return nearest


@dataclass(frozen=True)
class _Choice:
    """With which probes a row is compared: those from `begin` to `end`, but for its own.

    Attributes:
      num_probes: P.
      own: [N], the probe that each row is itself; None if rows are no probes.
      group: [N], which of `bounds` counts; None if all rows are compared with all probes.
      bounds: [G, 2], where the probes of each label begin and end.
    """

    num_probes: int
    own: np.ndarray | None = None
    group: np.ndarray | None = None
    bounds: np.ndarray | None = None

    @property
    def whole(self) -> bool:
        """Whether every row is compared with every probe."""
        return self.own is None and self.group is None

    def __getitem__(self, rows: Any) -> Int[np.ndarray, "M 3"]:
        """Returns (own or -1, begin, end) of a slice with start and stop, or of an array of ids."""
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        out = np.empty((count, 3), np.int32)
        out[:] = -1, 0, self.num_probes
        if self.own is not None:
            out[:, 0] = self.own[rows]
        if self.bounds is not None and self.group is not None:
            out[:, 1:] = self.bounds[self.group[rows]]
        return out


@dataclass(frozen=True)
class _Comparison:
    """What is compared with what.

    Attributes:
      rows: [N, T] or [N, T, width].
      probes: [P, D], in the dtype to compute in.
      choice: with which of the probes each row is compared.
      k: how many of these are the nearest.
    """

    rows: Rows
    probes: np.ndarray
    choice: _Choice
    k: int

    def read(self, start: int, stop: int) -> Float[np.ndarray, "R D"]:
        """Reads some rows."""
        return _flat(np.asarray(self.rows[start:stop]), self.probes.dtype)

    def read_ahead(self, begin: int, end: int, size: int) -> Iterator[tuple[int, int, Float[np.ndarray, "R D"]]]:
        """Reads a range of rows in chunks, the next one while the caller works on one.

        Yields:
          (start, stop, rows) of consecutive chunks.
        """
        parts = list(parts_of_range(begin, end, size))
        with ThreadPoolExecutor(1, "badloss-reading") as reader:
            ahead = [reader.submit(self.read, *part) for part in parts[:1]]
            for (start, stop), following in zip(parts, [*parts[1:], None], strict=True):
                chunk = ahead.pop().result()
                if following:
                    ahead.append(reader.submit(self.read, *following))
                yield start, stop, chunk


def _choose(
    probes: np.ndarray, count: int, k: int, labels: Any, probe_labels: Any, *, leave_out: bool
) -> tuple[np.ndarray, _Choice]:
    """Sorts the probes by their labels, if there are any, and says with which of them each row is compared."""
    if labels is None:
        return probes, _Choice(len(probes), np.arange(count) if leave_out else None)

    ours = np.asarray(labels)
    theirs = np.asarray(probe_labels)
    if ours.shape != (count,) or theirs.shape != (len(probes),):
        raise UsageError(
            f"labels are {ours.shape} and probe_labels {theirs.shape}: expected {(count,)} and {(len(probes),)}"
        )

    known, sizes = np.unique(theirs, return_counts=True)
    group = np.minimum(np.searchsorted(known, ours), len(known) - 1)
    available = np.where(known[group] == ours, sizes[group], 0)
    few = np.flatnonzero(available < k + leave_out)
    if len(few):
        needed = f"k = {k} others are needed" if leave_out else f"k = {k}"
        raise UsageError(f"label {ours[few[0]]} has {available[few[0]]} probes, and {needed}")

    # Sorted by label, the probes of each are one range, which the kernels take.
    order = np.argsort(theirs, kind="stable")
    own = np.argsort(order) if leave_out else None
    ends = np.cumsum(sizes)
    return probes[order], _Choice(len(probes), own, group, np.stack([ends - sizes, ends], axis=1))


def _check(trajectories: Any, probes: Any) -> tuple[Rows, np.ndarray]:
    """Returns the rows as they are, and the probes [P, D] in the dtype to compute in."""
    rows = np.asarray(trajectories) if isinstance(trajectories, jax.Array | list) else trajectories
    references = np.asarray(probes)
    if len(rows.shape) < 2 or rows.shape[1:] != references.shape[1:] or not len(references):
        raise UsageError(f"trajectories are {rows.shape} and probes {references.shape}: expected [N, T] and [P, T]")

    given = jax.dtypes.canonicalize_dtype(np.promote_types(rows.dtype, references.dtype))
    flat = _flat(references, jnp.promote_types(given, jnp.float32))
    bad = np.flatnonzero(~np.isfinite(flat).all(1))
    if len(bad):
        raise UsageError(f"{len(bad)} probes are NaN or infinite, {_named(bad)}")
    return rows, flat


def _distances(comparison: _Comparison, mesh: Mesh | None, kernel: str) -> np.ndarray:
    """Returns the distances of all rows; those without one are NaN."""
    if kernel not in KERNELS:
        raise UsageError(f"unknown kernel {kernel!r}: expected {', '.join(KERNELS)}")
    # Numba is several times faster on CPUs, and knows no other device.
    mesh = mesh or make_mesh(jax.local_devices()[:1])
    if kernel == "auto":
        kernel = "numba" if mesh.devices.flat[0].platform == "cpu" else "xla"

    def score(begin: int, end: int) -> np.ndarray:
        if kernel == "numba":
            distances = _on_cpu(comparison, begin, end)
        else:
            distances = _on_devices(comparison, local_mesh(mesh), begin, end)
        _repair(distances, comparison, begin)
        return distances

    count = comparison.rows.shape[0]
    if not mesh.is_multi_process:
        return score(0, count)
    return _by_processes(score, count, comparison.probes.dtype, mesh)


def _by_processes(score: Callable[[int, int], np.ndarray], count: int, dtype: Any, mesh: Mesh) -> np.ndarray:
    """Scores all rows, each process its own; the one place where processes wait for each other."""
    distances = np.zeros(round_up(count, mesh), dtype)
    for begin, end, process in process_blocks(count, mesh):
        if process == jax.process_index():
            distances[begin:end] = score(begin, end)

    everywhere = place_rows(distances.shape, mesh, lambda begin, end: distances[begin:end])
    distances[:] = to_host(everywhere)
    return distances[:count]


def _on_cpu(comparison: _Comparison, begin: int, end: int) -> np.ndarray:
    """Scores a range of rows with "numba"."""
    probes = comparison.probes
    distances = np.empty(end - begin, probes.dtype)
    for start, stop, chunk in comparison.read_ahead(begin, end, chunk_size(comparison.rows)):
        chosen = comparison.choice[start:stop]
        distances[start - begin : stop - begin] = on_cpu(chunk, probes, chosen, comparison.k)
    return distances


def _on_devices(comparison: _Comparison, mesh: Mesh, begin: int, end: int) -> np.ndarray:
    """Scores a range of rows with "xla"; fixed-size chunks, so that one compiled kernel serves any N."""
    size = _rows_at_a_time(comparison, end - begin, mesh)
    probes = place(comparison.probes, replicated(mesh))
    kernel = on_devices(comparison.k, mesh)

    def score(start: int, stop: int, chunk: np.ndarray) -> jax.Array:
        chosen = None
        if not comparison.choice.whole:
            chosen = _padded(comparison.choice[start:stop], size)
        on_mesh, chosen_on_mesh = place((_padded(chunk, size), chosen), by_rows(mesh))
        return kernel(on_mesh, probes, chosen_on_mesh)

    distances = np.empty(end - begin, comparison.probes.dtype)

    def keep(start: int, at_work: jax.Array) -> None:
        kept = distances[start - begin : start - begin + size]
        kept[:] = to_host(at_work)[: len(kept)]

    # A chunk is copied to the host only once the next one is at work, and that is all that a device has before it: two
    # chunks, and on CPUs two programs, of which XLA takes no more than 32 (see `training.in_flight`).
    before: tuple[int, jax.Array] | None = None
    for start, stop, chunk in comparison.read_ahead(begin, end, size):
        at_work = score(start, stop, chunk)
        if before:
            keep(*before)
        before = start, at_work
    if before:
        keep(*before)
    return distances


def _rows_at_a_time(comparison: _Comparison, count: int, mesh: Mesh) -> int:
    """Returns the size of a chunk of `count` rows for all devices of a mesh, a multiple of their number."""
    share = rows_of_chunk(math.prod(comparison.rows.shape[1:]), len(comparison.probes), mesh.devices.flat[0].platform)

    # Of few rows, no more than there are.
    return min(mesh.size * share, round_up(max(1, count), mesh))


def _repair(distances: np.ndarray, comparison: _Comparison, begin: int) -> None:
    """Computes finite rows whose squares overflowed once more, in float64; `begin` is the first row's id."""
    probes = comparison.probes.astype(np.float64)
    missing = np.flatnonzero(np.isnan(distances))
    for start, stop in parts_of_range(0, len(missing), chunk_size(comparison.rows)):
        places = missing[start:stop]
        chunk = _flat(np.asarray(comparison.rows[begin + places]), np.float64)
        finite = np.isfinite(chunk).all(1)
        places = places[finite]

        # What even its own dtype cannot hold becomes infinite, which the caller names.
        with np.errstate(over="ignore"):
            distances[places] = on_cpu(chunk[finite], probes, comparison.choice[begin + places], comparison.k)


def _padded(real: np.ndarray, length: int) -> np.ndarray:
    if len(real) == length:
        return real
    return np.concatenate([real, np.zeros((length - len(real), *real.shape[1:]), real.dtype)])


def _flat(array: np.ndarray, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(array.reshape(len(array), math.prod(array.shape[1:])), dtype)


def _named(ids: np.ndarray) -> str:
    names = f"rows {', '.join(map(str, ids[:_NAMED]))}"
    if len(ids) > _NAMED:
        names += ", ..."
    return names
