"""What speaks for an attack: the signs of a cluster, what they weigh together, and from where on it is certain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

CERTAIN = 5.3  # evidence of a cluster that is called an attack
POSSIBLE = 4.4  # of one that is worth a look
_NATURAL = 0.05  # clean classes' clusters that are called so: at most, in a clean set, and as a share beside an attack
# Of less evidence than `CERTAIN`, a cluster must reach one of these: its gap, how far it lies, its odds; or its sources
# if it lies somewhat far, too. Natural groups that do not: a fifth of the trousers had 4.9, 3.0, -8.9 and .1, a tenth
# of the frogs 3.2, -.4, 2.5 and .8.
_APART = 6.7
_FAR = 3.5
_MISTAKEN = 3.0
_FROM_ALL = 0.7
_SOMEWHAT_FAR = 2.0
_NOTICED = 0.3  # `Signs.probes_p` of what reaches but one of the first three, at most: of small ones probes say nothing
# Of 235 clean classes, a fifth had a cluster of more evidence than 2.5, which exceeded that by 0.7 on average.
_TAIL = (2.5, 0.2, 0.7)
NATURAL = (5.0, 6.7)  # gap that natural groups of a data set may have, at least and at most
_BEYOND = 0.3  # the widest that was seen
_KNOWN = 0.5  # share of the classes in which one must have been seen
SMALL = 0.055  # share of a class: odd images, or wrong labels, make up so much of most


@dataclass(frozen=True)
class Signs:
    """What is known of a cluster.

    Attributes:
      far: how much further from the probes its members lie than the rest of the class, in spreads of the probes.
      probes_p: probability of no more probes than it holds, were they drawn from the class at random; or, if larger,
        how much likelier those that it holds are in a natural group than in an attack; 1 of more than 30.
      gap: distance of its mean score from the rest's, in standard deviations within, of both together.
      agreement: share of the mixtures that led to it.
      sources: number of other classes that its members seem to come from after the first epoch (the exponential of the
        entropy), as a share of how many there could be, times the share of members that look like another class.
      late_sources: likewise by all epochs together.
      odds: mean log-odds, by these, of the other class that a member looks most like, against its own.

    The last three are NaN where no features were recorded.
    """

    far: float
    probes_p: float
    gap: float
    agreement: float
    sources: float
    late_sources: float
    odds: float


@dataclass(frozen=True)
class Cluster:
    """A cluster of one class.

    Attributes:
      label: the class.
      ids: int64 [M], its members and its fringe, ascending; no probes.
      evidence: see `evidence_of`; of attacks that were found as one cluster, that of this cluster.
      signs: what it is made of, likewise.
      scores: [n], of all examples of the class that were left when it was found: about 1 in the cluster and -1 in the
        rest. The fringe begins two standard deviations above the rest's mean, but between -0.3 and 0.
      score_ids: int64 [n].
      certain: whether it is called an attack: its evidence is `CERTAIN`, or there are such and `find_clusters` expects
        few of so much among clean classes.
    """

    label: int
    ids: Int[np.ndarray, "M"]
    evidence: float
    signs: Signs
    scores: Float[np.ndarray, "n"]
    score_ids: Int[np.ndarray, "n"]
    certain: bool = False


def evidence_of(
    natural: Float[Array, ""] | float,
    share: Float[Array, "G"],
    far: Float[Array, "G"],
    probes_p: Float[Array, "G"],
    gap: Float[Array, "G"],
    agreement: Float[Array, "G"],
    sources: Float[Array, "G"],
    late_sources: Float[Array, "G"],
    odds: Float[Array, "G"],
) -> Float[Array, "G"]:
    """Weighs the signs of clusters (see `Signs`), which hold a share of their class, against each other; 0 is none.

    Each sign alone is wrong somewhere: a natural group of odd images lies far out, too, a few probes miss a tenth of a
    class by chance, and attackers who keep the labels have one source. What counts in each is limited, so that none
    decides alone.

    There are two ways to be an attack, and the better counts. What was learnt lies far out, in a place of its own; what
    lies hardly further out than the rest of its class is the class itself, cut in two. What was relabelled and not
    learnt is still taken for other classes in the end, and for many; the hard images of a class are, too, but less
    surely, with no gap to the rest, and probes are among them. A few wrong labels are in every class: a group so small
    that probes would hardly notice it needs more. What the rest of its class lies far beyond is what is left of the
    class where most of it is an attack.

    The weights were settled on recordings of Fashion-MNIST, CIFAR-10 and traffic signs, attacked and clean
    (scoring/README.md has what they give).

    Args:
      natural: gap that natural groups of the data set may have (`natural_gap`).
      share: [G], of the class.
      far: [G], as are the others: signs of the clusters, in the order of `Signs`; none is NaN.
      probes_p: in [0, 1].
      gap: in standard deviations.
      agreement: in [0, 1].
      sources: in [0, 1].
      late_sources: in [0, 1].
      odds: log-odds.

    Returns:
      [G].
    """
    lacking = jnp.minimum(-jnp.log10(probes_p + 1e-12), 2.0)
    # A gap alone, or too few probes alone, is often natural; a crowd well apart in which probes should be is not.
    crowd = 0.4 * lacking * jnp.clip(gap - 5.0, 0.0, 3.0)
    common = 1.5 * lacking + 0.25 * jnp.clip(gap - 3.0, 0.0, 4.0) - jnp.maximum(3.0 - gap, 0.0) + crowd + agreement

    # Natural groups: a class cut in two has a gap of 2 to 3.5; a kind of its own images, which comes from few classes,
    # a wider one, above all if it is half of the class; and a small one is in most classes, of odd images or wrong
    # labels.
    half = jnp.clip((share - 0.2) / 0.2, 0.0, 1.0)
    narrow = jnp.clip(4.0 - gap, 0.0, 1.0)
    small = jnp.clip((SMALL - share) / 0.03, 0.0, 1.0)
    of_its_own = jnp.clip((0.4 - sources) / 0.15, 0.0, 1.0) * jnp.clip(natural + half - gap, 0.0, 1.0)
    odd = small * jnp.clip((0.6 - sources) / 0.1, 0.0, 1.0)
    of_odd_images = odd * jnp.clip(8.0 - gap, 0.0, 1.0)

    # What is further apart than these are in any data set, and not near the probes, is an attack even where a class has
    # so few probes that none would be expected in it.
    alone = jnp.clip(far - 1.5, 0.0, 1.0) * jnp.clip((1.0 - probes_p) / 0.1, 0.0, 1.0) * (1.0 - odd)
    apart = jnp.clip(gap - half - 7.0, 0.0, 3.0) * alone

    distance = 0.5 * jnp.minimum(far, 4.0) - 3.0 * jnp.maximum(1.5 - far, 0.0)
    learnt = distance + 2.0 * sources + apart - 0.5 * narrow - 2.0 * of_its_own - 1.5 * of_odd_images

    likelier = 0.75 * jnp.minimum(odds, 5.0) - 2.0 * jnp.maximum(2.0 - odds, 0.0)
    unnoticed = 2.0 * jnp.maximum(small, 2.0 * jnp.maximum(probes_p - 0.5, 0.0))
    mistaken = likelier + 1.5 * late_sources - 1.5 * narrow - unnoticed - jnp.maximum(-3.0 - far, 0.0)
    return common + jnp.maximum(learnt, mistaken)


def natural_gap(gaps: Sequence[float]) -> float:
    """Returns the gap that natural groups of a data set may have.

    Args:
      gaps: of each class, the widest of a group that holds its part of the probes, and so is natural; or 0.
    """
    if sum(gap > 0 for gap in gaps) < _KNOWN * len(gaps):
        return NATURAL[-1]
    return float(np.clip(max(gaps, default=0.0) + _BEYOND, *NATURAL))


def clean_class_p_value(evidence: float) -> float:
    """Returns the probability that the best cluster of a clean class has at least this evidence, in (0, 0.2].

    An exponential tail, fitted to clean classes of Fashion-MNIST, CIFAR-10 and traffic signs; scoring/README.md has how
    they were recorded. It says nothing of other data whose classes have groups of their own.
    """
    start, share, scale = _TAIL
    return share * math.exp(-max(evidence - start, 0.0) / scale)


def judged(clusters: list[Cluster], num_classes: int) -> list[Cluster]:
    """Says which clusters are certain; `find_clusters` has the rule.

    Args:
      clusters: of all classes.
      num_classes: that were searched.

    Returns:
      The same, in the same order, each with `certain`.
    """
    evidence = np.sort([cluster.evidence for cluster in clusters if _is_conspicuous(cluster)])[::-1]
    start, share, scale = _TAIL
    least = max(CERTAIN, start + scale * math.log(share * max(num_classes, 1) / _NATURAL))

    # Without such a cluster nobody is known to attack, and no less is enough.
    if (evidence >= least).any():
        natural = num_classes * np.array([clean_class_p_value(value) for value in evidence])
        few = natural <= _NATURAL * np.arange(1, len(evidence) + 1)
        least = evidence[few].min(initial=least)

    return [
        replace(cluster, certain=bool(_is_conspicuous(cluster) and cluster.evidence >= least)) for cluster in clusters
    ]


def _is_conspicuous(cluster: Cluster) -> bool:
    """Says whether a cluster has evidence enough by itself, or signs that natural groups do not have."""
    signs = cluster.signs
    from_all = signs.sources >= _FROM_ALL and signs.far >= _SOMEWHAT_FAR
    extreme = sum((signs.gap >= _APART, signs.far >= _FAR, signs.odds >= _MISTAKEN))
    enough = 1 if signs.probes_p <= _NOTICED else 2
    return cluster.evidence >= CERTAIN or from_all or extreme >= enough
