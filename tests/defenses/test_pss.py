from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from badloss_jax.core.errors import UsageError
from badloss_jax.core.mesh import make_mesh
from badloss_jax.defenses.pss import make_consistency_step, resample, split, transform
from badloss_jax.training.loop import Passengers, Recipe, train
from badloss_jax.training.objective import Ascent
from badloss_jax.training.passes import map_examples
from badloss_jax.training.state import AdamW, create_state
from tests.training.test_training import WIDER as SPEC
from tests.training.test_training import resident

RECIPE = Recipe(4, 100, 32, learning_rate=1e-2)


def test_split_by_hand():
    moved = np.array([3.0, 1.0, 2.0, 9.0, 2.0, 8.0, 0.0, 2.0, 5.0, 4.0])
    clean, poisoned = split(moved, 0.4, 0.8)
    np.testing.assert_array_equal(clean, [1, 2, 4, 6])
    np.testing.assert_array_equal(poisoned, [3, 5])
    alike, others = split(np.ones(20), 0.8, 0.95)
    np.testing.assert_array_equal(np.r_[alike, others], [*range(16), 19])


@pytest.mark.parametrize("quantiles", [(0.9, 0.8), (0.05, 0.8)])
def test_split_that_leaves_nothing_or_overlaps_is_refused(quantiles):
    with pytest.raises(UsageError, match=r"clean_quantile = 0\.\d+ with poisoned_quantile = 0\.8 and 10 examples"):
        split(np.arange(10.0), *quantiles)


@pytest.mark.parametrize("shape", [(12, 12, 1), (9, 14, 3)])
def test_resample_agrees_with_scipy(rng, shape):
    image, angle, shift = rng.random(shape, np.float32), 0.7, np.array([1.3, -2.1])
    ours = resample(jnp.asarray(image), jnp.float32(angle), jnp.asarray(shift, jnp.float32))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = (np.array(shape[:2]) - 1) / 2
    for channel in range(shape[2]):
        theirs = ndimage.affine_transform(
            image[..., channel].astype(np.float64),
            turn,
            centre - turn @ (centre + shift),
            order=1,
            mode="grid-constant",
        )
        np.testing.assert_allclose(ours[..., channel], theirs, atol=2e-5)


def test_resample_moves_down_and_right_and_turns_counter_clockwise():
    image = np.zeros((5, 5, 1), np.float32)
    image[2, 4] = 1  # to the right of the centre
    turned = resample(jnp.asarray(image), jnp.float32(np.pi / 2), jnp.zeros(2))
    np.testing.assert_allclose(turned[0, 2, 0], 1, atol=1e-5)
    shifted = resample(jnp.asarray(image), jnp.float32(0), jnp.array([1.0, -2.0]))
    np.testing.assert_allclose(shifted[3, 2, 0], 1, atol=1e-5)


def test_transform_draws_every_angle_and_up_to_a_fifth():
    centre = np.zeros((21, 21, 1), np.float32)
    centre[10, 10] = 1
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(500))
    images = np.asarray(jax.vmap(transform, (None, 0))(jnp.asarray(centre), keys))[..., 0]
    rows = (images.sum(2) * np.arange(21)).sum(1) / images.sum((1, 2)) - 10
    assert 3.7 < np.abs(rows).max() < 4.8
    assert abs(rows.mean()) < 0.5


def test_consistency_does_not_depend_on_batches_or_devices():
    found = []
    for count, size in ((1, 200), (1, 33), (4, 64)):
        mesh = make_mesh(jax.devices()[:count])
        state, data = create_state(SPEC, AdamW(), 0, mesh), resident(mesh, 200)
        step, ids = make_consistency_step(SPEC, mesh), np.arange(200)
        found.append(map_examples(step, data, ids, size, mesh, state, np.uint32(7)))
        if count == 1:
            other = map_examples(step, data, ids, size, mesh, state, np.uint32(8))
            assert np.corrcoef(found[-1], other)[0, 1] < 0.9
    for others in found[1:]:
        np.testing.assert_allclose(others, found[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(found[0] == 0), [3])  # that is black, as what comes in


def test_ascent_unlearns_what_was_learned_and_begins_where_it_was(mesh):
    data, losses = resident(mesh, 200), []

    def go_on(recipe, phase, initial=None):
        ids = np.arange(len(data))
        return train(SPEC, recipe, data, ids, seed=0, phase=phase, mesh=mesh, initial=initial,
                     passengers=Passengers(on_epoch=lambda record: losses.append(record["loss"])))  # fmt: skip

    state = go_on(RECIPE, "learn")
    slow = replace(RECIPE, epochs=1, learning_rate=1e-3)
    state = go_on(slow, "go on", state)
    assert losses[4] < losses[3]
    steps = -(-len(data) // RECIPE.batch_size)
    assert int(state.step) == 5 * steps
    go_on(replace(slow, epochs=5, objective=Ascent()), "unlearn", state)
    assert losses[9] > 1.2 * losses[4]


@pytest.mark.slow
def test_cleanses_the_patch_at_home(at_home):
    settings = {"epochs": 6, "learning_rate": 5e-4}  # a digits epoch is a thirtieth of one of CIFAR-10
    results = at_home("pss", *(f"--config.defenses.pss.{key}={value}" for key, value in settings.items()))
    attacked, cleansed = results["undefended"], results["variants"]["pss"]["retrained"]
    assert attacked["attack_success_rate"]["patch"] > 0.9
    assert cleansed["attack_success_rate"]["patch"] < 0.4
    assert cleansed["clean_accuracy"] > attacked["clean_accuracy"] - 0.06
    assert results["variants"]["pss"]["details"] == {"called_clean": 1077, "called_poisoned": 68}
