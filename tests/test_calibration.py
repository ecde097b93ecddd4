"""Thresholds: p-values, what the probes can support, the poisoned share, small classes; by hand and by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from badloss_jax.errors import UsageError
from badloss_jax.scoring import (
    PoisonedShare,
    common_excess,
    conformal_p_values,
    detectable_share,
    knn_distances,
    leave_one_out_distances,
    no_poison_p_value,
    poisoned_share,
    standardised_by_class,
    unsupported,
)

finite = st.floats(-1e6, 1e6)


@settings(deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(1, 60), elements=finite),
    hnp.arrays(np.float64, st.integers(1, 60), elements=finite),
)
def test_p_values_are_what_counting_says(ours, probes):
    expected = [(1 + sum(probe >= x for probe in probes)) / (len(probes) + 1) for x in ours]
    got = conformal_p_values(ours, probes)
    np.testing.assert_array_equal(got, expected)
    assert got.min() >= 1 / (len(probes) + 1)
    order = np.argsort(ours)
    assert (np.diff(got[order]) <= 0).all()


@pytest.mark.parametrize("alpha", [0.02, 0.05, 0.1, 0.3])
def test_clean_data_are_rejected_at_alpha(alpha):
    """With real distances, so that what leave-one-out changes is in it; the mean over draws is within its error."""
    draw, rates = np.random.default_rng(3), []
    for _ in range(60):
        points = draw.normal(size=(1_100, 4)).astype(np.float32)
        distances = knn_distances(points[100:], points[:100], 5)
        rates.append((conformal_p_values(distances, leave_one_out_distances(points[:100], 5)) <= alpha).mean())
    expected = np.floor(alpha * 101) / 101
    assert abs(np.mean(rates) - expected) < 3 * np.std(rates) / np.sqrt(len(rates))
    assert np.std(rates) == pytest.approx(np.sqrt(alpha * (1 - alpha) / 100), rel=0.4)  # the calibration's own noise


@pytest.mark.parametrize(("poisoned", "count"), [(0.0, 2_000), (0.06, 20_000), (0.3, 500)])
def test_the_interval_of_the_poisoned_share_covers_it(poisoned, count):
    draw, covered, estimates = np.random.default_rng(5), [], []
    for _ in range(400):
        p_values = conformal_p_values(draw.normal(size=count), draw.normal(size=250))
        p_values[: int(poisoned * count)] = 1 / 251
        share = poisoned_share(p_values, 250, confidence=0.9)
        covered.append(share.low <= poisoned <= share.high)
        estimates.append(share.estimate)
        assert 0 <= share.low <= share.estimate <= share.high <= 1
    assert np.mean(covered) > 0.88
    assert np.mean(estimates) == pytest.approx(poisoned, abs=0.015)  # it is never below 0, so of clean data above


def test_the_poisoned_share_by_hand():
    # Nine probes: level 0.1 is the p-value 0.1 itself, which one in ten clean examples has.
    p_values = np.repeat([0.1, 0.5], [46, 54])
    assert poisoned_share(p_values, 9, levels=(0.1,)).estimate == pytest.approx(1 - 0.54 / 0.9)
    assert poisoned_share(np.ones(7), 9).estimate == 0
    assert poisoned_share(np.full(7, 0.1), 9).estimate == 1
    assert poisoned_share(np.ones(1), 250) == PoisonedShare(0.0, 0.0, 1.0)  # of one example nothing is known
    assert poisoned_share(p_values, 9, levels=(0.01,)) == poisoned_share(
        p_values, 9, levels=(0.1,)
    )  # the lowest there is


def test_few_but_certain_poison_is_estimated_at_a_low_level():
    """At 10 % the calibration is off by 2 points and more, which drowns 2 %; at 1 % it is not."""
    draw, widths = np.random.default_rng(17), []
    for _ in range(50):
        p_values = conformal_p_values(draw.normal(size=20_000), draw.normal(size=250))
        p_values[:800] = 1 / 251
        share, at_ten = poisoned_share(p_values, 250), poisoned_share(p_values, 250, levels=(0.1,))
        widths.append((0.04 - share.low, 0.04 - at_ten.low))
    assert np.mean(widths, axis=0)[0] < 0.7 * np.mean(widths, axis=0)[1]


@pytest.mark.parametrize(("level", "confidence", "count"), [(0, 0.9, 9), (1, 0.9, 9), (0.1, 1, 9), (0.1, 0.9, 0)])
def test_an_impossible_share_is_refused(level, confidence, count):
    with pytest.raises(UsageError, match="above 0 and below 1"):
        poisoned_share(np.ones(count), 9, confidence, (level,))
    with pytest.raises(UsageError):
        poisoned_share(np.ones(3), 0)


def test_the_test_of_no_poison_is_exact_on_clean_data():
    draw, p_values = np.random.default_rng(7), []
    for _ in range(600):
        p_values.append(no_poison_p_value(conformal_p_values(draw.gamma(1, size=400), draw.gamma(1, size=100)), 100))
    for level in (0.01, 0.05, 0.2):
        assert np.mean(np.array(p_values) <= level) <= level + 3 * np.sqrt(level * (1 - level) / 600)
    assert np.mean(np.array(p_values) <= 0.2) > 0.03  # it does reject


def test_the_test_of_no_poison_sees_what_it_says_it_sees():
    floor, draw, found = detectable_share(250, 0.005), np.random.default_rng(9), []
    assert 0.01 < floor < 0.05
    for _ in range(100):
        p_values = conformal_p_values(draw.normal(size=20_000), draw.normal(size=250))
        p_values[: int(1.5 * floor * 20_000)] = 1 / 251
        found.append(no_poison_p_value(p_values, 250) < 0.005)
    assert np.mean(found) > 0.6
    assert detectable_share(1_000, 0.005) < floor < detectable_share(50, 0.005)


def test_one_probe_supports_little_and_says_so():
    assert no_poison_p_value(np.full(10, 0.5), 1) == 1.0 or no_poison_p_value(np.full(10, 0.5), 1) > 0.05
    assert unsupported("alpha", 0.1, 9) == unsupported("alpha", 0.0, 9) == ""
    assert "no p-value is below 0.11: 9 probes would do" in unsupported("alpha", 0.1, 8)
    assert unsupported("fdr", 0.1, 49) == ""
    assert "20% of the examples lie beyond every probe" not in unsupported("fdr", 0.1, 49)
    assert "25% of the examples lie beyond every probe: 49 probes" in unsupported("fdr", 0.1, 39)
    assert "more than all examples lay" in unsupported("fdr", 0.01, 20)
    assert unsupported("fraction", 0.4, 1) == ""


def test_a_hard_class_is_not_suspicious_as_a_whole():
    """Of a small and hard class nearly all would be removed by pooled p-values, and about alpha by its own scale."""
    draw, pooled, by_class = np.random.default_rng(11), [], []
    for _ in range(50):
        labels = np.repeat([0, 1], [1_900, 100])
        scores = draw.normal(size=2_000) * np.where(labels == 1, 0.5, 1) + 3 * labels
        probe_labels = np.repeat([0, 1], [95, 5])
        probes = draw.normal(size=100) * np.where(probe_labels == 1, 0.5, 1) + 3 * probe_labels
        pooled.append((conformal_p_values(scores, probes)[labels == 1] <= 0.1).mean())
        both = standardised_by_class(scores, labels, probes, probe_labels)
        by_class.append((conformal_p_values(*both)[labels == 1] <= 0.1).mean())
    assert np.mean(pooled) > 0.8
    assert np.mean(by_class) == pytest.approx(0.1, abs=0.03)


def test_poison_in_a_class_hardly_moves_its_scale():
    draw = np.random.default_rng(13)
    clean, labels = draw.normal(size=2_000), np.zeros(2_000, int)
    probes = draw.normal(size=200), np.zeros(200, int)
    poisoned = np.where(np.arange(2_000) < 300, 50.0, clean)
    p_values = conformal_p_values(*standardised_by_class(poisoned, labels, *probes))
    assert (p_values[:300] <= 0.01).all()
    assert (p_values[300:] <= 0.1).mean() < 0.12


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.1, 10), st.floats(-5, 5))
def test_the_scale_of_a_class_does_not_matter(seed, classes, spread, shift):
    draw = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), draw.integers(0, classes, 300)])
    scores, probe_labels = draw.normal(size=len(labels)), labels[:40]
    probes = draw.normal(size=len(probe_labels))
    before = standardised_by_class(scores, labels, probes, probe_labels)
    after = standardised_by_class(spread * scores + shift, labels, spread * probes + shift, probe_labels)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    for label in np.unique(labels):
        assert np.median(before[0][labels == label]) == pytest.approx(0, abs=1e-9)


def test_by_class_by_hand():
    scores, labels = np.array([1.0, 2.0, 3.0, 40.0]), np.array([0, 0, 0, 7])
    ours, probes = standardised_by_class(scores, labels, np.array([3.0, 41.0]), np.array([0, 7]))
    assert ours[[1, 3]].tolist() == [0, 0]
    low, high = np.quantile(scores[:3], [0.16, 0.84])
    own = ((2 - low) + (high - 2)) / 2
    low, high = np.quantile([-1, 0, 1, 0], [0.16, 0.84])
    whole = (-low + min(high, -2 * low)) / 2
    assert ours[2] == pytest.approx(1 / (own ** (3 / 23) * whole ** (20 / 23)))
    assert probes[0] == ours[2]
    assert probes[1] == pytest.approx(1 / (1e-6 ** (1 / 21) * whole ** (20 / 21)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores": np.zeros(3)}, "expected"),
        ({"scores": np.full(4, np.nan)}, "NaN"),
        ({"probe_labels": np.array([0, 9])}, "no example has"),
        ({"probe_scores": np.zeros(3)}, "expected"),
    ],
)
def test_by_class_refuses_what_does_not_fit(changed, message):
    given_ = {"scores": np.zeros(4), "labels": np.zeros(4, int), "probe_scores": np.zeros(2),
              "probe_labels": np.zeros(2, int)}  # fmt: skip
    with pytest.raises(UsageError, match=message):
        standardised_by_class(**given_ | changed)


def test_the_noise_of_the_calibration_is_beta():
    """The share of clean examples below the k-th of P probes: what the intervals are made of."""
    draw = np.random.default_rng(15)
    shares = [(conformal_p_values(draw.normal(size=5_000), draw.normal(size=50)) <= 5 / 51 + 1e-9).mean()
              for _ in range(300)]  # fmt: skip
    assert stats.kstest(shares, stats.beta(5, 46).cdf).pvalue > 0.001


def test_what_classes_have_in_common_is_not_held_against_one():
    """Probes that lie too near make every class look poisoned; against the others only the poisoned one does."""
    draw = np.random.default_rng(19)
    labels, scores = draw.integers(0, 10, 20_000), draw.normal(size=20_000)
    scores[np.flatnonzero(labels == 6)[:200]] += 5
    p_values = conformal_p_values(scores, draw.normal(size=250) - 0.3)
    excess = common_excess(p_values, labels, 250)
    assert (excess > 0).any()
    alone = [no_poison_p_value(p_values[labels == label], 250) for label in range(10)]
    beside = [no_poison_p_value(p_values[labels == label], 250, excess) for label in range(10)]
    assert sum(p_value < 0.05 for p_value in alone) > 5
    assert [label for label, p_value in enumerate(beside) if p_value < 0.005] == [6]


def test_common_excess_by_hand():
    p_values, labels = np.array([0.1, 0.1, 0.5, 0.1, 0.9, 0.9, 0.9, 0.1]), np.repeat([0, 1, 2, 9], 2)
    # With nine probes all levels are 0.1; the rates of the classes are 1, 1/2, 0 and 1/2, their lower quartile 0.375.
    np.testing.assert_allclose(common_excess(p_values, labels, 9), 0.275)
    np.testing.assert_allclose(common_excess(p_values, labels, 9, quantile=0.5), 0.4)
    assert not common_excess(np.ones(8), labels, 9).any()


def test_more_noise_to_allow_for_is_less_evidence():
    """As of fewer probes, whose ranks are as many times fewer: exactly so where these are whole numbers."""
    p_values = np.repeat([5 / 500, 10 / 500, 25 / 500, 50 / 500, 0.5], [6, 4, 8, 30, 152])
    assert no_poison_p_value(p_values, 499, noise_of=499) == no_poison_p_value(p_values, 499)
    fewer = np.repeat([1 / 100, 2 / 100, 5 / 100, 10 / 100, 0.5], [6, 4, 8, 30, 152])
    assert no_poison_p_value(p_values, 499, noise_of=99) == pytest.approx(no_poison_p_value(fewer, 99))
    assert no_poison_p_value(p_values, 499, noise_of=99) > no_poison_p_value(p_values, 499)
