import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badloss_jax.core.mesh import make_mesh
from badloss_jax.defenses.spectral_signatures import spectral_scores, top_of_each_class


def by_numpy(features, labels, num_classes):
    scores = np.zeros(len(labels))
    for label in range(num_classes):
        x = features[labels == label].astype(np.float64)
        if len(x):
            x = x - x.mean(0)
            scores[labels == label] = (x @ np.linalg.svd(x, full_matrices=False)[2][0]) ** 2
    return scores


def with_singular_values(rng, count, width, values):
    """Rows of mean 0 with these singular values, in random directions."""
    left = rng.normal(size=(count, len(values)))
    left, right = np.linalg.qr(left - left.mean(0))[0], np.linalg.qr(rng.normal(size=(width, len(values))))[0]
    return ((left * values) @ right.T).astype(np.float32)


def agree(features, labels, num_classes, mesh, tolerance=1e-4):
    ours, theirs = spectral_scores(features, labels, num_classes, mesh), by_numpy(features, labels, num_classes)
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, theirs, atol=tolerance * theirs.max(), rtol=0)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.sampled_from([3, 9]), st.integers(0, 2**32 - 1))
def test_agrees_with_float64(num_classes, width, seed):
    """Classes larger and smaller than the number of features, and of any size, none included."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, num_classes, draw.integers(1, 60))
    features = (draw.normal(size=(len(labels), width)) * draw.uniform(0.1, 3, width)).astype(np.float32)
    features[:, 0] += 20 * draw.normal(size=len(labels))  # so that there is one top direction
    agree(features, labels, num_classes, make_mesh(jax.devices()[:1]))


@pytest.mark.parametrize(("count", "width"), [(50, 20), (20, 50)])
@pytest.mark.parametrize("values", [[1, 0.99, 0.5], [1, 1e-6, 1e-7], [1e-18, 1e-19], [1e17, 1e15], [1]])
def test_hard_singular_values(count, width, values, mesh, rng):
    features = with_singular_values(rng, count, width, values)
    agree(features, np.zeros(count, int), 1, mesh)


def test_a_large_mean_takes_no_digits_away(mesh, rng):
    features = with_singular_values(rng, 60, 8, [4, 1, 1]) + np.float32(1000)
    agree(features, np.zeros(60, int), 1, mesh)


def test_tied_directions_stay_in_their_plane(mesh, rng):
    """Which direction of the plane is taken is open; how long a projection can be is not."""
    features = with_singular_values(rng, 40, 10, [2, 2, 0.1])
    scores = spectral_scores(features, np.zeros(40, int), 1, mesh)
    assert scores.sum() == pytest.approx(4, rel=1e-4)
    assert (scores <= (features.astype(np.float64) ** 2).sum(1) + 1e-5).all()


def test_constant_features_and_single_examples(mesh):
    labels = np.array([0] * 7 + [1] + [3] * 2)
    features = np.full((10, 5), 0.1, np.float32)
    features[9] += 1  # two examples lie at +-0.5 in each of five dimensions
    scores = spectral_scores(features, labels, 4, mesh)
    np.testing.assert_allclose(scores, [0] * 8 + [1.25] * 2, atol=1e-6)


def test_devices_share_the_classes(rng):
    labels = rng.integers(0, 11, 300)
    features = with_singular_values(rng, 300, 6, [5, 2, 1])
    one, eight = (spectral_scores(features, labels, 11, make_mesh(jax.devices()[:n])) for n in (1, 8))
    np.testing.assert_allclose(one, eight, atol=1e-6)


def test_a_share_of_each_class_goes():
    labels = np.repeat([0, 1, 2], [20, 6, 7])
    scores = np.r_[np.arange(20), np.zeros(6), np.arange(7)[::-1]]
    assert np.flatnonzero(top_of_each_class(scores, labels, 4, 0.15)).tolist() == [17, 18, 19, 26]
    assert top_of_each_class(scores, labels, 3, 1.5).all()


@pytest.mark.slow
def test_this_and_activation_clustering_at_home(at_home):
    """On one network, with a patch on 2 % of all images, which are 16 % of class 3. It is wider than HOME's.

    Spectral signatures, seed 0: AUROC 0.97, 81 % of the poison and 12 % of the clean images removed, as any class loses
    its 15 %. At HOME's 10 % half of the class is poison: then the mean lies halfway between the two kinds, and squares
    tell them apart no more, although the sign of the projection does. At half this width the poison's direction is not
    that of the largest variance.

    Activation clustering: the target class is found, AUROC 0.91, 74 % of the poison and no clean image removed. Of 164
    images of a class, 27 of them poison, 2-means in 10 whitened dimensions follows noise: the target class is still
    found at the paper's threshold, but 30 % of its poison only. In 2 dimensions silhouettes are higher.
    """
    variants = at_home(
        "spectral_signatures,activation_clustering",
        "--config.attacks.patch.ratio=0.02",
        "--config.defenses.activation_clustering.components=2",
        "--config.defenses.activation_clustering.silhouette=0.55",
        "--config.model.stages=(32,64)",
        "--config.retraining.enabled=False",
    )["variants"]

    found = variants["spectral_signatures/own"]
    assert found["detection"]["auroc"]["patch"] > 0.85
    assert found["recall"]["patch"] > 0.55
    assert 0.1 < found["clean_removed_share"] < 0.15

    found = variants["activation_clustering/own"]
    assert found["details"]["attacked_classes"] == [3]
    assert found["detection"]["auroc"]["patch"] > 0.8
    assert found["recall"]["patch"] > 0.5
    assert found["clean_removed_share"] < 0.02
