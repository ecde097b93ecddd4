"""What examples look like: the nearest mean at first, a calibrated discriminant analysis of all epochs in the end."""

import numpy as np
import pytest
from scipy.special import log_softmax

from badloss_jax.scoring import impressions_of, rows
from badloss_jax.scoring.impressions import MOST_ODDS, chosen_epochs


def recorded(rng, count=900, classes=4, wrong=0):
    """Features of classes that part as training goes on; the first so many have the label of another class."""
    truth = rng.integers(0, classes, count)
    centres = rng.normal(size=(classes, 6))
    strength = np.linspace(0.5, 3, 8)[:, None]
    features = centres[truth][:, None] * strength + rng.normal(size=(count, 8, 6))
    labels = truth.copy()
    labels[:wrong] = (truth[:wrong] + rng.integers(1, classes, wrong)) % classes
    return features.astype(np.float16), labels * 3 + 1, truth * 3 + 1


def test_the_first_impression_is_the_nearest_mean(rng):
    features, labels, _ = recorded(rng)
    known = np.unique(labels)
    start = features[:, 0].astype(np.float64)
    means = np.stack([start[labels == label].mean(0) for label in known])
    expected = known[((start[:, None] - means) ** 2).sum(-1).argmin(1)]
    assert (impressions_of(features, labels).first == expected).mean() > 0.998  # float32 against ties


def test_the_odds_are_those_of_a_discriminant_analysis_of_each_epoch(rng):
    features, labels, _ = recorded(rng)
    looks, known = impressions_of(features, labels), np.unique(labels)
    scores = np.zeros((len(labels), len(known)))
    for epoch in chosen_epochs(8):
        values = features[:, epoch].astype(np.float64)
        values = (values - values.mean(0)) / values.std(0)
        means = np.stack([values[labels == label].mean(0) for label in known])
        left = values - means[np.searchsorted(known, labels)]
        within = left.T @ left / len(labels)
        within = 0.95 * within + 0.05 * np.trace(within) / 6 * np.eye(6)
        directions = np.linalg.solve(within, means.T)
        scores += (values @ directions - 0.5 * (means.T * directions).sum(0)) / 6
    own = np.searchsorted(known, labels)[:, None]

    def surprise(temperature):
        return -np.take_along_axis(log_softmax(scores / temperature, axis=1), own, 1).mean()

    temperature = min(np.geomspace(0.05, 50, 4_000), key=surprise)
    others = np.where(np.arange(len(known)) == own, -np.inf, scores)
    expected = (others.max(1) - np.take_along_axis(scores, own, 1)[:, 0]) / temperature
    np.testing.assert_allclose(looks.odds, np.clip(expected, -MOST_ODDS, MOST_ODDS), rtol=0.02, atol=0.02)
    clear = np.abs(expected) > 0.05
    likelier = np.where(expected > 0, known[others.argmax(1)], labels)
    np.testing.assert_array_equal(looks.late[clear], likelier[clear])


def test_relabelled_examples_look_like_what_they_were(rng):
    features, labels, truth = recorded(rng, wrong=80)
    looks = impressions_of(features, labels)
    assert (looks.late[:80] == truth[:80]).mean() > 0.8
    assert np.median(looks.odds[:80]) > 1
    assert (looks.odds[80:] < 0).mean() > 0.85


def test_chunks_change_nothing_but_roundings(rng, monkeypatch):
    features, labels, _ = recorded(rng, wrong=80)
    whole = impressions_of(features, labels)
    monkeypatch.setattr(rows, "CHUNK_VALUES", 50 * 8 * 6)
    monkeypatch.setattr("badloss_jax.scoring.impressions._VALUES", 7 * 36)
    parts = impressions_of(features, labels)
    np.testing.assert_allclose(parts.odds, whole.odds, atol=1e-3)
    assert (parts.late == whole.late).mean() > 0.998


@pytest.mark.parametrize("spoil", ["constant", "one class", "a class of one", "one epoch"])
def test_degenerate_features_are_told_apart_as_far_as_they_are(rng, spoil):
    features, labels, _ = recorded(rng)
    if spoil == "constant":
        features = np.ones_like(features)
    if spoil == "one class":
        labels = np.full(len(labels), 7)
    if spoil == "a class of one":
        labels[5] = 99
    if spoil == "one epoch":
        features = features[:, :1]
    looks = impressions_of(features, labels)
    assert np.isfinite(looks.odds).all()
    assert set(looks.late) | set(looks.first) <= set(labels)
    if spoil == "one class":
        assert (looks.odds == -MOST_ODDS).all()


def test_epochs_are_spread_over_the_recording():
    assert chosen_epochs(15).tolist() == [0, 1, 2, 4, 6, 8, 11, 14]
    assert chosen_epochs(8).tolist() == list(range(8))
    assert chosen_epochs(3).tolist() == [0, 1, 2]
    assert chosen_epochs(1).tolist() == [0]
