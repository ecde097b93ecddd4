"""Activation clustering (Chen et al., SafeAI 2019): poison and clean examples of one label look different inside.

Per label, the penultimate activations of the attacked network are reduced to 10 dimensions by independent component
analysis and split by 2-means. A class whose silhouette exceeds 0.15 is attacked, and its smaller cluster goes.

ICA whitens the principal components and then rotates them. 2-means and the silhouette see distances only, which a
rotation leaves alone, so it is left out: the clusters are those of ICA (the tests compare with FastICA), whether that
would converge or not.

The paper's section 5.2 names two signs of poison, the silhouette and the smaller cluster's relative size. The authors'
program of BaDLoss looks at one of them, by default the silhouette, and would take sizes below 0.3 as the other. Here a
class must pass both, and the default of `cluster_share`, 0.5, leaves the silhouette alone to decide; 0.3 asks for a
small cluster, too. That program groups by predicted class; the paper, and this, by label.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_samples

from badloss_jax.core.seeding import derived_seed
from badloss_jax.defenses.context import Context, Suspicion

_NAME = "activation_clustering"


@dataclass(frozen=True)
class Clusters:
    """How the examples of one label fall apart.

    Attributes:
      silhouette: -1 to 1; 0 if they cannot be split.
      share: of the smaller cluster, 0 to 0.5.
      margins: [n], -1 to 1: how much nearer to the smaller cluster's centre than to the other's, as a share of both
        distances; above 0 in the smaller cluster. 0 if they cannot be split.
    """

    silhouette: float
    share: float
    margins: Float[np.ndarray, "n"]


def whiten(features: Float[np.ndarray, "n F"], components: int, seed: int = 0) -> Float[np.ndarray, "n C"]:
    """Projects on the first principal components, each scaled to variance 1: what ICA gives, up to a rotation.

    Args:
      features: n examples of F features.
      components: how many at most.
      seed: of the randomised solver that takes over where there are many features.

    Returns:
      float64; C is smaller than `components` where there are fewer examples or directions in which they differ.
    """
    wide = np.asarray(features, np.float64)
    floor = np.finfo(np.float32).eps * np.abs(wide).max(initial=0)  # what float32 features cannot tell from 0
    if len(wide) < 2 or not (np.ptp(wide, axis=0) > floor).any():
        return np.zeros((len(wide), 0))
    projected = PCA(min(components, *wide.shape), random_state=seed).fit_transform(wide)
    deviations = projected.std(0, ddof=1)
    return projected[:, deviations > floor] / deviations[deviations > floor]


def silhouette(
    points: Float[np.ndarray, "n C"], second: Bool[np.ndarray, "n"], sample_size: int, seed: int = 0
) -> float:
    """Averages the silhouettes of the points of two clusters (Rousseeuw 1987), of at least three points.

    Args:
      points: of both clusters.
      second: which points are in the second cluster; some are, and some are not.
      sample_size: of a larger cluster, so many points stand for all.
      seed: of drawing them.

    Returns:
      -1 to 1.
    """
    draw = np.random.default_rng(seed)
    sides = [np.flatnonzero(~second), np.flatnonzero(second)]
    shares = np.array([len(side) for side in sides]) / len(points)
    sides = [draw.choice(side, sample_size, replace=False) if len(side) > sample_size else side for side in sides]
    chosen = np.concatenate(sides)
    values = silhouette_samples(points[chosen], second[chosen])
    means = values[: len(sides[0])].mean(), values[len(sides[0]) :].mean()
    return float(shares @ means)


def split(features: Float[np.ndarray, "n F"], components: int, sample_size: int, seed: int = 0) -> Clusters:
    """Splits the examples of one label by 2-means on their whitened features.

    Args:
      features: n examples of F features.
      components: how many dimensions are left of them.
      sample_size: see `silhouette`.
      seed: of everything drawn.
    """
    points = whiten(features, components, seed)
    if len(points) < 3 or not points.shape[1]:
        return Clusters(0.0, 0.0, np.zeros(len(points)))
    distances = KMeans(2, n_init=10, random_state=seed).fit(points).transform(points)
    sizes = np.bincount(distances.argmin(1), minlength=2)
    small = int(sizes[1] < sizes[0])
    margins = (distances[:, 1 - small] - distances[:, small]) / distances.sum(1)
    return Clusters(silhouette(points, margins > 0, sample_size, seed), sizes[small] / len(points), margins)


def activation_clustering(context: Context, settings: Mapping[str, Any]) -> Suspicion:
    """Finds attacked classes, and removes the smaller cluster of each.

    The scores rank as a falling threshold on the silhouette does: the members of smaller clusters before all others,
    attacked classes first, class by class as the silhouette falls, and within a class by their margin.

    Returns:
      Scores from -K to K; details: the attacked classes, and each class's silhouette and share of the smaller cluster.
    """
    features, labels, found = context.observed().features, context.labels, []
    for label in range(context.num_classes):
        seed = derived_seed(context.seed, _NAME, label)
        members = np.asarray(features[labels == label])
        found.append(split(members, settings["components"], settings["sample_size"], seed))
    silhouettes, shares = (np.array([getattr(one, name) for one in found]) for name in ("silhouette", "share"))
    attacked = (silhouettes > settings["silhouette"]) & (shares <= settings["cluster_share"])
    _, rank = np.unique(np.where(attacked, 3, 0) + silhouettes, return_inverse=True)  # 3: past all silhouettes
    scores, small = np.zeros(len(labels)), np.zeros(len(labels), bool)
    for label, clusters in enumerate(found):
        members, margins = labels == label, clusters.margins
        small[members] = margins > 0
        scores[members] = margins + np.where(margins > 0, rank[label], rank[label] - rank.max())
    details = {
        "attacked_classes": np.flatnonzero(attacked).tolist(),
        "silhouettes": silhouettes.tolist(),
        "cluster_shares": shares.tolist(),
    }
    return Suspicion(scores, removed=attacked[labels] & small, details=details)
