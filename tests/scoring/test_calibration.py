"""Thresholds: p-values, what the probes can support, the poisoned share, small classes; by hand and by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from badloss_jax.core.errors import UsageError
from badloss_jax.scoring import (
    PoisonedShare,
    class_scales,
    conformal_p_values,
    knn_distances,
    leave_one_out_distances,
    no_poison_p_value,
    poisoned_share,
    unsupported,
)

finite = st.floats(-1e6, 1e6)


def on_class_scales(scores, labels, probe_scores, probe_labels):
    scales = class_scales(probe_scores, probe_labels)
    return scales(scores, labels), scales.of_probes


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
    """Of a hard class with five probes nearly all would be removed by pooled p-values, and hardly any by its own."""
    draw, pooled, by_class = np.random.default_rng(11), [], []
    for _ in range(50):
        labels = np.repeat([0, 1], [1_900, 100])
        scores = draw.normal(size=2_000) * np.where(labels == 1, 0.5, 1) + 3 * labels
        probe_labels = np.repeat([0, 1], [95, 5])
        probes = draw.normal(size=100) * np.where(probe_labels == 1, 0.5, 1) + 3 * probe_labels
        pooled.append((conformal_p_values(scores, probes)[labels == 1] <= 0.1).mean())
        both = on_class_scales(scores, labels, probes, probe_labels)
        by_class.append((conformal_p_values(*both)[labels == 1] <= 0.1).mean())
    assert np.mean(pooled) > 0.8
    assert np.mean(by_class) < 0.2


def test_poison_in_a_class_does_not_move_its_scale():
    """Not even that of half of a class, which no median of its own would stand."""
    draw = np.random.default_rng(13)
    clean, labels = draw.normal(size=2_000), np.zeros(2_000, int)
    probes = draw.normal(size=200), np.zeros(200, int)
    poisoned = np.where(np.arange(2_000) < 1_000, 5.0, clean)
    p_values = conformal_p_values(*on_class_scales(poisoned, labels, *probes))
    assert (p_values[:1_000] <= 0.01).all()
    assert (p_values[1_000:] <= 0.1).mean() < 0.14


def test_clean_examples_keep_their_p_values_by_class():
    """Ten classes that differ in place and spread, six to forty probes each: about alpha of the clean examples goes."""
    draw, removed = np.random.default_rng(17), []
    for _ in range(30):
        labels = draw.permutation(np.repeat(np.arange(10), 400))
        place, spread = 2 * draw.normal(size=10), draw.uniform(0.7, 1.4, 10)
        scores = place[labels] + spread[labels] * draw.normal(size=4_000)
        probe_labels = np.repeat(np.arange(10), [6, 8, 10, 15, 20, 25, 30, 35, 40, 40])
        probes = place[probe_labels] + spread[probe_labels] * draw.normal(size=len(probe_labels))
        removed.append((conformal_p_values(*on_class_scales(scores, labels, probes, probe_labels)) <= 0.1).mean())
    assert np.mean(removed) == pytest.approx(0.1, abs=0.025)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.1, 10), st.floats(-5, 5))
def test_the_scale_of_a_class_does_not_matter(seed, classes, spread, shift):
    draw = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), draw.integers(0, classes, 300)])
    scores, probe_labels = draw.normal(size=len(labels)), labels[:40]
    probes = draw.normal(size=len(probe_labels))
    before = on_class_scales(scores, labels, probes, probe_labels)
    after = on_class_scales(spread * scores + shift, labels, spread * probes + shift, probe_labels)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_by_class_by_hand():
    """Class 0 has three probes, class 7 one, class 9 none."""
    scores, labels = np.array([1.0, 40.0, 5.0]), np.array([0, 7, 9])
    probes, probe_labels = np.array([0.0, 1.0, 4.0, 11.0]), np.array([0, 0, 0, 7])
    ours, of_probes = on_class_scales(scores, labels, probes, probe_labels)
    middle = 2.5  # of all probes
    within = 1.4826 * 0.5  # the distances from the classes' medians, 1 and 11, are 1, 0, 3, 0
    few = 1.0  # the medians lie 1.5 and 8.5 from that of all, far more than the spread within
    place, spread = (3 * 1 + few * middle) / (3 + few), (1.4826 * 1.0) ** (3 / 43) * within ** (40 / 43)
    assert ours[0] == pytest.approx((1.0 - place) / spread)
    assert ours[1] == pytest.approx((40.0 - (11 + few * middle) / (1 + few)) / within)
    assert ours[2] == pytest.approx((5.0 - middle) / within)
    assert of_probes[0] == pytest.approx((0.0 - (2 * 2.5 + few * middle) / (2 + few)) / within)  # by the other two
    assert of_probes[3] == pytest.approx((11.0 - middle) / within)  # there is no other


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros(3), np.zeros(2, int), "expected"),
        (np.full(2, np.nan), np.zeros(2, int), "NaN"),
        (np.zeros(0), np.zeros(0, int), "no probes"),
    ],
)
def test_class_scales_refuse_what_does_not_fit(scores, labels, message):
    with pytest.raises(UsageError, match=message):
        class_scales(scores, labels)


def test_the_noise_of_the_calibration_is_beta():
    """The share of clean examples below the k-th of P probes: what the intervals are made of."""
    draw = np.random.default_rng(15)
    shares = [(conformal_p_values(draw.normal(size=5_000), draw.normal(size=50)) <= 5 / 51 + 1e-9).mean()
              for _ in range(300)]  # fmt: skip
    assert stats.kstest(shares, stats.beta(5, 46).cdf).pvalue > 0.001
