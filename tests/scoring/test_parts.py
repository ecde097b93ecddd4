"""Attacks of one class are told apart: two that were found as one are cut, parts of one are joined."""

import numpy as np
import pytest

from badloss_jax.scoring.parts import attacks_among

CLASSES, WIDTH = 8, 90


def images(draw, attacks, classes=CLASSES):
    """Points of a few attacks of 120 images each, taken from so many classes; where they came from shows, too."""
    sources = draw.integers(0, classes, (attacks, 120))
    # As far apart as in 30 dimensions of 4 and 1.2 standard deviations.
    centres, triggers = 2.3 * draw.normal(size=(classes, WIDTH)), 0.69 * draw.normal(size=(attacks, 1, WIDTH))
    points = centres[sources] + triggers + draw.normal(size=(attacks, 120, WIDTH))
    return points.reshape(-1, WIDTH).astype(np.float32), sources.ravel(), np.arange(attacks).repeat(120)


def divided(clusters, points, first):
    found = attacks_among(clusters, lambda ids: points[ids], first, CLASSES + 1, seed=3)
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.sort(np.concatenate(clusters)))
    assert all((np.diff(ids) > 0).all() for ids in found)
    return found


@pytest.mark.parametrize("attacks", [1, 2, 3])
def test_as_many_attacks_are_told_apart_as_there_are(rng, attacks):
    points, first, truth = images(rng, attacks)
    found = divided([np.arange(len(points))], points, first)
    assert len(found) == attacks
    assert all(np.bincount(truth[ids]).max() >= 0.97 * len(ids) for ids in found)


def test_parts_of_one_attack_are_joined(rng):
    points, first, _ = images(rng, 1)
    assert len(divided([np.arange(0, 120, 2), np.arange(1, 120, 2)], points, first)) == 1


@pytest.mark.parametrize("count", [100, 200, 400])
def test_what_has_no_parts_is_not_cut(rng, count):
    """Points of one Gaussian, whose best cut of many is the widest by chance."""
    for _ in range(5):
        points = (rng.normal(size=(count, WIDTH)) / np.sqrt(np.arange(1, WIDTH + 1))).astype(np.float32)
        assert len(divided([np.arange(count)], points, rng.integers(0, CLASSES, count))) == 1


def test_attacks_that_were_found_apart_stay_so(rng):
    points, first, truth = images(rng, 2)
    found = divided([np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)], points, first)
    assert sorted(len(ids) for ids in found) == [120, 120]


def test_images_of_few_classes_are_not_cut(rng):
    """These may be what one attacker took from two classes, of which nothing is known."""
    points, *_ = images(rng, 2)
    own = np.full(len(points), CLASSES + 1)
    assert len(divided([np.arange(len(points))], points, own)) == 1


def test_a_handful_is_left_alone(rng):
    """Cut at its best, any handful seems to be two."""
    points, first, _ = images(rng, 2)
    assert len(divided([np.arange(90, 150)], points, first)) == 1
