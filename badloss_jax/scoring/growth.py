"""The best cluster of one class: proposed by mixtures, grown by a classifier, weighed by its signs; see `clusters`.

Pure functions of one class's points, padded: what is not `real` counts nowhere. G is the number of clusters at a time.
Proposals are in `mixtures`, what is measured of clusters in `signs`, and how that is weighed in `evidence`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from badloss_jax.scoring.evidence import CERTAIN, NATURAL, SMALL, evidence_of
from badloss_jax.scoring.mixtures import proposals
from badloss_jax.scoring.signs import ClassExamples, gap_of, signs_of, sources_of

_SHRINKAGE = 0.1  # of the classifier's covariance towards a multiple of the identity
_COMPONENTS = 20  # principal components that mixtures are fitted to
_ROUNDS = 8  # of growth
_FOREMOST = (0.02, 0.05, 0.1, 0.2)  # shares of a class, the furthest and the least like it, where clusters grow from
_SMALLEST = 12  # examples of a cluster, at least
_SMALLEST_SHARE = 0.01  # of its class, likewise
_LARGEST = 0.55  # share of a class that a cluster may have: beyond, the probes are in the other half
_HELD = 3  # probes in a natural group, at least
_HELD_SHARE = 0.5  # of those that its size lets expect, likewise
_INSIDE = 0.85  # share of a smaller cluster that lies within the best one
_SMALLER = 0.9  # of the best one's size, at most
_WIDER = 1.1  # times its gap, at least
_LESS = 0.45  # evidence than the best one, at most
_PART = 0.1  # of what is cut in two, at least
_KEPT = 0.5  # Jaccard index of what is told apart with what it was told to, at least


def best_of_class(
    examples: ClassExamples, seed: Int[Array, "1"], num_classes: int
) -> tuple[Float[Array, "n 2"], Float[Array, "9 2"], Float[Array, ""]]:
    """Finds the cluster of the most evidence, for either end of what natural groups may have for a gap (`NATURAL`).

    Args:
      examples: of the class.
      seed: uint32 [1], of the mixtures' starts.
      num_classes: K.

    Returns:
      Scores of the two [n, 2], about 1 in the cluster and -1 in the rest; whether each is possible, its share of the
      class and its signs, in the order of `Signs`; and the widest gap of a natural group, one that holds its part of
      the probes, or 0 if there is none.
    """
    real = examples.real
    classifier, whitened = _axes(examples.points, real)

    # Mixtures find crowds wherever they lie; the strangest examples are a start where a crowd is faint.
    mixtures = proposals(whitened, real, jax.random.key(seed[0]))
    furthest = _foremost(examples.far, real)
    least_alike = _foremost(examples.odds, real)
    starts = jnp.concatenate([mixtures, furthest, least_alike], axis=1)
    scores, members = _grown(classifier, real, starts)
    signs = signs_of(scores, members, examples, num_classes)

    # Only now are they judged: a proposal may be a splinter that grows to an attack, or an attack's half.
    size = members.sum(0)
    count = jnp.maximum(real.sum(), 1)
    least = jnp.maximum(_SMALLEST, _SMALLEST_SHARE * count)
    possible = (size >= least) & (size <= _LARGEST * count) & (scores.max(0) > 0)
    share = size / count
    gap = signs[2]

    def best(natural: float) -> Int[Array, ""]:
        evidence = jnp.where(possible, evidence_of(natural, share, *signs), -jnp.inf)
        return _tighter(evidence.argmax(), members, evidence, gap)

    both = jnp.stack([best(natural) for natural in NATURAL])
    values = jnp.stack([possible, share, *signs])[:, both]

    # A group is natural if it holds the probes that its size lets expect.
    held = (examples.probe & real) @ members
    probes = (examples.probe & real).sum()
    natural = possible & (share > SMALL) & (held >= jnp.maximum(_HELD, _HELD_SHARE * share * probes))
    return scores[:, both], values, jnp.where(natural, gap, 0).max()


def halves_of(
    points: Float[Array, "n D"],
    real: Bool[Array, "n"],
    first: Int[Array, "n"],
    seed: Int[Array, "1"],
    num_classes: int,
) -> tuple[Float[Array, "n"], Float[Array, "2"]]:
    """Cuts examples in the two parts that are best apart, wherever they seem to come from.

    Images that one attacker took from two classes lie apart as well, so what examples that looked alike at first have
    in common is taken away.

    Args:
      points: [n, D], standardised trajectories of what may be two attacks.
      real: [n], False for padding.
      first: int [n], the other class that an example looked like at first, or K if it looked like its own.
      seed: uint32 [1], of the mixtures' starts.
      num_classes: K.

    Returns:
      Scores [n], about 1 in one part and -1 in the other; and the gap between these, 0 if no part is large enough, with
      `Signs.sources` of all together.
    """
    looks = jax.nn.one_hot(first, num_classes + 1, dtype=points.dtype) * real[:, None]
    means = looks.T @ points / jnp.maximum(looks.sum(0), 1)[:, None]
    classifier, whitened = _axes(points - looks @ means, real)
    scores, members = _grown(classifier, real, proposals(whitened, real, jax.random.key(seed[0])))

    share = members.sum(0) / jnp.maximum(real.sum(), 1)
    gap = jnp.where(jnp.minimum(share, 1 - share) >= _PART, gap_of(scores, members, real), 0)
    best = gap.argmax()
    sources = sources_of(first, real[:, None].astype(points.dtype), num_classes)
    return scores[:, best], jnp.stack([gap[best], sources[0]])


def gap_between(points: Float[Array, "n D"], real: Bool[Array, "n"], members: Float[Array, "n"]) -> Float[Array, ""]:
    """Measures the gap between members and others.

    Args:
      points: [n, D], standardised trajectories.
      real: [n], False for padding.
      members: [n], 1 or 0.

    Returns:
      The gap, or 0 if the classifier takes other examples for members.
    """
    classifier, _ = _axes(points, real)
    scores, grown = _grown(classifier, real, members[:, None])

    common = grown[:, 0] @ members
    kept = common >= _KEPT * (grown.sum() + members.sum() - common)
    return jnp.where(kept, gap_of(scores, grown, real)[0], 0)


def _tighter(
    best: Int[Array, ""], members: Float[Array, "n G"], evidence: Float[Array, "G"], gap: Float[Array, "G"]
) -> Int[Array, ""]:
    """Returns the cluster within the best one that is better apart, if there is one of nearly as much evidence.

    An attack and natural images beside it, or two attacks, have more evidence together than each, as more members lack
    probes. What is left out here is searched again. An attack does not become less than one.
    """
    size = members.sum(0)
    within = (members.T @ members[:, best] >= _INSIDE * size) & (size <= _SMALLER * size[best])

    nearly = evidence[best] - _LESS
    enough = evidence >= jnp.where(evidence[best] >= CERTAIN, jnp.maximum(nearly, CERTAIN), nearly)

    among = jnp.where(within & enough & (gap >= _WIDER * gap[best]), evidence, -jnp.inf)
    return jnp.where(among.max() > -jnp.inf, among.argmax(), best)


def _axes(points: Float[Array, "n D"], real: Bool[Array, "n"]) -> tuple[Float[Array, "n D"], Float[Array, "n C"]]:
    """Turns points into those of the classifier, Z, whose hat matrix is Z Z', and whitens the first components."""
    count = jnp.maximum(real.sum(), 1)
    width = points.shape[1]
    where = real[:, None]
    mean = jnp.where(where, points, 0).sum(0) / count
    centred = jnp.where(where, points - mean, 0)

    spectrum, axes = jnp.linalg.eigh(centred.T @ centred / count)
    spectrum = jnp.maximum(spectrum, 0)
    along = centred @ axes

    shrunk = (1 - _SHRINKAGE) * spectrum + _SHRINKAGE * spectrum.sum() / width
    classifier = along / jnp.sqrt(count * shrunk + 1e-9)

    # The first components are the last axes, as `eigh` has the spectrum ascending.
    first = min(_COMPONENTS, width)
    whitened = along[:, -first:] / jnp.sqrt(spectrum[-first:] + 1e-3 * spectrum[-1] + 1e-9)
    return classifier, whitened


def _foremost(values: Float[Array, "n"], real: Bool[Array, "n"]) -> Float[Array, "n F"]:
    """Returns the shares of a class whose values are the highest."""
    rank = jnp.argsort(jnp.argsort(jnp.where(real, -values, jnp.inf)))
    shares = jnp.array(_FOREMOST) * real.sum()
    return ((rank[:, None] < shares) & real[:, None]).astype(values.dtype)


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

        # What the classifier cannot tell apart is no cluster.
        return jnp.where(high > low, scores, 0)

    def grow(members: Array, _: None) -> tuple[Array, None]:
        return (judge(members) > 0) * weight, None

    members, _ = jax.lax.scan(grow, members, length=_ROUNDS)
    return judge(members), members
