import warnings

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from sklearn.decomposition import FastICA
from sklearn.metrics import silhouette_score

from badloss_jax.defenses.activation_clustering import activation_clustering, silhouette, split, whiten
from badloss_jax.defenses.context import Observed

SETTINGS = {"components": 10, "silhouette": 0.15, "cluster_share": 0.5, "sample_size": 2500}


def groups(rng, sizes, distance=10.0, width=12):
    """Clouds that lie apart in one direction."""
    features = rng.normal(size=(sum(sizes), width))
    features[:, 0] = rng.uniform(-0.5, 0.5, len(features)) + distance * np.repeat(np.arange(len(sizes)), sizes)
    return features.astype(np.float32)


class Given:
    """A context that has observed these features."""

    seed = 0

    def __init__(self, features, labels):
        self.labels, self.num_classes = labels, labels.max() + 1
        self.observed = lambda: Observed(np.zeros((len(labels), self.num_classes), np.float32), features)


@pytest.mark.parametrize(("count", "width"), [(200, 30), (40, 60), (6, 30)])
def test_distances_are_those_of_fast_ica(count, width, rng):
    features = rng.laplace(size=(count, width)) @ rng.normal(size=(width, width)) + 3
    components = min(10, count - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        theirs = FastICA(components, random_state=0).fit_transform(features)
    ours = whiten(features, 10)
    # scikit-learn divides the variance by n
    np.testing.assert_allclose(pdist(ours) * np.sqrt(count / (count - 1)), pdist(theirs), rtol=1e-6)


def test_directions_without_variance_are_left_out(rng):
    features = np.zeros((50, 6), np.float32)
    features[:, :2] = rng.normal(size=(50, 2))
    features[:, 3] = features[:, 0] * 2
    features[:, 4] = 0.1
    assert whiten(features, 10).shape == (50, 2)
    np.testing.assert_allclose(np.cov(whiten(features, 10).T), np.eye(2), atol=1e-9)


@pytest.mark.parametrize("features", [np.full((30, 4), 0.1, np.float32), np.zeros((30, 4), np.float32),
                                      np.ones((1, 4), np.float32), np.eye(2, 4, dtype=np.float32),
                                      np.zeros((0, 4), np.float32)])  # fmt: skip
def test_what_cannot_be_split_is_not(features):
    clusters = split(features, 10, 100)
    assert (clusters.silhouette, clusters.share) == (0, 0)
    assert clusters.margins.tolist() == [0] * len(features)


@pytest.mark.parametrize("count", [3, 4, 8, 11])
def test_tiny_classes(count, rng):
    clusters = split(rng.normal(size=(count, 32)).astype(np.float32), 10, 100)
    assert np.isfinite(clusters.margins).all()
    assert abs(clusters.silhouette) <= 1
    assert 0 < clusters.share <= 0.5


def test_silhouette(rng):
    points, second = groups(rng, [300, 60], 2), np.repeat([False, True], [300, 60])
    exact = silhouette_score(points, second)
    assert silhouette(points, second, 1000) == pytest.approx(exact)
    assert silhouette(points, second, 50) == pytest.approx(exact, abs=0.03)
    assert silhouette(points, second, 50) != silhouette(points, second, 50, seed=1)


def test_margins_by_hand():
    """On a line, 2-means finds {0, 1, 2} and {10}; the distances to the centres 1 and 10 are 1 and 10, and so on."""
    clusters = split(np.array([[0.0], [1.0], [2.0], [10.0]], np.float32), 10, 100)
    np.testing.assert_allclose(clusters.margins, [-9 / 11, -1, -7 / 9, 1])
    assert clusters.share == 0.25


def test_the_smaller_cluster_of_the_attacked_class_goes(rng):
    """Class 1 has 20 of 100 apart; class 0 is one cloud, class 2 has two examples, class 3 constant features."""
    features = np.concatenate([groups(rng, [100]), groups(rng, [80, 20], 50), groups(rng, [2]), np.ones((9, 12))])
    labels = np.repeat([0, 1, 2, 3], [100, 100, 2, 9])
    poison = np.arange(180, 200)
    settings = SETTINGS | {"components": 1}  # the direction in which class 1 falls apart
    found = activation_clustering(Given(features[:200], labels[:200]), settings | {"silhouette": 0.7})
    assert np.flatnonzero(found.removed).tolist() == poison.tolist()
    assert found.details["attacked_classes"] == [1]
    assert found.details["cluster_shares"][1] == pytest.approx(0.2)
    found = activation_clustering(Given(features, labels), settings | {"silhouette": 0.7})
    assert sorted(np.argsort(found.scores)[-20:]) == poison.tolist()
    assert np.isfinite(found.scores).all()
    assert found.details["silhouettes"][2:] == [0, 0]
    assert not activation_clustering(Given(features, labels), settings | {"cluster_share": 0.1}).removed.any()
