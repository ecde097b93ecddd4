import numpy as np

from badloss_jax.scoring import first_seen_as


def test_first_seen_as_is_the_nearest_mean(rng):
    labels = rng.integers(0, 4, 500) * 3 + 1
    features = rng.normal(size=(500, 1, 6)).astype(np.float16)
    known = np.unique(labels)
    means = np.stack([features[labels == label, 0].astype(np.float64).mean(0) for label in known])
    distances = ((features[:, 0, None].astype(np.float64) - means) ** 2).sum(-1)
    got = first_seen_as(features, labels)
    np.testing.assert_array_equal(got, known[distances.argmin(1)])
    np.testing.assert_array_equal(first_seen_as(features[:, 0], labels), got)
