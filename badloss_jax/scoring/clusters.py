"""Attacks as clusters of a class: examples that are alike, far from the clean probes, and that no probe is among.

A distance to the nearest probes asks of each example by itself how strange it is. An attack is a crowd: its examples
share a trigger, and what the network learnt of it. So within each class

1. mixtures of Gaussians with one shared covariance, of several sizes and from several starts, propose clusters;
2. each grows, or shrinks, to a fixed point of a linear classifier, "of the cluster or not". It is a ridge regression
   whose leave-one-out predictions have a closed form (PRESS; Allen 1974), so that no example judges itself;
3. the evidence for each is weighed: how far it lies from the probes, how few probes it holds for its share of the
   class, how wide the gap around it is, how many starts agree on it, from how many classes its members seem to come,
   by what the network took them for after its first epoch, and whether it takes them for others in the end. How wide
   a gap is natural differs from data set to data set: groups that do hold probes show it;
4. the cluster of the most evidence is taken out, and the rest of the class searched again, until nothing is left;
5. what is certain in a class is divided anew, by attacks (`parts`).

All classes of about one size are one batched program; the devices share the classes. `growth` has the mathematics of
one class, `evidence` what signs weigh; here classes are read, padded, handed to the devices, and searched again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from threadpoolctl import threadpool_limits

from badloss_jax.core.errors import UsageError
from badloss_jax.core.mesh import by_rows, make_mesh, place_rows, round_up, to_host
from badloss_jax.core.seeding import derived_seed
from badloss_jax.scoring.distances import Rows, row_chunks
from badloss_jax.scoring.evidence import NATURAL, Cluster, Signs, evidence_of, judged, natural_gap
from badloss_jax.scoring.growth import best_of_class
from badloss_jax.scoring.impressions import MOST_ODDS, Impressions, chosen_epochs
from badloss_jax.scoring.parts import attacks_among

_LOWEST = -15.0  # log-probabilities below say no more
_SOME = 4096  # examples that show whether values are log-probabilities
_FRINGE = -0.3  # score from which on examples are taken out with a cluster that is well apart; 0 is the middle
FEW = 30  # examples; in a class of fewer nothing is looked for
FEW_PROBES = 3  # in a class of fewer nothing is certain
_ATTACKS_OF_A_CLASS = 8  # at most
_VALUES = 2**26  # of trajectories on the devices at a time
_evidence_of = jax.jit(evidence_of)


def find_clusters(
    kinds: Sequence[Float[np.ndarray, "N T w"] | Rows], labels: Int[np.ndarray, "N"], is_probe: Bool[np.ndarray, "N"],
    far: Float[np.ndarray, "N"], looks: Impressions | None = None, *, threshold: float, seed: int = 0,
    mesh: Mesh | None = None,
) -> list[Cluster]:  # fmt: skip
    """Finds the clusters of every class whose evidence reaches a threshold, and says which are certain.

    From `CERTAIN` on they are; of more than 13 classes from where K x `clean_class_p_value`(v) is 5 %. Where there are
    such, somebody attacks, and others that are well apart, far out, or surely from other classes, need less:
    the least evidence v at which the clean classes that would have it, K x `clean_class_p_value`(v), are at most 5 % of
    the clusters that do (Benjamini and Hochberg 1995). In classes of fewer than 3 probes none is certain.

    Args:
      kinds: trajectories, in memory or on disk, such as features and ranked log-probabilities; of a kind that is never
        positive, values below -15 count as that. At most eight of their epochs are looked at (`chosen_epochs`), which
        a class at a time is read of.
      labels: int [N], as trained on.
      is_probe: bool [N].
      far: [N], log distance to the probes, a class on the scale of its own (`class_scales`).
      looks: what each example looks like, if features were recorded (`impressions_of`).
      threshold: evidence of a cluster, at least.
      seed: of the mixtures' starts.
      mesh: the devices, by default one.

    Returns:
      Clusters, class by class, the certain ones first.

    Raises:
      UsageError: shapes that do not fit; values that are not finite.
    """
    count = len(labels)
    if any(len(rows.shape) != 3 or rows.shape[0] != count for rows in kinds) or len(far) != count:
        raise UsageError(f"trajectories are {[rows.shape for rows in kinds]} and distances {far.shape}: expected"
                         f" [{count}, T, width] and [{count}]")  # fmt: skip
    mesh = mesh or make_mesh(jax.local_devices()[:1])
    labels, far = np.asarray(labels), np.asarray(far, np.float32)

    known, sizes = np.unique(labels, return_counts=True)
    group = np.searchsorted(known, labels)
    order = np.argsort(group, kind="stable")
    members = dict(zip(range(len(known)), np.split(order, np.cumsum(sizes)[:-1]), strict=True))
    few_probes = set(known[np.bincount(group[is_probe], minlength=len(known)) < FEW_PROBES].tolist())

    first, late, odds = _strange(looks, known, group)
    floors = [_floor(rows) for rows in kinds]
    means, spreads = _moments(kinds, floors)
    if not all(np.isfinite(values).all() for values in (far, *means)):
        raise UsageError("trajectories or distances hold NaN or infinity: leave such examples out")
    look = _Look(kinds, floors, means, spreads, is_probe, far, first, late, odds, len(known), looks is not None)

    found: list[Cluster] = []
    waiting = {label: ids for label, ids in members.items() if len(ids) >= FEW}
    searched, padded, natural = len(waiting), _padded_sizes(sizes), NATURAL[-1]
    for attempt in range(_ATTACKS_OF_A_CLASS):
        again = {}
        # JAX takes LAPACK from SciPy, whose idle threads would spin on the cores that XLA needs next.
        with threadpool_limits(1, user_api="blas"):
            best = _search(look, waiting, padded, derived_seed(seed, "clusters", attempt), mesh)
        if not attempt:
            natural = natural_gap([one.natural for one in best])
        for label, ids, cluster in ((one.label, one.ids, _cluster(look, one, natural)) for one in best):
            if cluster is None or cluster.evidence < threshold:
                continue
            found.append(replace(cluster, label=int(known[label])))
            left = np.setdiff1d(ids, cluster.ids)
            if len(left) >= FEW:
                again[label] = left
        waiting = again
        if not waiting:
            break

    # What nothing is certain of must not make others certain, either.
    weighed = judged([one for one in found if one.label not in few_probes], searched)
    possible = [one for one in weighed if not one.certain] + [one for one in found if one.label in few_probes]
    attacks: list[Cluster] = []
    for label in sorted({one.label for one in weighed if one.certain}):
        those = [one for one in weighed if one.certain and one.label == label]
        attacks += _divided(those, look, derived_seed(seed, "parts", label))
    return sorted([*attacks, *possible], key=lambda cluster: cluster.label)


def _divided(those: list[Cluster], look: "_Look", seed: int) -> list[Cluster]:
    """Divides the certain clusters of a class by attacks, each of which takes its signs from where most of it was."""
    with threadpool_limits(1, user_api="blas"):
        attacks = attacks_among([one.ids for one in those], look.points, look.first, look.num_classes, seed)
    return [
        replace(max(those, key=lambda one: len(np.intersect1d(one.ids, ids, assume_unique=True))), ids=ids)
        for ids in attacks
    ]


@dataclass(frozen=True)
class _Look:
    """Everything that a search reads."""

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

    def points(self, ids: np.ndarray) -> Float[np.ndarray, "n D"]:
        """Reads the standardised trajectories of a few examples."""
        parts = [(_values(rows, ids, floor) - mean) / spread for rows, floor, mean, spread
                 in zip(self.kinds, self.floors, self.means, self.spreads, strict=True)]  # fmt: skip
        return np.concatenate(parts, axis=1)


def _strange(looks: Impressions | None, known: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the other classes that examples look like, first and late, and the odds for them.

    What an example looks like counts where that is another class; its own is the number past all classes.
    """
    nothing = np.full(len(group), len(known), np.int32)
    if looks is None:
        return nothing, nothing, np.full(len(group), -MOST_ODDS, np.float32)

    def other(seen: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(known, seen), len(known) - 1).astype(np.int32)
        return np.where(place == group, nothing, place)

    return other(looks.first), other(looks.late), looks.odds.astype(np.float32)


def _floor(rows: Rows) -> float:
    """Returns the least value that counts: log-probabilities have one, features have none."""
    return _LOWEST if (np.asarray(rows[:_SOME]) <= 0).all() else -math.inf


def _values(rows: Rows, which: slice | np.ndarray, floor: float) -> Float[np.ndarray, "n D"]:
    chunk = np.asarray(rows[which])[:, chosen_epochs(rows.shape[1])]
    return np.maximum(chunk.reshape(len(chunk), -1).astype(np.float32), floor)


def _moments(kinds: Sequence[Rows], floors: Sequence[float]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns mean and standard deviation of every value, read chunk by chunk."""
    means, spreads = [], []
    for rows, floor in zip(kinds, floors, strict=True):
        width = len(chosen_epochs(rows.shape[1])) * rows.shape[2]
        total, squares = np.zeros((2, width))
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


def _padded_sizes(counts: Int[np.ndarray, "K"]) -> Int[np.ndarray, "K"]:
    """Returns the sizes that classes are padded to: the largest, and halves of it, so that programs are few."""
    largest = int(counts.max(initial=FEW))
    steps = np.floor(np.log2(largest / np.maximum(counts, 1)) + 1e-9)
    sizes = np.ceil(largest / 2**steps / 64).astype(np.int64) * 64
    return np.maximum(sizes, counts)


@dataclass(frozen=True)
class _Best:
    """What `best_of_class` says of one class, padding cut off: its clusters are two until the natural gap is known."""

    label: int
    ids: np.ndarray
    scores: np.ndarray
    values: np.ndarray
    natural: float


def _search(
    look: _Look, waiting: dict[int, np.ndarray], padded: Int[np.ndarray, "K"], seed: int, mesh: Mesh
) -> list[_Best]:
    """Looks for the best clusters of each class."""
    by_size: dict[int, list[int]] = {}
    for label in waiting:
        by_size.setdefault(int(padded[label]), []).append(label)

    found = []
    for size, labels in sorted(by_size.items()):
        together = max(1, _VALUES // (size * (look.width + 600)) // mesh.size)
        if mesh.devices.flat[0].platform == "cpu":
            together = 1  # a class keeps all cores busy, and one program serves any number of classes
        together *= mesh.size
        program = _best_cluster(mesh, look.num_classes)
        for start in range(0, len(labels), together):
            chunk = labels[start : start + together]
            slots = [waiting[label] for label in chunk]
            slots += [np.zeros(0, np.int64)] * (round_up(len(slots), mesh) - len(slots))
            arrays = _arrays(look, slots, size, mesh)
            keys = place_rows((len(slots), 1), mesh, partial(_seeds, chunk, seed, len(slots)))
            scores, values, natural = (to_host(array) for array in program(*arrays, keys))
            for number, label in enumerate(chunk):
                ids = slots[number]
                found.append(_Best(label, ids, scores[number, : len(ids)], values[number], float(natural[number])))
    return found


def _cluster(look: _Look, best: _Best, natural: float) -> Cluster | None:
    """Makes a cluster of what the devices found in a class; None if they found none."""
    possible, share, *signs_of_both = best.values
    evidence = np.where(possible, np.asarray(_evidence_of(natural, share, *signs_of_both)), -np.inf)
    which = int(evidence.argmax())
    known = [float(values[which]) for values in signs_of_both]
    signs = Signs(*known) if look.has_looks else Signs(*known[:4], *[math.nan] * 3)
    # Two standard deviations above the rest's mean, which is at -1.
    fringe = min(max(4 / max(signs.gap, 1e-6) - 1, _FRINGE), 0.0)
    ids, scores = best.ids, best.scores[:, which]
    members = ids[(scores > fringe) & ~look.is_probe[ids]]
    if not math.isfinite(evidence[which]) or not len(members):
        return None
    return Cluster(best.label, members, float(evidence[which]), signs, scores, ids)


def _seeds(labels: list[int], seed: int, count: int, begin: int, end: int) -> np.ndarray:
    drawn = [derived_seed(seed, label) for label in labels] + [0] * (count - len(labels))
    return np.array(drawn[begin:end], np.uint32)[:, None]


def _arrays(look: _Look, slots: list[np.ndarray], size: int, mesh: Mesh) -> list[jax.Array]:
    """Places points, which of them are real, which probes, distances and looks, padded, by classes."""

    def rows(of: np.ndarray, dtype: type) -> jax.Array:
        def read(begin: int, end: int) -> np.ndarray:
            out: np.ndarray = np.zeros((end - begin, size), dtype)
            for slot in range(begin, end):
                out[slot - begin, : len(slots[slot])] = of[slots[slot]]
            return out

        return place_rows((len(slots), size), mesh, read)

    def points(begin: int, end: int) -> np.ndarray:
        out = np.zeros((end - begin, size, look.width), np.float32)
        for slot in range(begin, end):
            if len(slots[slot]):  # else it only fills up the devices
                out[slot - begin, : len(slots[slot])] = look.points(slots[slot])
        return out

    return [
        place_rows((len(slots), size, look.width), mesh, points),
        rows(np.ones(len(look.far), bool), np.bool_),
        rows(look.is_probe, np.bool_),
        rows(look.far, np.float32),
        rows(look.first, np.int32),
        rows(look.late, np.int32),
        rows(look.odds, np.float32),
    ]


@lru_cache(maxsize=8)
def _best_cluster(mesh: Mesh, num_classes: int) -> Callable[..., tuple[Array, Array, Array]]:
    """Compiles the search for the classes of a batch, which the devices share."""
    rows, best = by_rows(mesh), partial(best_of_class, num_classes=num_classes)

    def one(*of_class: Array) -> tuple[Array, Array, Array]:
        # Where products are rounded by default, a mixture's covariance may cease to be one.
        with jax.default_matmul_precision("highest"):
            return best(*of_class)

    def in_turn(*arrays: Array) -> tuple[Array, Array, Array]:
        return jax.lax.map(lambda of_class: one(*of_class), arrays)

    # XLA shares a product among the cores of a CPU only where it is not one of a batch.
    search = in_turn if mesh.devices.flat[0].platform == "cpu" else jax.vmap(one)
    shared = jax.shard_map(search, mesh=mesh, in_specs=rows.spec, out_specs=rows.spec, check_vma=False)
    return jax.jit(shared, in_shardings=rows)
