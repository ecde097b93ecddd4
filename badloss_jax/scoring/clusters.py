"""Attacks as clusters of a class: examples that are alike, far from the clean probes, and that no probe is among.

A distance to the nearest probes asks of each example by itself how strange it is. An attack is a crowd: its examples
share a trigger, and what the network learnt of it. So within each class

1. mixtures of Gaussians with one shared covariance, of several sizes and from several starts, propose clusters;
2. each grows, or shrinks, to a fixed point of a linear classifier, "of the cluster or not". It is a ridge regression
   whose leave-one-out predictions have a closed form (PRESS; Allen 1974), so that no example judges itself;
3. the evidence for each is weighed: how far it lies from the probes, how few probes it holds for its share of the
   class, how wide the gap around it is, how many starts agree on it, and from how many classes its members seem to
   come, by what the network took them for after its first epoch;
4. the cluster of the most evidence is taken out, and the rest of the class searched again, until nothing is left.

All classes of about one size are one batched program; the devices share the classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from badloss_jax.errors import UsageError
from badloss_jax.scoring.distances import Rows, row_chunks
from badloss_jax.seeding import derived_seed
from badloss_jax.training.mesh import by_rows, make_mesh, place_rows, round_up, to_host

EPOCHS = 6  # of a trajectory that are looked at, spread over its length
_LOWEST = -15.0  # log-probabilities below say no more
_SHRINKAGE = 0.1  # of the classifier's covariance towards a multiple of the identity
_COMPONENTS = 20  # principal components that mixtures are fitted to
_SIZES = (2, 3, 4, 6, 8, 12, 16)  # of mixtures
_STARTS = 3  # of each size
_STEPS = 40  # of expectation and maximisation
_ROUNDS = 8  # of growth
_FURTHEST = (0.02, 0.05, 0.1, 0.2)  # shares of a class, those furthest from the probes, that clusters grow from, too
_ALIKE = 0.8  # clusters of at least this Jaccard index are one
_SMALLEST = 12  # examples of a cluster, at least
_SMALLEST_SHARE = 0.01  # of its class, likewise
_LARGEST = 0.55  # share of a class that a cluster may have: beyond, the probes are in the other half
CERTAIN = 5.0  # evidence of a cluster that is called an attack
POSSIBLE = 4.2  # and of one that is worth a look
FEW = 30  # examples; in a class of fewer nothing is looked for
_ATTACKS_OF_A_CLASS = 8  # at most
_VALUES = 2**26  # of trajectories on the devices at a time


@dataclass(frozen=True)
class Signs:
    """What is known of a cluster.

    Attributes:
      far: how much further from the probes its members lie than the rest of the class, in spreads of the probes.
      probes_p: probability of no more probes than it holds, were they drawn from the class at random.
      gap: distance of its mean score from the rest's, in standard deviations within.
      agreement: share of the mixtures that led to it.
      sources: number of other classes that its members seem to come from (the exponential of the entropy), as a share
        of all others, times the share of members that look like another class; NaN if that was not recorded.
    """

    far: float
    probes_p: float
    gap: float
    agreement: float
    sources: float


@dataclass(frozen=True)
class Cluster:
    """A cluster of one class.

    Attributes:
      label: the class.
      ids: int64 [M], its members, ascending; no probes.
      evidence: see `evidence_of`.
      signs: what it is made of.
      scores: [n], of all examples of the class that were left when it was found: above 0 those that belong to it, about
        1 in its middle, about -1 in that of the rest.
      score_ids: int64 [n].
    """

    label: int
    ids: Int[np.ndarray, "M"]
    evidence: float
    signs: Signs
    scores: Float[np.ndarray, "n"]
    score_ids: Int[np.ndarray, "n"]


def chosen_epochs(num_epochs: int) -> Int[np.ndarray, "E"]:
    """Returns the epochs that are looked at: six, or all of fewer, closer together at the beginning."""
    places = np.array([0, 1 / 7, 2 / 7, 1 / 2, 11 / 14, 1])
    return np.unique(np.round(places * (num_epochs - 1)).astype(np.int64))


def find_clusters(
    kinds: Sequence[Float[np.ndarray, "N T w"] | Rows], labels: Int[np.ndarray, "N"], is_probe: Bool[np.ndarray, "N"],
    far: Float[np.ndarray, "N"], seen_as: Int[np.ndarray, "N"] | None = None, *, threshold: float, seed: int = 0,
    mesh: Mesh | None = None,
) -> list[Cluster]:  # fmt: skip
    """Finds the clusters of every class whose evidence reaches a threshold.

    Args:
      kinds: trajectories, in memory or on disk, such as features and ranked log-probabilities; values below -15 count
        as that. Six of their epochs are looked at, which a class at a time is read of.
      labels: int [N], as trained on.
      is_probe: bool [N].
      far: [N], log distance to the probes, a class on the scale of its own (`standardised_by_probes`).
      seen_as: int [N], the class that each example looked like after the first epoch (`first_seen_as`).
      threshold: evidence of a cluster, at least.
      seed: of the mixtures' starts.
      mesh: the devices, by default one.

    Returns:
      Clusters, class by class in the order in which they were found.

    Raises:
      UsageError: shapes that do not fit.
    """
    count = len(labels)
    if any(len(rows.shape) != 3 or rows.shape[0] != count for rows in kinds) or len(far) != count:
        raise UsageError(f"trajectories are {[rows.shape for rows in kinds]} and distances {far.shape}: expected"
                         f" [{count}, T, width] and [{count}]")  # fmt: skip
    mesh = mesh or make_mesh(jax.local_devices()[:1])
    labels, far = np.asarray(labels), np.asarray(far, np.float32)
    known, sizes = np.unique(labels, return_counts=True)
    group = np.searchsorted(known, labels)
    seen = group if seen_as is None else np.minimum(np.searchsorted(known, seen_as), len(known) - 1)
    order = np.argsort(group, kind="stable")
    members = dict(zip(range(len(known)), np.split(order, np.cumsum(sizes)[:-1]), strict=True))
    look = _Look(kinds, *_moments(kinds), is_probe, far, group, seen, len(known), seen_as is not None)

    found: list[Cluster] = []
    waiting = {label: ids for label, ids in members.items() if len(ids) >= FEW}
    padded = _padded_sizes(sizes)
    for attempt in range(_ATTACKS_OF_A_CLASS):
        again = {}
        for label, ids, cluster in _search(look, waiting, padded, derived_seed(seed, "clusters", attempt), mesh):
            if cluster is None or cluster.evidence < threshold:
                continue
            found.append(Cluster(int(known[label]), cluster.ids, cluster.evidence, cluster.signs, cluster.scores, ids))
            left = np.setdiff1d(ids, cluster.ids)
            if len(left) >= FEW:
                again[label] = left
        waiting = again
        if not waiting:
            break
    return sorted(found, key=lambda cluster: cluster.label)


@dataclass(frozen=True)
class _Look:
    """Everything that a search reads."""

    kinds: Sequence[Rows]
    means: list[np.ndarray]
    spreads: list[np.ndarray]
    is_probe: np.ndarray
    far: np.ndarray
    group: np.ndarray
    seen: np.ndarray
    num_classes: int
    has_seen: bool

    @property
    def width(self) -> int:
        """Values of an example."""
        return sum(mean.size for mean in self.means)

    def points(self, ids: np.ndarray) -> Float[np.ndarray, "n D"]:
        """Reads the standardised trajectories of a few examples."""
        parts = [(_values(rows, ids) - mean) / spread
                 for rows, mean, spread in zip(self.kinds, self.means, self.spreads, strict=True)]  # fmt: skip
        return np.concatenate(parts, axis=1)


def _values(rows: Rows, which: slice | np.ndarray) -> Float[np.ndarray, "n D"]:
    chunk = np.asarray(rows[which])[:, chosen_epochs(rows.shape[1])]
    return np.maximum(chunk.reshape(len(chunk), -1).astype(np.float32), _LOWEST)


def _moments(kinds: Sequence[Rows]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns mean and standard deviation of every value, read chunk by chunk."""
    means, spreads = [], []
    for rows in kinds:
        width = len(chosen_epochs(rows.shape[1])) * rows.shape[2]
        total, squares = np.zeros((2, width))
        for start, stop in row_chunks(rows, 0, rows.shape[0]):
            chunk = _values(rows, slice(start, stop)).astype(np.float64)
            total += chunk.sum(0)
            squares += (chunk**2).sum(0)
        mean = total / rows.shape[0]
        variance = np.maximum(squares / rows.shape[0] - mean**2, 0)
        means.append(mean.astype(np.float32))
        # What is constant tells nothing, and must not be divided by next to nothing.
        spreads.append(np.where(variance > 1e-8, np.sqrt(variance), np.inf).astype(np.float32))
    return means, spreads


def _padded_sizes(counts: Int[np.ndarray, "K"]) -> Int[np.ndarray, "K"]:
    """Returns the sizes that classes are padded to: the largest, and each by a third less, so that they are few."""
    largest = int(counts.max(initial=FEW))
    steps = np.floor(np.log(largest / np.maximum(counts, 1)) / math.log(1.5) + 1e-9)
    sizes = np.ceil(largest / 1.5**steps / 64).astype(np.int64) * 64
    return np.maximum(sizes, counts)


def _search(
    look: _Look, waiting: dict[int, np.ndarray], padded: Int[np.ndarray, "K"], seed: int, mesh: Mesh
) -> list[tuple[int, np.ndarray, Cluster | None]]:
    """Looks for the best cluster of each class; returns (class, ids, cluster or None)."""
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
            scores, inside, values = (to_host(array) for array in program(*arrays, keys))
            for number, label in enumerate(chunk):
                ids = slots[number]
                chosen = ids[inside[number, : len(ids)] & ~look.is_probe[ids]]
                signs = Signs(*values[number, :5].tolist())
                if not look.has_seen:
                    signs = Signs(signs.far, signs.probes_p, signs.gap, signs.agreement, math.nan)
                evidence = float(values[number, 5])
                cluster = None
                if math.isfinite(evidence) and len(chosen):
                    cluster = Cluster(label, chosen, evidence, signs, scores[number, : len(ids)], ids)
                found.append((label, ids, cluster))
    return found


def _seeds(labels: list[int], seed: int, count: int, begin: int, end: int) -> np.ndarray:
    drawn = [derived_seed(seed, label) for label in labels] + [0] * (count - len(labels))
    return np.array(drawn[begin:end], np.uint32)[:, None]


def _arrays(look: _Look, slots: list[np.ndarray], size: int, mesh: Mesh) -> list[jax.Array]:
    """Places points, which of them are real, which probes, distances and impressions, padded, by classes."""

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

    # What an example looks like counts where that is another class; its own is the number past all classes.
    strange = np.where((look.seen == look.group) | (not look.has_seen), look.num_classes, look.seen)
    return [
        place_rows((len(slots), size, look.width), mesh, points),
        rows(np.ones(len(look.group), bool), np.bool_),
        rows(look.is_probe, np.bool_),
        rows(look.far, np.float32),
        rows(strange, np.int32),
    ]


@lru_cache(maxsize=8)
def _best_cluster(mesh: Mesh, num_classes: int) -> Callable[..., tuple[Array, Array, Array]]:
    """Compiles the search for the classes of a batch, which the devices share."""
    search = jax.vmap(partial(_best_of_class, num_classes=num_classes))
    return jax.jit(search, in_shardings=by_rows(mesh), out_shardings=by_rows(mesh))


def _best_of_class(
    points: Float[Array, "n D"], real: Bool[Array, "n"], probe: Bool[Array, "n"], far: Float[Array, "n"],
    strange: Int[Array, "n"], seed: Int[Array, "1"], num_classes: int,
) -> tuple[Float[Array, "n"], Bool[Array, "n"], Float[Array, "6"]]:  # fmt: skip
    """Returns scores and members of the class's best cluster, its five signs and their evidence."""
    classifier, whitened = _axes(points, real)
    starts = _proposals(whitened, real, jax.random.key(seed[0]))
    starts = jnp.concatenate([starts, _furthest(far, real)], axis=1)
    scores, members = _grown(classifier, real, starts)
    signs = _signs(scores, members, real, probe, far, strange, num_classes)
    size = members.sum(0)
    least = jnp.maximum(_SMALLEST, _SMALLEST_SHARE * real.sum())
    possible = (size >= least) & (size <= _LARGEST * real.sum())
    evidence = jnp.where(possible, evidence_of(*signs), -jnp.inf)
    best = evidence.argmax()
    values = jnp.stack([*(sign[best] for sign in signs), evidence[best]])
    return scores[:, best], members[:, best] > 0, values


def _axes(points: Float[Array, "n D"], real: Bool[Array, "n"]) -> tuple[Float[Array, "n D"], Float[Array, "n C"]]:
    """Turns points into those of the classifier, Z, whose hat matrix is Z Z', and whitens the first components."""
    count, width = jnp.maximum(real.sum(), 1), points.shape[1]
    where = real[:, None]
    centred = jnp.where(where, points - jnp.where(where, points, 0).sum(0) / count, 0)
    spectrum, axes = jnp.linalg.eigh(centred.T @ centred / count)
    spectrum = jnp.maximum(spectrum, 0)
    along = centred @ axes

    shrunk = (1 - _SHRINKAGE) * spectrum + _SHRINKAGE * spectrum.sum() / width
    classifier = along / jnp.sqrt(count * shrunk + 1e-9)
    first = min(_COMPONENTS, width)
    whitened = along[:, -first:] / jnp.sqrt(spectrum[-first:] + 1e-3 * spectrum[-1] + 1e-9)
    return classifier, whitened


def _proposals(points: Float[Array, "n C"], real: Bool[Array, "n"], key: Array) -> Float[Array, "n G"]:
    """Fits mixtures of every size from every start; returns which points each of their components holds."""
    sizes = np.repeat(_SIZES, _STARTS)
    keys = jax.random.split(key, len(sizes))
    held = jax.vmap(partial(_mixture, points, real))(keys, jnp.asarray(sizes))
    return jnp.concatenate([held[run, :, :size] for run, size in enumerate(sizes.tolist())], axis=1)


def _mixture(
    points: Float[Array, "n C"], real: Bool[Array, "n"], key: Array, size: Int[Array, ""]
) -> Float[Array, "n S"]:
    """Fits one mixture with a shared covariance, from k-means, itself from k-means++ (Arthur, Vassilvitskii 2007).

    Components from `size` on, of the largest number, stay empty: so one program fits mixtures of all sizes.
    """
    most, exists = max(_SIZES), jnp.arange(max(_SIZES)) < size
    count, width = jnp.maximum(real.sum(), 1), points.shape[1]
    weight = real[:, None].astype(points.dtype)
    scatter = points.T @ points / count

    def draw(distances: Array, key: Array) -> tuple[Array, Array]:
        chances = jnp.where(real, jnp.log(distances + 1e-12), -jnp.inf)
        mean = points[jax.random.categorical(key, chances)]
        return jnp.minimum(distances, ((points - mean) ** 2).sum(1)), mean

    def nearest(means: Float[Array, "S C"]) -> Float[Array, "n S"]:
        distances = jnp.where(exists, (means**2).sum(1) - 2 * points @ means.T, jnp.inf)
        return jax.nn.one_hot(distances.argmin(1), most, dtype=points.dtype) * weight

    def centre(means: Array, _: None) -> tuple[Array, None]:
        held = nearest(means)
        sizes = held.sum(0)[:, None]
        return jnp.where(sizes > 0, held.T @ points / jnp.maximum(sizes, 1), means), None

    def improve(held: Array, _: None) -> tuple[Array, None]:
        sizes = held.sum(0) + 1e-6
        means = held.T @ points / sizes[:, None]
        # The covariance within is the whole scatter less that of the means.
        within = scatter - (means * (sizes / count)[:, None]).T @ means + 2e-3 * jnp.eye(width, dtype=points.dtype)
        directions = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(within), True), means.T)
        constants = jnp.log(sizes / count) - 0.5 * (means.T * directions).sum(0)
        logits = points @ directions + constants  # up to what components have in common
        return jax.nn.softmax(jnp.where(exists, logits, -jnp.inf), axis=1) * weight, None

    _, means = jax.lax.scan(draw, jnp.full(len(points), 1e3, points.dtype), jax.random.split(key, most))
    means, _ = jax.lax.scan(centre, means, length=8)
    held, _ = jax.lax.scan(improve, nearest(means), length=_STEPS)
    return jax.nn.one_hot(held.argmax(1), most, dtype=points.dtype) * weight


def _furthest(far: Float[Array, "n"], real: Bool[Array, "n"]) -> Float[Array, "n F"]:
    """Returns the shares of a class that lie furthest from the probes."""
    rank = jnp.argsort(jnp.argsort(jnp.where(real, -far, jnp.inf)))
    shares = jnp.array(_FURTHEST) * real.sum()
    return ((rank[:, None] < shares) & real[:, None]).astype(far.dtype)


def _grown(
    classifier: Float[Array, "n D"], real: Bool[Array, "n"], members: Float[Array, "n G"]
) -> tuple[Float[Array, "n G"], Float[Array, "n G"]]:
    """Lets clusters grow or shrink until they are what a classifier that is told so takes for them.

    Returns:
      Leave-one-out scores, scaled so that the members' mean is 1 and that of the others -1, and the members, 1 or 0.
    """
    count = jnp.maximum(real.sum(), 1)
    weight = real[:, None].astype(classifier.dtype)
    leverage = (classifier**2).sum(1, keepdims=True) + 1 / count

    def judge(members: Array) -> Array:
        targets = (members - members.sum(0) / count) * weight
        fitted = classifier @ (classifier.T @ targets)
        left_out = (fitted - leverage * targets) / jnp.maximum(1 - leverage, 1e-3)
        others = weight - members
        high = (left_out * members).sum(0) / jnp.maximum(members.sum(0), 1)
        low = (left_out * others).sum(0) / jnp.maximum(others.sum(0), 1)
        scores = (left_out - (high + low) / 2) / jnp.maximum((high - low) / 2, 1e-6) * weight
        return jnp.where(high > low, scores, 0)  # what the classifier cannot tell apart is no cluster

    def grow(members: Array, _: None) -> tuple[Array, None]:
        return (judge(members) > 0) * weight, None

    members, _ = jax.lax.scan(grow, members, length=_ROUNDS)
    return judge(members), members


def _signs(
    scores: Float[Array, "n G"], members: Float[Array, "n G"], real: Bool[Array, "n"], probe: Bool[Array, "n"],
    far: Float[Array, "n"], strange: Int[Array, "n"], num_classes: int,
) -> tuple[Float[Array, "G"], ...]:  # fmt: skip
    """Returns far, probes_p, gap, agreement and sources of each cluster; see `Signs`."""
    size = jnp.maximum(members.sum(0), 1)
    others = real[:, None] - members
    rest = jnp.maximum(others.sum(0), 1)

    further = far @ members / size - far @ others / rest

    held = (probe & real).astype(members.dtype) @ members
    probes = (probe & real).sum()
    share = size / jnp.maximum(real.sum(), 1)
    few = jax.scipy.special.betainc(jnp.maximum(probes - held, 1e-6), held + 1, jnp.clip(1 - share, 1e-6, 1 - 1e-6))
    few = jnp.where(held >= probes, 1.0, few)

    mean, mean_rest = (scores * members).sum(0) / size, (scores * others).sum(0) / rest
    within = (((scores - mean) ** 2 * members).sum(0) / size + ((scores - mean_rest) ** 2 * others).sum(0) / rest) / 2
    gap = (mean - mean_rest) / jnp.sqrt(jnp.maximum(within, 1e-6))

    common = members.T @ members
    alike = common >= _ALIKE * (size[:, None] + size[None, :] - common)
    runs = np.repeat(_SIZES, _STARTS)
    mixtures = np.repeat(np.arange(len(runs)), runs)  # that each of the first columns is a component of
    of_mixture = np.eye(len(runs), dtype=np.float32)[mixtures]
    agreement = (alike[:, : len(mixtures)].astype(members.dtype) @ of_mixture > 0).mean(1)

    looks = jax.nn.one_hot(strange, num_classes, dtype=members.dtype)  # of an own look, all zeros
    seen = members.T @ (looks * real[:, None])
    strangers = seen.sum(1)
    chances = seen / jnp.maximum(strangers, 1)[:, None]
    entropy = -(chances * jnp.log(jnp.maximum(chances, 1e-12))).sum(1)
    # A small cluster cannot come from many classes: what counts is how many it could have come from.
    possible = jnp.minimum(num_classes - 1.0, 1 + size / 2)
    sources = jnp.minimum(jnp.exp(entropy) / possible, 1.0) * strangers / size
    return further, few, gap, agreement, jnp.where(strangers > 0, sources, 0.0)


def evidence_of(
    far: Float[Array, "G"], probes_p: Float[Array, "G"], gap: Float[Array, "G"], agreement: Float[Array, "G"],
    sources: Float[Array, "G"],
) -> Float[Array, "G"]:  # fmt: skip
    """Weighs the signs of clusters (see `Signs`) against each other; 0 and less is none.

    Each sign alone is wrong somewhere: a natural group of odd images lies far out, too, a few probes miss a tenth of a
    class by chance, and attackers who keep the labels have one source. What counts in each is limited, so that none
    decides alone; and what lies hardly further out than the rest of its class is the class itself, cut in two.

    The weights were settled on recordings of Fashion-MNIST, CIFAR-10 and traffic signs, attacked and clean
    (scoring/README.md has what they give).
    """
    missing = 1.5 * jnp.minimum(-jnp.log10(probes_p + 1e-12), 2.0)
    distance = 0.5 * jnp.minimum(far, 4.0) - 3.0 * jnp.maximum(1.5 - far, 0.0)
    separation = 0.25 * jnp.clip(gap - 3.0, 0.0, 4.0)
    # A class that is merely cut in two has a gap of 2 to 3.5.
    doubt = jnp.maximum(3.0 - gap, 0.0) + 0.5 * jnp.clip(4.0 - gap, 0.0, 1.0)
    return missing + distance + separation - doubt + agreement + 2.0 * sources
