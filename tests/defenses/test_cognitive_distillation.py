import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from badloss_jax.core.mesh import make_mesh
from badloss_jax.models import ModelSpec
from badloss_jax.training.passes import map_examples
from badloss_jax.training.resident import ResidentData
from badloss_jax.training.state import AdamW, create_state

# The package has its function by that name.
module = importlib.import_module("badloss_jax.defenses.cognitive_distillation")


def test_a_share_goes_at_home(at_home):
    """No more is asked for on digits: there the network needs the black around a digit, so that even a patch with
    random colours around it is no longer seen (class 3 for 20 % of the images), and masks hide nothing."""
    overrides = ("--config.retraining.enabled=False", "--config.defenses.cognitive_distillation.steps=3")
    found = at_home("cognitive_distillation", *overrides)["variants"]["cognitive_distillation/own"]
    assert found["removed_share"] == pytest.approx(0.15, abs=1e-3)
    assert 0 <= found["detection"]["auroc"]["overall"] <= 1


def coloured_digits(path, copies, rng):
    """Digits in random colours on random colours: what the network learns from them does not mind the background."""
    digits = load_digits()
    images = np.pad(np.repeat(digits.images, copies, 0), ((0, 0), (2, 2), (2, 2)))[..., None] / 16
    back, ink = rng.random((2, len(images), 1, 1, 3))
    while (weak := np.abs(back - ink).max((1, 2, 3)) < 0.5).any():
        ink[weak] = rng.random((weak.sum(), 1, 1, 3))
    images = np.rint(255 * (back + (ink - back) * images)).astype(np.uint8)
    labels, test = np.repeat(digits.target, copies), np.arange(len(images)) // copies % 5 == 0
    np.savez(path, x_train=images[~test], y_train=labels[~test], x_test=images[test], y_test=labels[test])


@pytest.mark.slow
def test_it_finds_patches_where_backgrounds_do_not_matter(at_home, tmp_path, rng):
    """The weight is the paper's for 32 px images, grown with the share of a pixel in an image of 12 px. Fewer steps
    than the default's, and batches of twice its size, to be fast."""
    coloured_digits(tmp_path / "digits.npz", 2, rng)
    found = at_home(
        "cognitive_distillation", "--config.data.source=arrays", f"--config.data.dir={tmp_path / 'digits.npz'}",
        "--config.data.pad=0", "--config.retraining.enabled=False", "--config.retraining.epochs=45",
        "--config.retraining.batch_size=64", "--config.defenses.cognitive_distillation.steps=40",
        "--config.defenses.cognitive_distillation.l1_weight=0.1",
    )["variants"]["cognitive_distillation/own"]  # fmt: skip
    assert found["detection"]["auroc"]["overall"] > 0.7
    assert found["recall"]["patch"] > 2 * found["clean_removed_share"]


def test_total_variation_is_a_loop_of_squares(rng):
    masks = rng.random((3, 5, 7, 1))
    expected = []
    for mask in masks[..., 0]:
        down = sum((mask[i + 1, j] - mask[i, j]) ** 2 for i in range(4) for j in range(7))
        across = sum((mask[i, j + 1] - mask[i, j]) ** 2 for i in range(5) for j in range(6))
        expected.append((down + across) / 35)
    np.testing.assert_allclose(module.total_variation(jnp.asarray(masks)), expected, rtol=1e-5)
    np.testing.assert_array_equal(module.total_variation(jnp.full((1, 4, 4, 1), 0.3)), 0)


def test_objective_by_hand():
    """One black pixel beside a white one, half hidden by grey; the network sums."""
    images = jnp.array([0.0, 1.0]).reshape(1, 1, 2, 1)
    how = module.Distillation(1, 0.1, l1_weight=0.5, variation_weight=3.0)
    raw = jnp.array([0.0, 50.0]).reshape(1, 1, 2, 1)  # masks 1/2 and 1
    colours = jnp.full((1, 1, 1, 1), 0.5)

    def network(x):
        return jnp.stack([x.sum((1, 2, 3)), 2 * x.sum((1, 2, 3))], 1)

    values = module.objective(raw, images, network(images), colours, network, how)
    # The pixels become 1/4 and 1: logits change by 1/4 and 1/2. L1 1.5; variation (1/2)^2 / 2 pixels.
    np.testing.assert_allclose(values, [0.375 + 0.5 * 1.5 + 3 * 0.125], rtol=1e-6)


def data_of(images, mesh):
    count = len(images)
    return ResidentData.place(mesh, np.zeros(images.shape, np.uint8), np.zeros(count, np.int32), np.arange(count),
                              images)  # fmt: skip


def test_masks_are_small_where_a_small_part_is_all(monkeypatch, mesh, rng):
    """Half the images show what a linear network looks for in 2x2 pixels, half in all the others."""
    checker = np.where(np.indices((8, 8)).sum(0) % 2, 1.0, -1.0)[..., None]
    patch = np.zeros((8, 8, 1))
    patch[4:6, 4:6] = 1
    template = checker * (patch / 4 + (1 - patch) / 60)

    def network(x):
        return 10 * jnp.einsum("bhwc,hwc->b", x, template)[:, None]

    monkeypatch.setattr(module, "network_of", lambda spec, state: network)
    images = np.stack([0.5 + 0.5 * checker * where for where in (patch, 1 - patch)]).repeat(8, 0).astype(np.float32)
    how = module.Distillation(100, 0.1, l1_weight=0.04, variation_weight=1.0)
    distill = module.make_distill.__wrapped__(ModelSpec("resnet_small", (8, 8, 1), 2), how, mesh)
    norms = map_examples(distill, data_of(images, mesh), np.arange(16), 16, mesh, None, np.uint32(0))
    assert norms[:8].max() < 12  # of 64 pixels
    assert norms[8:].min() > 40


SPEC = ModelSpec("resnet_small", (8, 8, 3), 4, (8,), 1)


def norms_on(count, images, batch_size, how, seed=0):
    mesh = make_mesh(jax.devices()[:count])
    state = create_state(SPEC, AdamW(), 0, mesh)
    distill = module.make_distill(SPEC, how, mesh)
    data = data_of(images, mesh)
    return map_examples(distill, data, np.arange(len(images)), batch_size, mesh, state, np.uint32(seed))


def test_neither_devices_nor_batches_change_a_mask(rng):
    images = rng.random((10, 8, 8, 3)).astype(np.float32)
    how = module.Distillation(5, 0.1, 0.01, 1.0)
    alone = norms_on(1, images, 10, how)
    np.testing.assert_allclose(norms_on(4, images, 10, how), alone, rtol=1e-3)
    np.testing.assert_allclose(norms_on(1, images, 3, how), alone, rtol=1e-3)
    assert np.abs(norms_on(1, images, 10, how, seed=1) - alone).max() > 1e-3


def test_steps_are_adams(rng):
    """With nothing to keep, every pixel goes the way of Adam on the L1 norm alone, from tanh(1)."""
    images = np.zeros((2, 8, 8, 3), np.float32)
    heavy = module.Distillation(7, 0.05, 1e6, 1e-9)
    raw, adam = np.float64(1.0), optax.adam(0.05, 0.1, 0.1)
    with jax.enable_x64(True):
        raw = jnp.asarray(raw)
        moments = adam.init(raw)
        for _ in range(7):
            update, moments = adam.update(1e6 * (1 - jnp.tanh(raw) ** 2) / 2, moments)
            raw = raw + update
    np.testing.assert_allclose(norms_on(1, images, 2, heavy), 64 * (np.tanh(float(raw)) + 1) / 2, rtol=1e-4)
