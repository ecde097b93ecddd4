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

Here classes are searched again and again, and what was found is judged. `search` reads classes and hands them to the
devices, `growth` has the mathematics of one class, and `evidence` what signs weigh.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int
from threadpoolctl import threadpool_limits

from badloss_jax.core.errors import UsageError
from badloss_jax.core.mesh import make_mesh
from badloss_jax.core.seeding import derived_seed
from badloss_jax.scoring.evidence import NATURAL, Cluster, Signs, evidence_of, judged, natural_gap
from badloss_jax.scoring.impressions import Impressions
from badloss_jax.scoring.parts import attacks_among
from badloss_jax.scoring.rows import Rows
from badloss_jax.scoring.search import FEW, BestClusters, SearchData, best_clusters, padded_sizes, search_data

FEW_PROBES = 3  # in a class of fewer nothing is certain
_FRINGE = -0.3  # score from which on examples are taken out with a cluster that is well apart; 0 is the middle
_ATTACKS_OF_A_CLASS = 8  # at most
_evidence_of = jax.jit(evidence_of)


def find_clusters(
    kinds: Sequence[Float[np.ndarray, "N T w"] | Rows],
    labels: Int[np.ndarray, "N"],
    is_probe: Bool[np.ndarray, "N"],
    far: Float[np.ndarray, "N"],
    looks: Impressions | None = None,
    *,
    threshold: float,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> list[Cluster]:
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
        raise UsageError(
            f"trajectories are {[rows.shape for rows in kinds]} and distances {far.shape}: expected"
            f" [{count}, T, width] and [{count}]"
        )
    mesh = mesh or make_mesh(jax.local_devices()[:1])
    labels = np.asarray(labels)
    far = np.asarray(far, np.float32)

    # Labels may be any numbers; within, classes are numbered from 0 on.
    known, sizes = np.unique(labels, return_counts=True)
    group = np.searchsorted(known, labels)
    data = search_data(kinds, is_probe, far, looks, known, group)
    if not all(np.isfinite(values).all() for values in (far, *data.means)):
        raise UsageError("trajectories or distances hold NaN or infinity: leave such examples out")

    members = np.split(np.argsort(group, kind="stable"), np.cumsum(sizes)[:-1])
    waiting = {number: ids for number, ids in enumerate(members) if len(ids) >= FEW}
    clusters = [
        replace(cluster, label=int(known[cluster.label]))
        for cluster in _search_again(data, waiting, padded_sizes(sizes), threshold, seed, mesh)
    ]

    # What nothing is certain of must not make others certain, either.
    num_probes = np.bincount(group[is_probe], minlength=len(known))
    few_probes = set(known[num_probes < FEW_PROBES].tolist())
    weighed = judged([cluster for cluster in clusters if cluster.label not in few_probes], len(waiting))
    unjudged = [cluster for cluster in clusters if cluster.label in few_probes]

    attacks = _divided([cluster for cluster in weighed if cluster.certain], data, seed)
    possible = [cluster for cluster in weighed if not cluster.certain] + unjudged
    return sorted([*attacks, *possible], key=lambda cluster: cluster.label)


def _search_again(
    data: SearchData,
    waiting: dict[int, Int[np.ndarray, "n"]],
    padded: Int[np.ndarray, "K"],
    threshold: float,
    seed: int,
    mesh: Mesh,
) -> list[Cluster]:
    """Searches each class until no more is found in it, what was found being taken out; labels are classes' numbers."""
    clusters: list[Cluster] = []
    natural = NATURAL[-1]
    for attempt in range(_ATTACKS_OF_A_CLASS):
        best = best_clusters(data, waiting, padded, derived_seed(seed, "clusters", attempt), mesh)
        # What is natural shows while all of every class is there.
        if attempt == 0:
            natural = natural_gap([one.natural for one in best])

        waiting = {}
        for one in best:
            cluster = _cluster(data, one, natural)
            if cluster is None or cluster.evidence < threshold:
                continue
            clusters.append(cluster)
            left = np.setdiff1d(one.ids, cluster.ids)
            if len(left) >= FEW:
                waiting[one.group] = left
        if not waiting:
            break
    return clusters


def _cluster(data: SearchData, best: BestClusters, natural: float) -> Cluster | None:
    """Makes a cluster of what the devices found in a class; None if they found none."""
    possible, share, *signs_of_both = best.values
    evidence = np.where(possible, np.asarray(_evidence_of(natural, share, *signs_of_both)), -np.inf)
    which = int(evidence.argmax())

    measured = [float(values[which]) for values in signs_of_both]
    if not data.has_looks:
        measured[4:] = [math.nan] * 3
    signs = Signs(*measured)

    # Two standard deviations above the rest's mean, which is at -1.
    fringe = min(max(4 / max(signs.gap, 1e-6) - 1, _FRINGE), 0.0)
    scores = best.scores[:, which]
    members = best.ids[(scores > fringe) & ~data.is_probe[best.ids]]
    if not math.isfinite(evidence[which]) or not len(members):
        return None
    return Cluster(best.group, members, float(evidence[which]), signs, scores, best.ids)


def _divided(clusters: Sequence[Cluster], data: SearchData, seed: int) -> list[Cluster]:
    """Divides the certain clusters of each class anew, by attacks; each has the signs of where most of it was."""
    attacks: list[Cluster] = []
    for label in sorted({cluster.label for cluster in clusters}):
        of_class = [cluster for cluster in clusters if cluster.label == label]

        # JAX takes LAPACK from SciPy, as in `best_clusters`.
        with threadpool_limits(1, user_api="blas"):
            ids_of_attacks = attacks_among(
                [cluster.ids for cluster in of_class],
                data.points,
                data.first,
                data.num_classes,
                derived_seed(seed, "parts", label),
            )
        attacks += [replace(_origin(ids, of_class), ids=ids) for ids in ids_of_attacks]
    return attacks


def _origin(ids: Int[np.ndarray, "M"], clusters: Sequence[Cluster]) -> Cluster:
    """Returns the cluster that most of the examples were in."""
    return max(clusters, key=lambda cluster: len(np.intersect1d(cluster.ids, ids, assume_unique=True)))
