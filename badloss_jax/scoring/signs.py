"""What is measured of the clusters of one class: the numbers that `evidence` weighs.

Pure functions of one class's examples, padded: what is not `real` counts nowhere. G is the number of clusters at a
time, n that of the examples, and members are 1, others 0.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from badloss_jax.scoring.mixtures import RUNS

_ALIKE = 0.8  # clusters of at least this Jaccard index are one
_ASTRAY = 0.03  # share of a class's probes that lie in an attack by mistake
_PROBES_HELD = 30  # a cluster with more is not thought to lack any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassExamples:
    """The examples of one class, padded, or of several along a first axis.

    Attributes:
      points: [n, D], standardised trajectories.
      real: [n], False for padding.
      probe: [n].
      far: [n], distance to the probes; higher is further.
      first: int [n], the other class that an example looked like at first, or K if it looked like its own.
      late: int [n], likewise in the end.
      odds: [n], log-odds of another class against its own.
    """

    points: Float[Array, "n D"]
    real: Bool[Array, "n"]
    probe: Bool[Array, "n"]
    far: Float[Array, "n"]
    first: Int[Array, "n"]
    late: Int[Array, "n"]
    odds: Float[Array, "n"]


def signs_of(
    scores: Float[Array, "n G"],
    members: Float[Array, "n G"],
    examples: ClassExamples,
    num_classes: int,
) -> tuple[Float[Array, "G"], ...]:
    """Measures the signs of clusters.

    Args:
      scores: [n, G], leave-one-out, of each cluster.
      members: [n, G]; the first are grown from what `proposals` returns, in that order.
      examples: of the class.
      num_classes: K.

    Returns:
      Each [G], in the order of `Signs`.
    """
    real = examples.real
    size = jnp.maximum(members.sum(0), 1)
    others = real[:, None] - members
    rest = jnp.maximum(others.sum(0), 1)

    further = examples.far @ members / size - examples.far @ others / rest

    held = (examples.probe & real).astype(members.dtype) @ members
    probes = (examples.probe & real).sum()
    share = size / jnp.maximum(real.sum(), 1)
    few = _so_few(held, probes, jnp.clip(share, 1e-6, 1 - 1e-6))

    agreement = _agreement(members, size)
    sources = sources_of(examples.first, members, num_classes)
    late_sources = sources_of(examples.late, members, num_classes)
    gap = gap_of(scores, members, real)
    return further, few, gap, agreement, sources, late_sources, examples.odds @ members / size


def gap_of(scores: Float[Array, "n G"], members: Float[Array, "n G"], real: Bool[Array, "n"]) -> Float[Array, "G"]:
    """Measures how far the members' mean score is from the others', in standard deviations within both.

    Args:
      scores: [n, G].
      members: [n, G].
      real: [n], False for padding.

    Returns:
      [G].
    """
    others = real[:, None] - members
    size = jnp.maximum(members.sum(0), 1)
    rest = jnp.maximum(others.sum(0), 1)

    mean = (scores * members).sum(0) / size
    mean_rest = (scores * others).sum(0) / rest
    variance = ((scores - mean) ** 2 * members).sum(0) / size
    variance_rest = ((scores - mean_rest) ** 2 * others).sum(0) / rest
    within = (variance + variance_rest) / 2
    return (mean - mean_rest) / jnp.sqrt(jnp.maximum(within, 1e-6))


def sources_of(looks: Int[Array, "n"], members: Float[Array, "n G"], num_classes: int) -> Float[Array, "G"]:
    """Measures from how many other classes members seem to come, as a share, times the share of those that do.

    Args:
      looks: int [n], the other class that an example looks like, or K if it looks like its own.
      members: [n, G].
      num_classes: K.

    Returns:
      [G], in [0, 1].
    """
    size = jnp.maximum(members.sum(0), 1)
    looking = members.T @ jax.nn.one_hot(looks, num_classes, dtype=members.dtype)  # of an own look, all zeros
    strangers = looking.sum(1)

    chances = looking / jnp.maximum(strangers, 1)[:, None]
    entropy = -(chances * jnp.log(jnp.maximum(chances, 1e-12))).sum(1)

    # A small cluster cannot come from many classes: what counts is how many it could have come from.
    possible = jnp.minimum(num_classes - 1.0, 1 + size / 2)
    sources = jnp.minimum(jnp.exp(entropy) / possible, 1.0) * strangers / size
    return jnp.where(strangers > 0, sources, 0.0)


def _agreement(members: Float[Array, "n G"], size: Float[Array, "G"]) -> Float[Array, "G"]:
    """Returns the share of the mixtures that led to each cluster."""
    common = members.T @ members
    alike = common >= _ALIKE * (size[:, None] + size[None, :] - common)

    # Each of the first columns was grown from a component of one mixture.
    mixtures = np.repeat(np.arange(len(RUNS)), RUNS)
    of_mixture = np.eye(len(RUNS), dtype=np.float32)[mixtures]
    return (alike[:, : len(mixtures)].astype(members.dtype) @ of_mixture > 0).mean(1)


def _so_few(held: Float[Array, "G"], draws: Int[Array, ""], share: Float[Array, "G"]) -> Float[Array, "G"]:
    """Returns how likely a natural group holds no more than `held` probes of so many; 1 for more than 30.

    That is the binomial probability; or, if larger, that of none, times for each how much likelier it is in a natural
    group than in an attack, where it lies by mistake: half of a class rarely holds 4 of 23, an attack never.
    """
    number = jnp.arange(_PROBES_HELD + 1)
    factors = jnp.maximum(draws - number + 1, 1e-30) / jnp.maximum(number, 1)
    choices = jnp.cumsum(jnp.where(number > 0, jnp.log(factors), 0))  # logs of draws over number
    logs = choices + number * jnp.log(share)[:, None] + (draws - number) * jnp.log1p(-share)[:, None]
    binomial = jnp.where((number <= held[:, None]) & (number <= draws), jnp.exp(logs), 0).sum(1)

    each = jnp.log(share) - jnp.log1p(-share) - np.log(_ASTRAY / (1 - _ASTRAY))
    few = jnp.maximum(binomial, jnp.exp(jnp.minimum(draws * jnp.log1p(-share) + held * each, 0.0)))
    return jnp.where((held > _PROBES_HELD) | (held >= draws), 1.0, jnp.minimum(few, 1.0))
