from dataclasses import replace

import numpy as np
import pytest

from badloss_jax.report.scan import sentence
from badloss_jax.scoring import SIGNS, PoisonedShare, first_seen_as, judge, pixels_seen_as, stranger_p_values


def test_first_seen_as_is_the_nearest_mean(rng):
    labels = rng.integers(0, 4, 500) * 3 + 1
    features = rng.normal(size=(500, 1, 6)).astype(np.float16)
    known = np.unique(labels)
    means = np.stack([features[labels == label, 0].astype(np.float64).mean(0) for label in known])
    distances = ((features[:, 0, None].astype(np.float64) - means) ** 2).sum(-1)
    got = first_seen_as(features, labels)
    np.testing.assert_array_equal(got, known[distances.argmin(1)])
    np.testing.assert_array_equal(first_seen_as(features[:, 0], labels), got)


def impressions(rng, attacked=(), poison=0.1, hard=(), size=20_000, probes=250, classes=10, unprobed=()):
    """Each class is confused with the next two; hard ones with all. Poison looks like the class that it came from."""
    labels = rng.integers(0, classes, size)
    is_probe = np.zeros(size, bool)
    is_probe[rng.choice(np.flatnonzero(~np.isin(labels, unprobed)), probes, replace=False)] = True
    seen, chance = labels.copy(), rng.random(size)
    seen = np.where(chance < 0.1, (labels + 1) % classes, np.where(chance < 0.15, (labels + 2) % classes, seen))
    bad = np.isin(labels, attacked) & ~is_probe & (rng.random(size) < poison)
    lost = np.isin(labels, hard) & (rng.random(size) < 0.4)
    anywhere = rng.integers(0, classes, size)
    return labels, np.where(bad | lost, anywhere, seen), is_probe


def pictures(draw, labels, height=17, width=30):
    """A faint pattern a class, under noise, in RGB."""
    patterns = draw.integers(0, 60, (labels.max() + 1, height, width, 3))
    return np.uint8(patterns[labels] + draw.integers(0, 190, (len(labels), height, width, 3)))


def test_pixels_tell_where_relabelled_images_come_from(rng):
    """And a faint trigger that all of them have, of a fortieth of a random image, does not hide it."""
    came_from = rng.integers(0, 5, 2_000)
    labels, images = came_from * 2 + 1, pictures(rng, came_from)
    relabelled = np.flatnonzero(came_from != 2)[:80]
    labels[relabelled] = 5
    trigger = rng.integers(0, 256, images.shape[1:])
    images[relabelled] = np.round(0.975 * images[relabelled] + 0.025 * trigger)
    seen = pixels_seen_as(images, labels)
    assert seen.dtype == np.int64
    assert (seen == 2 * came_from + 1).mean() > 0.95
    assert (seen[relabelled] != 5).mean() > 0.8
    np.testing.assert_array_equal(pixels_seen_as(images, labels), seen)


def test_the_linear_classifier_learns_from_some_and_sees_all(rng, monkeypatch):
    labels = rng.integers(0, 3, 900)
    images = pictures(rng, labels, 8, 8)
    monkeypatch.setattr("badloss_jax.scoring.impressions._FITTED", 300)
    monkeypatch.setattr("badloss_jax.scoring.impressions._VALUES", 5_000)
    assert (pixels_seen_as(images, labels) == labels).mean() > 0.95


def test_a_tiny_class_hides_no_other(rng, monkeypatch, recwarn):
    labels = np.repeat([0, 1, 2], [300, 1, 300])
    images = pictures(rng, labels, 8, 8)
    monkeypatch.setattr("badloss_jax.scoring.impressions._FITTED", 200)
    assert (pixels_seen_as(images, labels) == labels)[labels != 1].mean() > 0.95
    assert not recwarn.list


@pytest.mark.parametrize("labels", [[3, 3, 3], [0, 1, 2]])
def test_where_pixels_can_say_nothing_labels_are_believed(rng, labels):
    images = rng.integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)
    assert pixels_seen_as(images, np.array(labels)).tolist() == labels


def test_classes_with_relabelled_images_are_found(rng):
    for _ in range(20):
        p_values = 10 * stranger_p_values(*impressions(rng, attacked=(2, 3, 5, 7, 8)), 10)
        assert (p_values[[2, 3, 5, 7, 8]] < 0.05).sum() >= 4
        assert p_values[[0, 1, 4, 6, 9]].min() > 0.05


def test_a_class_that_is_confused_with_all_is_seldom_called_strange(rng):
    """Its own probes are strangers, too."""
    named = [stranger_p_values(*impressions(rng, hard=(4,)), 10)[4] < 0.005 for _ in range(100)]
    assert np.mean(named) < 0.1


def test_relabelled_images_of_one_class_among_many_are_found(rng):
    """Although each of the other classes gives it none or one."""
    given = impressions(rng, attacked=(7,), classes=200, size=100_000, probes=2_000)
    p_values = stranger_p_values(*given, 200)
    assert p_values[7] < 1e-3
    assert np.delete(p_values, 7).min() > 1e-3


def test_clean_classes_are_not_strange(rng):
    for size in (2_000, 20_000):
        p_values = [10 * stranger_p_values(*impressions(rng, size=size), 10).min() for _ in range(100)]
        assert np.mean(np.array(p_values) < 0.05) <= 0.05


@pytest.mark.parametrize("classes", [1, 2])
def test_two_classes_say_nothing(rng, classes):
    labels = rng.integers(0, classes, 100)
    assert (stranger_p_values(labels, 0 * labels, np.arange(100) < 20, classes) == 1).all()


def test_no_probes_and_empty_classes_say_nothing(rng):
    labels, seen, is_probe = impressions(rng)
    assert (stranger_p_values(labels, seen, 0 * is_probe > 1, 10) == 1).all()
    assert stranger_p_values(labels, seen, is_probe, 12)[10:].tolist() == [1, 1]


def test_impressions_count_only_where_something_stands_out(rng):
    labels, seen, is_probe = impressions(rng, attacked=(2, 5))
    scores = rng.normal(size=len(labels))
    verdict = judge(scores, scores[is_probe], labels, is_probe, 10, "alpha", 0.1, [seen])
    assert not verdict.stands_out
    assert not any(entry["affected"] for entry in verdict.classes)
    scores[np.flatnonzero((labels == 7) & ~is_probe)[:600]] += 9
    named = judge(scores, scores[is_probe], labels, is_probe, 10, "alpha", 0.1, [seen]).classes
    assert {label for label, entry in enumerate(named) if entry["affected"]} == {2, 5, 7}
    signs = [tuple(entry["signs"]) for entry in named]
    assert signs[2] == signs[5] == SIGNS[1:]
    assert signs[7] == SIGNS[:1]
    assert signs[0] == ()


def test_two_impressions_that_agree_stand_out(rng):
    found, alarms = [], 0
    for _ in range(20):
        labels, seen, is_probe = impressions(rng, attacked=(2, 5))
        clean, scores = np.where(np.isin(labels, (2, 5)), labels, seen), rng.normal(size=len(labels))
        given = scores, scores[is_probe], labels, is_probe, 10, "alpha", 0.1
        found.append([entry["affected"] for entry in judge(*given, [seen, seen]).classes])
        alarms += judge(*given, [seen, clean]).stands_out + judge(*given, [clean, clean]).stands_out
    assert np.mean(found, axis=0)[[2, 5]].min() > 0.7
    assert np.mean(found, axis=0)[[0, 1, 3, 4, 6, 7, 8, 9]].max() < 0.2
    assert alarms <= 2


def test_a_class_without_probes_raises_no_alarm_by_looks(rng):
    labels, seen, is_probe = impressions(rng, attacked=(4,), unprobed=(4,))
    scores = rng.normal(size=len(labels))
    assert not judge(scores, scores[is_probe], labels, is_probe, 10, "alpha", 0.1, [seen, seen]).stands_out


def test_where_one_class_stands_out_nothing_is_removed_of_others(rng):
    labels, seen, is_probe = impressions(rng, attacked=(4,), poison=0.15)
    scores = rng.normal(size=len(labels))
    verdict = judge(scores, scores[is_probe], labels, is_probe, 10, "alpha", 0.1, [seen, seen])
    assert [label for label, entry in enumerate(verdict.classes) if entry["affected"]] == [4]
    assert verdict.removed.any()
    assert set(labels[verdict.removed].tolist()) == {4}
    nothing = PoisonedShare(0.0, 0.0, 0.01)
    assert sentence(replace(verdict, share=nothing), list("abcdefghij"), 250).startswith(
        "e has images that look relabel"
    )
    assert "; e is most affected" in sentence(replace(verdict, share=PoisonedShare(0.01, 0, 0.1)), "abcdefghij", 250)
