"""What the probes' own distances say of everybody else's: p-values, what they can support, and how much is poisoned.

The guarantee behind all of it is exchangeability: were a clean example drawn as the probes were, its distance would be
as likely to take any rank among theirs. It holds but nearly. A probe is compared with P - 1 others and an example with
P, so probes lie slightly further off and p-values are slightly too large; and probes that somebody picked are not a
random draw.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from badloss_jax.core.errors import UsageError

LEVELS = (0.01, 0.02, 0.05, 0.1)  # at which poison is looked for
_FEW_MIDDLES = (1.0, 10.0)  # bounds of how many probes' median counts as much as that of all probes
_FEW_SPREADS = 40  # probes of a class, whose spread then counts as much as that within all classes


def conformal_p_values(
    distances: Float[np.ndarray, "N"], probe_distances: Float[np.ndarray, "P"]
) -> Float[np.ndarray, "N"]:
    """Computes p(x) = (1 + #{probes at a distance >= that of x}) / (P + 1), float64 in [1 / (P + 1), 1].

    The probes' leave-one-out distances are nearly exchangeable with those of clean examples (see the module), so a
    clean example has p <= alpha with probability about alpha.

    Args:
      distances: [N], higher is more suspicious, or any increasing function of them.
      probe_distances: [P], leave-one-out, on the same scale.

    Returns:
      float64 [N], multiples of 1 / (P + 1).

    Raises:
      UsageError: no probes, or NaN.

    Example:
      >>> import numpy as np
      >>> from badloss_jax import conformal_p_values
      >>> conformal_p_values(np.array([0.0, 2.5, 9.0]), np.array([1.0, 2.0, 3.0])).tolist()
      [1.0, 0.5, 0.25]
    """
    ours = np.asarray(distances, np.float64)
    probes = np.sort(np.asarray(probe_distances, np.float64))
    if ours.ndim != 1 or probes.ndim != 1 or not len(probes):
        raise UsageError(f"distances are {ours.shape} and probe distances {probes.shape}: expected [N] and [P], P >= 1")
    if np.isnan(ours).any() or np.isnan(probes).any():
        raise UsageError("distances or probe distances contain NaN")

    at_least = len(probes) - np.searchsorted(probes, ours, side="left")
    return (1 + at_least) / (len(probes) + 1)


@dataclass(frozen=True)
class ClassScales:
    """Where the clean examples of each class lie, and how far apart; see `class_scales`.

    Attributes:
      labels: int [C], ascending, of the classes that have probes.
      locations: float64 [C], where clean examples of each class lie.
      spreads: float64 [C], how far apart, as a standard deviation.
      location: of classes without probes.
      spread: likewise.
      of_probes: float64 [P], the probes' own scores, each on the scale of the others of its class.
    """

    labels: Int[np.ndarray, "C"]
    locations: Float[np.ndarray, "C"]
    spreads: Float[np.ndarray, "C"]
    location: float
    spread: float
    of_probes: Float[np.ndarray, "P"]

    def __call__(self, scores: Float[np.ndarray, "M"], labels: Int[np.ndarray, "M"]) -> Float[np.ndarray, "M"]:
        """Returns (score - location) / spread, each by its class; NaN stays NaN."""
        number = np.minimum(np.searchsorted(self.labels, labels), len(self.labels) - 1)
        known = self.labels[number] == labels

        locations = np.where(known, self.locations[number], self.location)
        spreads = np.where(known, self.spreads[number], self.spread)
        return (np.asarray(scores, np.float64) - locations) / spreads


def class_scales(probe_scores: Float[np.ndarray, "P"], probe_labels: Int[np.ndarray, "P"]) -> ClassScales:
    """Finds the scale of every class, on which its probes have median 0 and spread 1.

    A hard or small class lies far from the probes as a whole, and p-values over all classes would call it poisoned. Its
    own median is no help: where several attackers share a class, or one takes a quarter of it, the poison moves that.
    The probes are clean, and lie where clean examples of their class do. Then the probes of all classes calibrate
    together, which the few of one class could not: among P_c probes no p-value is below 1 / (P_c + 1).

    The median of P_c probes is drawn towards that of all, by P_c / (P_c + m), where m, from 1 to 10, is the variance
    within classes over that of the classes' medians (empirical Bayes): the more classes differ, the less. The spread
    (1.4826 times the median distance from the median) is drawn geometrically towards that within all classes, by P_c /
    (P_c + 40). A class without probes is on the scale of all. A probe is on the scale of the others of its class, as it
    would else be drawn to itself.

    Args:
      probe_scores: [P], of the probes, leave-one-out; log distances, or what is on such a scale.
      probe_labels: int [P].

    Returns:
      The scales of all classes, and the probes' own scores on them.

    Raises:
      UsageError: no probes, shapes that do not fit, or NaN.
    """
    probe_scores = np.asarray(probe_scores, np.float64)
    probe_labels = np.asarray(probe_labels)
    if probe_scores.shape != probe_labels.shape or probe_scores.ndim != 1:
        raise UsageError(
            f"probe scores are {probe_scores.shape} with labels {probe_labels.shape}: expected [P] and [P]"
        )
    if not len(probe_scores):
        raise UsageError("there are no probes to put the classes on the scale of")
    if np.isnan(probe_scores).any():
        raise UsageError("probe scores contain NaN")

    known, number = np.unique(probe_labels, return_inverse=True)
    order = np.argsort(number, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(number))[:-1])

    # How much the classes differ says how many probes' median counts as much as that of all.
    # All probes together say what a class with few of them is drawn towards.
    middle = float(np.median(probe_scores))
    own_middles = np.array([np.median(probe_scores[rows]) for rows in members])
    within = _spread(probe_scores - own_middles[number], 0.0) or _spread(probe_scores, middle)
    between = float(np.mean((own_middles - middle) ** 2))
    few = float(np.clip(within**2 / max(between, 1e-12), *_FEW_MIDDLES))
    of_all = _AllProbes(middle, within, few)

    of_probes = np.empty(len(probe_scores))
    locations = np.empty(len(known))
    spreads = np.empty(len(known))
    for number_of_class, rows in enumerate(members):
        values = probe_scores[rows]
        locations[number_of_class], spreads[number_of_class] = _scale(values, of_all)
        for position, row in enumerate(rows):
            location, spread = _scale(np.delete(values, position), of_all)
            of_probes[row] = (probe_scores[row] - location) / spread

    location, spread = _scale(np.zeros(0), of_all)
    return ClassScales(known, locations, spreads, location, spread, of_probes)


@dataclass(frozen=True)
class _AllProbes:
    """What the probes of all classes say of one class.

    Attributes:
      middle: their median.
      within: their spread within classes.
      few: how many probes of a class count as much as `middle`.
    """

    middle: float
    within: float
    few: float


def _scale(values: Float[np.ndarray, "p"], of_all: _AllProbes) -> tuple[float, float]:
    """Returns location and spread of a class from its probes, drawn towards those of all where they are few."""
    count = len(values)
    within = max(of_all.within, 1e-6)
    if not count:
        return of_all.middle, within

    own = float(np.median(values))
    location = (count * own + of_all.few * of_all.middle) / (count + of_all.few)

    own_spread = _spread(values, own)
    if count < 3 or own_spread <= 0:
        return location, within
    weight = count / (count + _FEW_SPREADS)
    return location, max(own_spread**weight * within ** (1 - weight), 1e-6)


def _spread(values: Float[np.ndarray, "p"], middle: float) -> float:
    """Estimates the standard deviation by the median distance from the middle."""
    return 1.4826 * float(np.median(np.abs(values - middle)))


@dataclass(frozen=True)
class PoisonedShare:
    """An estimate with its interval.

    Attributes:
      estimate: in [0, 1].
      low: where the interval begins, likewise.
      high: where it ends.
    """

    estimate: float
    low: float
    high: float


def poisoned_share(
    p_values: Float[np.ndarray, "M"], num_probes: int, confidence: float = 0.9, levels: Sequence[float] = LEVELS
) -> PoisonedShare:
    """Estimates which share of the examples is poisoned: 1 - (share with p > level) / (1 - level) (Storey, 2002).

    That counts the poison that has p <= level. Its interval counts the noise of the calibration, which more examples do
    not lessen: among P probes the share of clean examples with p <= level is Beta distributed, with a standard
    deviation of about sqrt(level (1 - level) / P). A low level misses poison, a high one drowns it in that noise: each
    of the levels has an interval (of a confidence that allows for their number), and the estimate is that of the level
    whose interval begins highest; the end is that of the last level, which misses least.

    Args:
      p_values: [M], of the examples in question, probes left out.
      num_probes: P.
      confidence: of the two-sided interval.
      levels: ascending; each is rounded down to a multiple of 1 / (P + 1), but for the first.

    Returns:
      The estimate and its interval.

    Raises:
      UsageError: no examples, or a level or confidence that is not above 0 and below 1.
    """
    p_values = np.asarray(p_values)
    ranks = sorted({_rank(level, num_probes) for level in levels})
    if not len(p_values) or not ranks or not 0 < confidence < 1:
        raise UsageError(
            f"{len(p_values)} p-values, {len(ranks)} levels and a confidence of {confidence}: expected"
            " some, and above 0 and below 1"
        )

    # Of levels that are as good, the last is taken, so the walk is from behind.
    tail = (1 - confidence) / 2
    shares = [_share_at(p_values, num_probes, rank, tail / len(ranks)) for rank in ranks]
    best = max(reversed(shares), key=lambda share: share.low)

    high = _share_at(p_values, num_probes, ranks[-1], tail).high
    return PoisonedShare(best.estimate, best.low, max(best.estimate, high))


def _share_at(p_values: np.ndarray, num_probes: int, rank: int, tail: float) -> PoisonedShare:
    """Estimates the share at one level, with an interval that leaves out so much on either side."""
    from scipy import stats  # takes most of a second to import

    expected = rank / (num_probes + 1)
    beyond = float((p_values > expected + 1e-12).mean())

    # Of clean examples, so many lie beyond: Beta, widened by the sampling noise of the M examples.
    variance = expected * (1 - expected) * (1 / (num_probes + 2) + 1 / len(p_values))
    if variance >= expected * (1 - expected):  # of a single example nothing is known
        return PoisonedShare(_in_unit(1 - beyond / (1 - expected)), 0.0, 1.0)
    size = expected * (1 - expected) / variance - 1
    clean = stats.beta(size * (1 - expected), size * expected)

    return PoisonedShare(
        estimate=_in_unit(1 - beyond / (1 - expected)),
        low=_in_unit(1 - beyond / clean.ppf(tail)),
        high=_in_unit(1 - beyond / clean.ppf(1 - tail)),
    )


def _in_unit(share: float) -> float:
    return min(max(share, 0.0), 1.0)


def no_poison_p_value(p_values: Float[np.ndarray, "M"], num_probes: int) -> float:
    """Tests whether these examples are as clean as the probes; small means that too many of them lie far out.

    If probes and examples are exchangeable, the number of M examples among the k largest ranks of P probes is
    beta-binomial: exact, whatever the distances look like. The smallest tail over the levels 1, 2, 5 and 10 %, times
    their number (Bonferroni).

    Args:
      p_values: [M], by `conformal_p_values` from one set of probes.
      num_probes: P.

    Returns:
      In [0, 1].
    """
    from scipy import stats  # takes most of a second to import

    p_values = np.asarray(p_values)
    ranks = sorted({_rank(level, num_probes) for level in LEVELS})
    tails = []
    for rank in ranks:
        far_out = int((p_values <= rank / (num_probes + 1) + 1e-12).sum())
        tails.append(float(stats.betabinom.sf(far_out - 1, len(p_values), rank, num_probes + 1 - rank)))
    return min(1.0, len(ranks) * min(tails))


def _rank(level: float, num_probes: int) -> int:
    """Returns how many of the ranks among P probes are at a level, 1 at least."""
    if not 0 < level < 1 or num_probes < 1:
        raise UsageError(f"level = {level} with {num_probes} probes: expected above 0 and below 1, and a probe")
    return min(max(1, math.floor(level * (num_probes + 1) + 1e-9)), num_probes)


def unsupported(rule: str, level: float, num_probes: int) -> str:
    """Says why so few probes cannot support a level of the rules "alpha" and "fdr".

    No p-value is below 1 / (P + 1). So "alpha" below that removes nothing, and "fdr" at q nothing unless a share of
    1 / (q (P + 1)) of all examples lies beyond every probe; more than a fifth is called unsupported.

    Args:
      rule: of `reject`; of others than these two nothing is said.
      level: of the rule, in [0, 1).
      num_probes: P.

    Returns:
      The reason, or "" if they can.
    """
    smallest = 1 / (num_probes + 1)
    if rule == "alpha" and 0 < level < smallest:
        return (
            f"alpha = {level} with {num_probes} probes removes nothing, as no p-value is below {smallest:.2g}:"
            f" {math.ceil(1 / level) - 1} probes would do"
        )

    if rule == "fdr" and 0 < level < 5 * smallest:
        share = "more than all examples lay"
        if level >= smallest:
            share = f"{smallest / level:.0%} of the examples lie"
        return (
            f"fdr = {level} with {num_probes} probes removes nothing unless {share} beyond every probe:"
            f" {math.ceil(5 / level) - 1} probes would do with a fifth"
        )
    return ""
