from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from badloss_jax.defenses.cbd import Deconfounded, dependence, hardness, next_real, normalised, score
from badloss_jax.training.loop import Recipe, train
from badloss_jax.training.objective import Forward
from badloss_jax.training.state import AdamW, create_state, forward_of, merged
from tests.training.test_training import WIDER as SPEC
from tests.training.test_training import resident


def test_hardness_by_hand():
    weights = hardness(jnp.array([1.0, 3.0, 0.0, 9.0]), jnp.array([3.0, 1.0, 2.0, 1.0]), np.array([1, 1, 1, 0], bool))
    np.testing.assert_allclose(weights, [0.75, 2.25, 0, 0], rtol=1e-6)
    nothing = hardness(jnp.zeros(2), jnp.zeros(2), np.ones(2, bool))
    np.testing.assert_array_equal(nothing, 0)


@pytest.mark.parametrize(
    ("real", "expected"), [("1111", [1, 2, 3, 0]), ("1101", [1, 3, 0]), ("0110", [2, 1]), ("01", [1])]
)
def test_partners_are_real(real, expected):
    mask = np.array([letter == "1" for letter in real])
    np.testing.assert_array_equal(np.asarray(next_real(jnp.asarray(mask)))[mask], expected)


@pytest.mark.parametrize("shape", [(6, 3), (8, 1)])
def test_power_iteration_finds_the_largest_singular_value(rng, shape):
    left, right = (
        np.linalg.qr(rng.normal(size=(shape[0], shape[1])))[0],
        np.linalg.qr(rng.normal(size=(shape[1],) * 2))[0],
    )
    weights = (left * np.geomspace(5, 0.1, shape[1])) @ right
    np.testing.assert_allclose(normalised(jnp.asarray(weights, jnp.float32)), weights / 5, rtol=1e-3, atol=1e-4)


def critic_of(rng, features):
    shapes = {"hidden": (2 * features, features), "bias": (features,), "output": (features, 1)}
    critic = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return critic | {"bias": 0.01 * critic["bias"]}  # or no unit changes its side, and nothing is told


def test_dependence_against_a_float64_loop_without_padding(rng):
    critic, real = critic_of(rng, 4), np.array([1, 1, 0, 1, 1, 0], bool)
    confounders, features = rng.normal(size=(2, 6, 4)).astype(np.float32)

    centre, other_centre = confounders[real].mean(0), features[real].mean(0)

    def told(one, other):
        hidden = (
            np.r_[one - centre, other - other_centre].astype(np.float64) @ np.asarray(normalised(critic["hidden"]))
            + critic["bias"]
        )
        return (np.where(hidden > 0, hidden, 0.01 * hidden) @ np.asarray(normalised(critic["output"]))).item()

    rows = np.flatnonzero(real)
    pairs = [told(confounders[i], features[i]) - told(confounders[i], features[j])
             for i, j in zip(rows, np.roll(rows, -1), strict=True)]  # fmt: skip
    estimate = dependence(critic, confounders, features, real)
    np.testing.assert_allclose(estimate, np.mean(pairs), rtol=1e-4)
    confounders[~real], features[~real] = 1e6, -1e6
    np.testing.assert_allclose(dependence(critic, confounders, features, real), estimate, rtol=1e-6)


@pytest.fixture
def played(mesh, rng):
    """An objective, its critic, a batch of which the last two are padding, and the backdoored network."""
    objective, given = Deconfounded(spec=SPEC, penalty=0.5), create_state(SPEC, AdamW(), 1, mesh)
    images = jnp.asarray(rng.random((6, 8, 8, 1), np.float32))
    logits, features = rng.normal(size=(6, 10)), rng.random((6, 16))
    logits, features = jnp.asarray(logits, jnp.float32), jnp.asarray(features, jnp.float32)
    labels, real = jnp.asarray(rng.integers(0, 10, 6), jnp.int32), jnp.arange(6) < 4
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    forward = Forward(images, labels, real, losses, logits, features)
    return objective, critic_of(rng, 16), forward, given


def test_network_descends_where_the_critic_ascends(played):
    objective, critic, forward, given = played
    model = merged(SPEC, given.params.tree, given.batch_stats.tree)
    _, confounders = model(forward.images, train=False)

    def value(features, critic):
        return objective(replace(forward, features=features), critic, given)

    def estimate(features, critic):
        return 0.5 * dependence(critic, confounders, features, forward.real)

    ours = jax.jit(jax.grad(value, (0, 1)))(forward.features, critic)
    plain = jax.jit(jax.grad(estimate, (0, 1)))(forward.features, critic)
    np.testing.assert_allclose(ours[0], plain[0], rtol=1e-5, atol=1e-7)
    for name in critic:
        np.testing.assert_allclose(ours[1][name], -plain[1][name], rtol=1e-5, atol=1e-7)
    assert all(np.abs(leaf).max() > 1e-5 for leaf in (plain[0], plain[1]["hidden"], plain[1]["output"]))


def test_value_is_the_reweighted_loss_and_padding_does_not_count(played):
    objective, critic, forward, given = played
    model = merged(SPEC, given.params.tree, given.batch_stats.tree)
    logits, _ = model(forward.images, train=False)
    theirs = optax.softmax_cross_entropy_with_integer_labels(logits, forward.labels)
    hard, losses = np.asarray(theirs, np.float64)[:4], np.asarray(forward.losses, np.float64)[:4]
    weights = hard / (hard + losses)
    value = objective(forward, critic, given)
    np.testing.assert_allclose(value, (weights / weights.mean() * losses).mean(), rtol=1e-5)
    padded = replace(forward, images=forward.images.at[4:].set(1), losses=forward.losses.at[4:].set(jnp.inf),
                     features=forward.features.at[4:].set(99))  # fmt: skip
    np.testing.assert_allclose(objective(padded, critic, given), value, rtol=1e-6)


def test_critic_learns_to_tell_pairs_from_shuffled_ones(mesh):
    data, recipe = resident(mesh, 200), Recipe(1, 100, 32)
    given = train(SPEC, recipe, data, np.arange(200), seed=0, phase="backdoored", mesh=mesh)
    objective = Deconfounded(spec=SPEC, penalty=1e-6)
    before = create_state(SPEC, AdamW(), 0, mesh, objective).beside
    state = train(SPEC, replace(recipe, epochs=4, objective=objective), data, np.arange(200), seed=0, phase="clean",
                  mesh=mesh, given=given)  # fmt: skip
    images = next(data.batches(np.arange(200)[None])).images
    seen = jax.jit(lambda network: forward_of(SPEC, network)(images)[1])
    features = [seen(given), seen(state)]
    fresh, learned = (float(dependence(critic, *features, np.ones(200, bool))) for critic in (before, state.beside))
    assert learned > 2 * abs(fresh)
    assert score(state.beside, *features).shape == (200,)
