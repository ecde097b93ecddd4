"""The best cluster of one class: proposed by mixtures, grown by a classifier, weighed by its signs; see `clusters`.

Pure functions of one class's points, padded: what is not `real` counts nowhere. G is the number of clusters at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from badloss_jax.scoring.evidence import CERTAIN, NATURAL, SMALL, evidence_of

_SHRINKAGE = 0.1  # of the classifier's covariance towards a multiple of the identity
_COMPONENTS = 20  # principal components that mixtures are fitted to
_SIZES = ((2, 3, 4, 6), (8, 12, 16))  # of mixtures, those in one program that are nearly as large
_STARTS = 3  # of each size
_RUNS = np.repeat(np.concatenate(_SIZES), _STARTS)  # sizes of all mixtures, in the order of their fitting
_STEPS = 40  # of expectation and maximisation
_ROUNDS = 8  # of growth
_FOREMOST = (0.02, 0.05, 0.1, 0.2)  # shares of a class, the furthest and the least like it, where clusters grow from
_ALIKE = 0.8  # clusters of at least this Jaccard index are one
_SMALLEST = 12  # examples of a cluster, at least
_SMALLEST_SHARE = 0.01  # of its class, likewise
_ASTRAY = 0.03  # share of a class's probes that lie in an attack by mistake
_PROBES_HELD = 30  # a cluster with more is not thought to lack any
_INSIDE = 0.85  # share of a smaller cluster that lies within the best one
_SMALLER = 0.9  # of the best one's size, at most
_WIDER = 1.1  # times its gap, at least
_LESS = 0.45  # evidence than the best one, at most
_LARGEST = 0.55  # share of a class that a cluster may have: beyond, the probes are in the other half
_PART = 0.1  # of what is cut in two, at least
_HELD, _HELD_SHARE = 3, 0.5  # probes in a natural group, at least; and of those that its size lets expect
_KEPT = 0.5  # Jaccard index of what is told apart with what it was told to, at least


def best_of_class(
    points: Float[Array, "n D"], real: Bool[Array, "n"], probe: Bool[Array, "n"], far: Float[Array, "n"],
    first: Int[Array, "n"], late: Int[Array, "n"], odds: Float[Array, "n"], seed: Int[Array, "1"], num_classes: int,
) -> tuple[Float[Array, "n 2"], Float[Array, "9 2"], Float[Array, ""]]:  # fmt: skip
    """Finds the cluster of the most evidence, for either end of what natural groups may have for a gap (`NATURAL`).

    Args:
      points: [n, D], standardised trajectories.
      real: [n], False for padding.
      probe: [n].
      far: [n], distance to the probes; higher is further.
      first: int [n], the other class that an example looked like at first, or K if it looked like its own.
      late: int [n], likewise in the end.
      odds: [n], log-odds of another class against its own.
      seed: uint32 [1], of the mixtures' starts.
      num_classes: K.

    Returns:
      Scores of the two [n, 2], about 1 in the cluster and -1 in the rest; whether each is possible, its share of the
      class and its signs, in the order of `Signs`; and the widest gap of a natural group, one that holds its part of
      the probes, or 0 if there is none.
    """
    classifier, whitened = _axes(points, real)

    # Mixtures find crowds wherever they lie; the strangest examples are a start where a crowd is faint.
    starts = _proposals(whitened, real, jax.random.key(seed[0]))
    starts = jnp.concatenate([starts, _foremost(far, real), _foremost(odds, real)], axis=1)
    scores, members = _grown(classifier, real, starts)
    signs = _signs(scores, members, real, probe, far, first, late, odds, num_classes)

    # Only now are they judged: a proposal may be a splinter that grows to an attack, or an attack's half.
    size, count = members.sum(0), jnp.maximum(real.sum(), 1)
    least = jnp.maximum(_SMALLEST, _SMALLEST_SHARE * count)
    possible = (size >= least) & (size <= _LARGEST * count) & (scores.max(0) > 0)
    share, gap = size / count, signs[2]

    def best(natural: float) -> Int[Array, ""]:
        evidence = jnp.where(possible, evidence_of(natural, share, *signs), -jnp.inf)
        return _tighter(evidence.argmax(), members, evidence, gap)

    both = jnp.stack([best(natural) for natural in NATURAL])
    values = jnp.stack([possible, share, *signs])[:, both]

    held, probes = (probe & real) @ members, (probe & real).sum()
    natural = possible & (share > SMALL) & (held >= jnp.maximum(_HELD, _HELD_SHARE * share * probes))
    return scores[:, both], values, jnp.where(natural, gap, 0).max()


def halves_of(
    points: Float[Array, "n D"], real: Bool[Array, "n"], first: Int[Array, "n"], seed: Int[Array, "1"], num_classes: int
) -> tuple[Float[Array, "n"], Float[Array, "2"]]:
    """Cuts examples in the two parts that are best apart, wherever they seem to come from.

    Images that one attacker took from two classes lie apart as well, so what examples that looked alike at first have
    in common is taken away.

    Args:
      points, real, first, seed, num_classes: as of `best_of_class`, of what may be two attacks.

    Returns:
      Scores [n], about 1 in one part and -1 in the other; and the gap between these, 0 if no part is large enough, with
      `Signs.sources` of all together.
    """
    looks = jax.nn.one_hot(first, num_classes + 1, dtype=points.dtype) * real[:, None]
    means = looks.T @ points / jnp.maximum(looks.sum(0), 1)[:, None]
    classifier, whitened = _axes(points - looks @ means, real)
    scores, members = _grown(classifier, real, _proposals(whitened, real, jax.random.key(seed[0])))

    share = members.sum(0) / jnp.maximum(real.sum(), 1)
    gap = jnp.where(jnp.minimum(share, 1 - share) >= _PART, _gap(scores, members, real), 0)
    best = gap.argmax()
    sources = _sources(first, real[:, None].astype(points.dtype), num_classes)
    return scores[:, best], jnp.stack([gap[best], sources[0]])


def gap_between(points: Float[Array, "n D"], real: Bool[Array, "n"], members: Float[Array, "n"]) -> Float[Array, ""]:
    """Returns the gap between members and others, or 0 if the classifier takes other examples for members."""
    classifier, _ = _axes(points, real)
    scores, grown = _grown(classifier, real, members[:, None])
    common = grown[:, 0] @ members
    kept = common >= _KEPT * (grown.sum() + members.sum() - common)
    return jnp.where(kept, _gap(scores, grown, real)[0], 0)


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
    draws = jax.random.uniform(key, (len(_RUNS), max(_RUNS)), points.dtype)
    held, begin = [], 0
    for sizes in _SIZES:
        runs = np.repeat(sizes, _STARTS)
        rows = slice(begin, begin + len(runs))
        fitted = jax.vmap(partial(_mixture, points, real))(draws[rows, : max(sizes)], jnp.asarray(runs))
        exists = np.flatnonzero(np.arange(max(sizes)) < runs[:, None])
        held.append(fitted.reshape(-1, len(points))[exists])
        begin = rows.stop
    return jnp.concatenate(held).T


def _mixture(
    points: Float[Array, "n C"], real: Bool[Array, "n"], draws: Float[Array, "S"], size: Int[Array, ""]
) -> Float[Array, "S n"]:
    """Fits one mixture with a shared covariance, from k-means, itself from k-means++ (Arthur, Vassilvitskii 2007).

    `draws`, uniform in [0, 1), choose the first means; components from `size` on stay empty, so that one program fits
    mixtures of several sizes. Components are rows, because XLA vectorises reductions over them on CPUs.
    """
    place = jnp.arange(len(draws))[:, None]
    exists = place < size
    count, width = jnp.maximum(real.sum(), 1), points.shape[1]
    scatter = points.T @ points / count

    def draw(distances: Array, uniform: Array) -> tuple[Array, Array]:
        below = jnp.cumsum(jnp.where(real, distances, 0))
        mean = points[jnp.searchsorted(below, uniform * below[-1], side="right").clip(max=len(points) - 1)]
        return jnp.minimum(distances, ((points - mean) ** 2).sum(1)), mean

    def highest(values: Float[Array, "S n"]) -> Float[Array, "S n"]:
        # The first of the highest, without an argmax, which XLA does not vectorise on CPUs.
        first = jnp.where(values == values.max(0), place, len(place)).min(0)
        return ((place == first) & real).astype(points.dtype)

    def nearest(means: Float[Array, "S C"]) -> Float[Array, "S n"]:
        return highest(jnp.where(exists, 2 * means @ points.T - (means**2).sum(1, keepdims=True), -jnp.inf))

    def centre(means: Array, _: None) -> tuple[Array, None]:
        held = nearest(means)
        sizes = held.sum(1)[:, None]
        return jnp.where(sizes > 0, held @ points / jnp.maximum(sizes, 1), means), None

    def improve(held: Array, _: None) -> tuple[Array, None]:
        sizes = held.sum(1)[:, None] + 1e-6
        means = held @ points / sizes
        # The covariance within is the whole scatter less that of the means.
        within = scatter - (means * (sizes / count)).T @ means + 2e-3 * jnp.eye(width, dtype=points.dtype)
        directions = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(within), True), means.T).T
        constants = jnp.log(sizes / count) - 0.5 * (means * directions).sum(1, keepdims=True)
        logits = directions @ points.T + constants  # up to what components have in common
        return jax.nn.softmax(jnp.where(exists, logits, -jnp.inf), axis=0) * real, None

    _, means = jax.lax.scan(draw, jnp.full(len(points), 1e3, points.dtype), draws)
    means, _ = jax.lax.scan(centre, means, length=8)
    held, _ = jax.lax.scan(improve, nearest(means), length=_STEPS)
    return highest(held)


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
        return jnp.where(high > low, scores, 0)  # what the classifier cannot tell apart is no cluster

    def grow(members: Array, _: None) -> tuple[Array, None]:
        return (judge(members) > 0) * weight, None

    members, _ = jax.lax.scan(grow, members, length=_ROUNDS)
    return judge(members), members


def _signs(
    scores: Float[Array, "n G"], members: Float[Array, "n G"], real: Bool[Array, "n"], probe: Bool[Array, "n"],
    far: Float[Array, "n"], first: Int[Array, "n"], late: Int[Array, "n"], odds: Float[Array, "n"], num_classes: int,
) -> tuple[Float[Array, "G"], ...]:  # fmt: skip
    """Returns the signs of each cluster, in the order of `Signs`."""
    size = jnp.maximum(members.sum(0), 1)
    others = real[:, None] - members
    rest = jnp.maximum(others.sum(0), 1)

    further = far @ members / size - far @ others / rest

    held = (probe & real).astype(members.dtype) @ members
    probes = (probe & real).sum()
    share = size / jnp.maximum(real.sum(), 1)
    few = _so_few(held, probes, jnp.clip(share, 1e-6, 1 - 1e-6))

    common = members.T @ members
    alike = common >= _ALIKE * (size[:, None] + size[None, :] - common)
    mixtures = np.repeat(np.arange(len(_RUNS)), _RUNS)  # that each of the first columns is a component of
    of_mixture = np.eye(len(_RUNS), dtype=np.float32)[mixtures]
    agreement = (alike[:, : len(mixtures)].astype(members.dtype) @ of_mixture > 0).mean(1)

    sources = [_sources(looks, members, num_classes) for looks in (first, late)]
    return further, few, _gap(scores, members, real), agreement, *sources, odds @ members / size


def _gap(scores: Float[Array, "n G"], members: Float[Array, "n G"], real: Bool[Array, "n"]) -> Float[Array, "G"]:
    """Returns how far the members' mean score is from the others', in standard deviations within both."""
    others = real[:, None] - members
    size, rest = jnp.maximum(members.sum(0), 1), jnp.maximum(others.sum(0), 1)
    mean, mean_rest = (scores * members).sum(0) / size, (scores * others).sum(0) / rest
    within = (((scores - mean) ** 2 * members).sum(0) / size + ((scores - mean_rest) ** 2 * others).sum(0) / rest) / 2
    return (mean - mean_rest) / jnp.sqrt(jnp.maximum(within, 1e-6))


def _sources(looks: Int[Array, "n"], members: Float[Array, "n G"], num_classes: int) -> Float[Array, "G"]:
    """Returns from how many other classes members seem to come, as a share, times the share of those that do."""
    size = jnp.maximum(members.sum(0), 1)
    seen = members.T @ jax.nn.one_hot(looks, num_classes, dtype=members.dtype)  # of an own look, all zeros
    strangers = seen.sum(1)
    chances = seen / jnp.maximum(strangers, 1)[:, None]
    entropy = -(chances * jnp.log(jnp.maximum(chances, 1e-12))).sum(1)
    # A small cluster cannot come from many classes: what counts is how many it could have come from.
    possible = jnp.minimum(num_classes - 1.0, 1 + size / 2)
    sources = jnp.minimum(jnp.exp(entropy) / possible, 1.0) * strangers / size
    return jnp.where(strangers > 0, sources, 0.0)


def _so_few(held: Float[Array, "G"], draws: Int[Array, ""], share: Float[Array, "G"]) -> Float[Array, "G"]:
    """Returns how likely a natural group holds no more than `held` probes of so many; 1 for more than 30.

    That is the binomial probability; or, if larger, that of none, times for each how much likelier it is in a natural
    group than in an attack, where it lies by mistake: half of a class rarely holds 4 of 23, an attack never.
    """
    number = jnp.arange(_PROBES_HELD + 1)
    factors = jnp.maximum(draws - number + 1, 1e-30) / jnp.maximum(number, 1)
    choices = jnp.cumsum(jnp.where(number > 0, jnp.log(factors), 0))  # logs of draws over number
    logs = choices + number * jnp.log(share)[:, None] + (draws - number) * jnp.log1p(-share)[:, None]
    few = jnp.where((number <= held[:, None]) & (number <= draws), jnp.exp(logs), 0).sum(1)
    each = jnp.log(share) - jnp.log1p(-share) - np.log(_ASTRAY / (1 - _ASTRAY))
    few = jnp.maximum(few, jnp.exp(jnp.minimum(draws * jnp.log1p(-share) + held * each, 0.0)))
    return jnp.where((held > _PROBES_HELD) | (held >= draws), 1.0, jnp.minimum(few, 1.0))
