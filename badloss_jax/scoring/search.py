"""The search of classes for their best clusters: read, padded, handed to the devices, which share the classes.

All classes of about one size are one batched program; `growth` has the mathematics of one class.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from threadpoolctl import threadpool_limits

from badloss_jax.core.mesh import by_rows, jit_on, place_rows, round_up, to_host
from badloss_jax.core.seeding import derived_seed
from badloss_jax.scoring.growth import best_of_class
from badloss_jax.scoring.impressions import MOST_ODDS, Impressions, chosen_epochs
from badloss_jax.scoring.rows import Rows, row_chunks
from badloss_jax.scoring.signs import ClassExamples

FEW = 30  # examples; in a class of fewer nothing is looked for
_LOWEST = -15.0  # log-probabilities below say no more
_SOME = 4096  # examples that show whether values are log-probabilities
_VALUES = 2**26  # of trajectories on the devices at a time
_BESIDE = 600  # values that a program holds of an example beside its trajectory


@dataclass(frozen=True)
class SearchData:
    """Everything that a search reads, of all N examples.

    Attributes:
      kinds: trajectories, in memory or on disk.
      floors: of each kind, the least value that counts.
      means: of each kind, of every value.
      spreads: likewise the standard deviations; infinite of what is constant.
      is_probe: [N].
      far: float32 [N], distance to the probes.
      first: int32 [N], the class that each looked like at first, or K if it looked like its own.
      late: int32 [N], likewise in the end.
      odds: float32 [N], log-odds of another class against its own.
      num_classes: K.
      has_looks: whether it is known what examples look like.
    """

    kinds: Sequence[Rows]
    floors: list[float]
    means: list[np.ndarray]
    spreads: list[np.ndarray]
    is_probe: np.ndarray
    far: np.ndarray
    first: np.ndarray
    late: np.ndarray
    odds: np.ndarray
    num_classes: int
    has_looks: bool

    @property
    def width(self) -> int:
        """Values of an example."""
        return sum(mean.size for mean in self.means)

    def points(self, ids: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n D"]:
        """Reads the standardised trajectories of a few examples."""
        parts = [
            (_values(rows, ids, floor) - mean) / spread
            for rows, floor, mean, spread in zip(self.kinds, self.floors, self.means, self.spreads, strict=True)
        ]
        return np.concatenate(parts, axis=1)


def search_data(
    kinds: Sequence[Rows],
    is_probe: Bool[np.ndarray, "N"],
    far: Float[np.ndarray, "N"],
    looks: Impressions | None,
    known: Int[np.ndarray, "K"],
    group: Int[np.ndarray, "N"],
) -> SearchData:
    """Prepares a search: reads all trajectories once, for their moments.

    Args:
      kinds: trajectories, each [N, T, width].
      is_probe: [N].
      far: float32 [N].
      looks: what each example looks like, as labels; None if that is not known.
      known: [K], the labels, ascending.
      group: [N], the number of each example's label among them.

    Returns:
      What `best_clusters` reads.
    """
    first, late, odds = _strange_looks(looks, known, group)
    floors = [_floor(rows) for rows in kinds]
    means, spreads = _moments(kinds, floors)
    return SearchData(
        kinds=kinds,
        floors=floors,
        means=means,
        spreads=spreads,
        is_probe=is_probe,
        far=far,
        first=first,
        late=late,
        odds=odds,
        num_classes=len(known),
        has_looks=looks is not None,
    )


def _strange_looks(looks: Impressions | None, known: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the other classes that examples look like, first and late, and the odds for them.

    What an example looks like counts where that is another class; its own is the number past all classes.
    """
    nothing = np.full(len(group), len(known), np.int32)
    if looks is None:
        return nothing, nothing, np.full(len(group), -MOST_ODDS, np.float32)

    def other(labels: np.ndarray) -> np.ndarray:
        numbers = np.minimum(np.searchsorted(known, labels), len(known) - 1).astype(np.int32)
        return np.where(numbers == group, nothing, numbers)

    return other(looks.first), other(looks.late), looks.odds.astype(np.float32)


def _floor(rows: Rows) -> float:
    """Returns the least value that counts: log-probabilities have one, features have none."""
    return _LOWEST if (np.asarray(rows[:_SOME]) <= 0).all() else -math.inf


def _values(rows: Rows, which: slice | np.ndarray, floor: float) -> Float[np.ndarray, "n D"]:
    chunk = np.asarray(rows[which])[:, chosen_epochs(rows.shape[1])]
    return np.maximum(chunk.reshape(len(chunk), -1).astype(np.float32), floor)


def _moments(kinds: Sequence[Rows], floors: Sequence[float]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns mean and standard deviation of every value, read chunk by chunk."""
    means = []
    spreads = []
    for rows, floor in zip(kinds, floors, strict=True):
        width = len(chosen_epochs(rows.shape[1])) * rows.shape[2]
        total = np.zeros(width)
        squares = np.zeros(width)
        for start, stop in row_chunks(rows, 0, rows.shape[0]):
            chunk = _values(rows, slice(start, stop), floor).astype(np.float64)
            total += chunk.sum(0)
            squares += (chunk**2).sum(0)

        mean = total / rows.shape[0]
        variance = np.maximum(squares / rows.shape[0] - mean**2, 0)
        means.append(mean.astype(np.float32))

        # What is constant tells nothing, and must not be divided by next to nothing.
        spreads.append(np.where(variance > 1e-8, np.sqrt(variance), np.inf).astype(np.float32))
    return means, spreads


def padded_sizes(counts: Int[np.ndarray, "K"]) -> Int[np.ndarray, "K"]:
    """Returns the sizes that classes are padded to: the largest, and halves of it, so that programs are few."""
    largest = int(counts.max(initial=FEW))
    halvings = np.floor(np.log2(largest / np.maximum(counts, 1)) + 1e-9)
    sizes = np.ceil(largest / 2**halvings / 64).astype(np.int64) * 64
    return np.maximum(sizes, counts)


@dataclass(frozen=True)
class BestClusters:
    """What `best_of_class` says of one class, padding cut off: its clusters are two until the natural gap is known.

    Attributes:
      group: the number of the class.
      ids: int64 [n], its examples that were searched.
      scores: [n, 2].
      values: [9, 2], whether each is possible, its share of the class, and its signs.
      natural: the widest gap of a natural group.
    """

    group: int
    ids: Int[np.ndarray, "n"]
    scores: Float[np.ndarray, "n 2"]
    values: Float[np.ndarray, "9 2"]
    natural: float


def best_clusters(
    data: SearchData,
    waiting: Mapping[int, Int[np.ndarray, "n"]],
    padded: Int[np.ndarray, "K"],
    seed: int,
    mesh: Mesh,
) -> list[BestClusters]:
    """Looks for the best clusters of each class.

    Args:
      data: of all examples.
      waiting: group -> the ids of its examples.
      padded: [K], the size that each class is padded to (`padded_sizes`).
      seed: of the mixtures' starts.
      mesh: the devices that share the classes.

    Returns:
      Those of every class that waits, by the sizes that classes are padded to.
    """
    by_size: dict[int, list[int]] = {}
    for group in waiting:
        by_size.setdefault(int(padded[group]), []).append(group)

    # JAX takes LAPACK from SciPy, whose idle threads would spin on the cores that XLA needs next.
    best = []
    with threadpool_limits(1, user_api="blas"):
        for size, groups in sorted(by_size.items()):
            together = _classes_at_a_time(data, size, mesh)
            for start in range(0, len(groups), together):
                chunk = {group: waiting[group] for group in groups[start : start + together]}
                best += _best_of_chunk(data, chunk, size, seed, mesh)
    return best


def _classes_at_a_time(data: SearchData, size: int, mesh: Mesh) -> int:
    """Returns how many classes of a size the devices hold together."""
    # On a CPU a class keeps all cores busy, and one program serves any number of classes.
    each = 1
    if mesh.devices.flat[0].platform != "cpu":
        each = max(1, _VALUES // (size * (data.width + _BESIDE)) // mesh.size)
    return each * mesh.size


def _best_of_chunk(
    data: SearchData, chunk: Mapping[int, np.ndarray], size: int, seed: int, mesh: Mesh
) -> list[BestClusters]:
    """Looks for the best clusters of as many classes as the devices hold at a time."""
    groups = list(chunk)
    slots = list(chunk.values())
    slots += [np.zeros(0, np.int64)] * (round_up(len(slots), mesh) - len(slots))

    examples = _placed(data, slots, size, mesh)
    seeds = place_rows((len(slots), 1), mesh, partial(_seeds, groups, seed, len(slots)))
    program = _program(mesh, data.num_classes)
    scores, values, natural = (to_host(array) for array in program(examples, seeds))
    return [
        BestClusters(group, ids, scores[slot, : len(ids)], values[slot], float(natural[slot]))
        for slot, (group, ids) in enumerate(chunk.items())
    ]


def _seeds(groups: list[int], seed: int, count: int, begin: int, end: int) -> np.ndarray:
    drawn = [derived_seed(seed, group) for group in groups] + [0] * (count - len(groups))
    return np.array(drawn[begin:end], np.uint32)[:, None]


def _placed(data: SearchData, slots: list[np.ndarray], size: int, mesh: Mesh) -> ClassExamples:
    """Places the examples of classes on the devices, padded; an empty slot only fills these up."""

    def rows(values: np.ndarray, dtype: type) -> jax.Array:
        def read(begin: int, end: int) -> np.ndarray:
            out: np.ndarray = np.zeros((end - begin, size), dtype)
            for slot in range(begin, end):
                out[slot - begin, : len(slots[slot])] = values[slots[slot]]
            return out

        return place_rows((len(slots), size), mesh, read)

    def points(begin: int, end: int) -> np.ndarray:
        out = np.zeros((end - begin, size, data.width), np.float32)
        for slot in range(begin, end):
            if len(slots[slot]):
                out[slot - begin, : len(slots[slot])] = data.points(slots[slot])
        return out

    return ClassExamples(
        points=place_rows((len(slots), size, data.width), mesh, points),
        real=rows(np.ones(len(data.far), bool), np.bool_),
        probe=rows(data.is_probe, np.bool_),
        far=rows(data.far, np.float32),
        first=rows(data.first, np.int32),
        late=rows(data.late, np.int32),
        odds=rows(data.odds, np.float32),
    )


@lru_cache(maxsize=8)
def _program(mesh: Mesh, num_classes: int) -> Callable[..., tuple[Array, Array, Array]]:
    """Compiles the search for the classes of a batch, which the devices share."""
    rows = by_rows(mesh)

    def one(examples: ClassExamples, seed: Array) -> tuple[Array, Array, Array]:
        # Where products are rounded by default, a mixture's covariance may cease to be one.
        with jax.default_matmul_precision("highest"):
            return best_of_class(examples, seed, num_classes)

    def in_turn(examples: ClassExamples, seeds: Array) -> tuple[Array, Array, Array]:
        return jax.lax.map(lambda of_class: one(*of_class), (examples, seeds))

    # XLA shares a product among the cores of a CPU only where it is not one of a batch.
    search = in_turn if mesh.devices.flat[0].platform == "cpu" else jax.vmap(one)
    shared = jax.shard_map(search, mesh=mesh, in_specs=rows.spec, out_specs=rows.spec, check_vma=False)
    return jit_on(shared, mesh, in_shardings=rows)
