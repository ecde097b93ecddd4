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

scikit-learn is imported where it is used, for it takes longer to import than all else here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

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
    from sklearn.decomposition import PCA

    wide = np.asarray(features, np.float64)

    # Below this, float32 features cannot be told from 0, and a direction from a constant.
    floor = np.finfo(np.float32).eps * np.abs(wide).max(initial=0)
    if len(wide) < 2 or not (np.ptp(wide, axis=0) > floor).any():
        return np.zeros((len(wide), 0))

    projected = PCA(min(components, *wide.shape), random_state=seed).fit_transform(wide)
    deviations = projected.std(0, ddof=1)
    varies = deviations > floor
    return projected[:, varies] / deviations[varies]


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
    from sklearn.metrics import silhouette_samples

    sides = [np.flatnonzero(~second), np.flatnonzero(second)]
    shares = np.array([len(side) for side in sides]) / len(points)

    # Every point is compared with every other, so large clusters are sampled.
    draw = np.random.default_rng(seed)
    samples = []
    for side in sides:
        if len(side) > sample_size:
            samples.append(draw.choice(side, sample_size, replace=False))
        else:
            samples.append(side)

    chosen = np.concatenate(samples)
    values = silhouette_samples(points[chosen], second[chosen])

    # A cluster counts by its size, however many of its points stand for it.
    num_first = len(samples[0])
    means = np.array([values[:num_first].mean(), values[num_first:].mean()])
    return float(shares @ means)


def split(features: Float[np.ndarray, "n F"], components: int, sample_size: int, seed: int = 0) -> Clusters:
    """Splits the examples of one label by 2-means on their whitened features.

    Args:
      features: n examples of F features.
      components: how many dimensions are left of them.
      sample_size: see `silhouette`.
      seed: of everything drawn.
    """
    from sklearn.cluster import KMeans

    points = whiten(features, components, seed)
    if len(points) < 3 or not points.shape[1]:
        return Clusters(0.0, 0.0, np.zeros(len(points)))

    distances = KMeans(2, n_init=10, random_state=seed).fit(points).transform(points)
    sizes = np.bincount(distances.argmin(1), minlength=2)
    small = int(sizes[1] < sizes[0])

    margins = (distances[:, 1 - small] - distances[:, small]) / distances.sum(1)
    return Clusters(
        silhouette=silhouette(points, margins > 0, sample_size, seed),
        share=sizes[small] / len(points),
        margins=margins,
    )


def activation_clustering(context: Context, settings: Mapping[str, Any]) -> Suspicion:
    """Finds attacked classes, and removes the smaller cluster of each.

    The scores rank as a falling threshold on the silhouette does: the members of smaller clusters before all others,
    attacked classes first, class by class as the silhouette falls, and within a class by their margin.

    Args:
      context: what every defence is given.
      settings: `config.defenses.activation_clustering`.

    Returns:
      Scores from -K to K; details: the attacked classes, and each class's silhouette and share of the smaller cluster.
    """
    by_class = _split_classes(context, settings)
    silhouettes = np.array([clusters.silhouette for clusters in by_class])
    shares = np.array([clusters.share for clusters in by_class])
    attacked = (silhouettes > settings["silhouette"]) & (shares <= settings["cluster_share"])

    # Attacked classes rank before all others: 3 is past all silhouettes.
    _, rank = np.unique(np.where(attacked, 3, 0) + silhouettes, return_inverse=True)

    labels = context.labels
    scores = np.zeros(len(labels))
    in_smaller = np.zeros(len(labels), bool)
    for label, clusters in enumerate(by_class):
        members = labels == label
        in_smaller[members] = clusters.margins > 0

        # Ranks are whole and margins at most 1 from 0, so that neither classes nor clusters mix.
        offset = np.where(clusters.margins > 0, rank[label], rank[label] - rank.max())
        scores[members] = clusters.margins + offset

    details = {
        "attacked_classes": np.flatnonzero(attacked).tolist(),
        "silhouettes": silhouettes.tolist(),
        "cluster_shares": shares.tolist(),
    }
    return Suspicion(scores, removed=attacked[labels] & in_smaller, details=details)


def _split_classes(context: Context, settings: Mapping[str, Any]) -> list[Clusters]:
    """Splits the examples of each label by what the attacked network says of them."""
    features = context.observed().features

    by_class = []
    for label in range(context.num_classes):
        # Read class by class, for the features may be mapped from a file.
        members = np.asarray(features[context.labels == label])
        seed = derived_seed(context.seed, _NAME, label)
        by_class.append(split(members, settings["components"], settings["sample_size"], seed))
    return by_class
