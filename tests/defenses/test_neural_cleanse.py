import importlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import scipy.stats

from badloss_jax.core.mesh import make_mesh
from badloss_jax.core.progress import Progress
from badloss_jax.defenses import trigger_search
from badloss_jax.models import ModelSpec
from badloss_jax.training.state import AdamW, create_state
from badloss_jax.training.step import network_of

module = importlib.import_module("badloss_jax.defenses.neural_cleanse")  # the package has its function by that name


def test_it_names_the_attacked_class_at_home(at_home):
    """A third of the default's steps an epoch, to be fast."""
    overrides = ("--config.retraining.enabled=False", "--config.defenses.neural_cleanse.steps=15")
    found = at_home("neural_cleanse", *overrides)["variants"]["neural_cleanse/own"]
    assert found["details"]["attacked"] == [3]
    assert np.argmin(found["details"]["mask_norms"]) == 3
    assert min(found["details"]["flipped"]) >= 0.95
    assert found["detection"]["auroc"]["overall"] > 0.95
    assert found["recall"]["patch"] > 0.9
    assert found["clean_removed_share"] < 0.12


def test_anomaly_index_by_hand_and_by_scipy(rng):
    norms = np.array([9.0, 10, 11, 12, 1])  # median 10, deviations 1 0 1 2 9, their median 1
    np.testing.assert_allclose(module.anomaly_indices(norms), np.array([1, 0, 1, 2, 9]) / 1.4826)
    norms = rng.lognormal(size=43)
    theirs = np.abs(norms - np.median(norms)) / scipy.stats.median_abs_deviation(norms, scale="normal")
    np.testing.assert_allclose(module.anomaly_indices(norms), theirs, rtol=1e-4)
    np.testing.assert_array_equal(module.anomaly_indices(np.full(7, 3.0)), 0)
    assert np.isfinite(module.anomaly_indices(np.array([3.0, 3, 3, 3, 1]))).all()


def test_attacked_are_small_outliers():
    assert module.attacked_classes(np.array([9.0, 10, 11, 12, 1]), 2).tolist() == [4]
    assert module.attacked_classes(np.array([9.0, 10, 11, 12, 99]), 2).tolist() == []
    assert module.attacked_classes(np.full(10, 5.0), 2).tolist() == []
    assert module.attacked_classes(np.array([5.0, 9]), 2).tolist() == []


@pytest.mark.parametrize(("units", "expected"), [(32, 1), (100, 1), (250, 2), (2048, 20)])
def test_units_that_are_raised_most(units, expected, rng):
    raised = rng.normal(size=units)
    chosen = module.most_raised(raised, 0.01)
    assert len(chosen) == expected
    assert raised[chosen].min() >= np.delete(raised, chosen).max()


@pytest.mark.parametrize(("share", "lost"), [(0.05, 5), (0.025, 2), (0.001, 0)])
def test_threshold_costs_its_share_of_the_probes(share, lost, rng):
    of_probes = rng.permutation(100).astype(float)
    threshold = module.probe_threshold(of_probes, share)
    assert (of_probes > threshold).sum() == lost
    assert threshold == 99 - lost


def test_excess_is_the_union_of_the_classes(rng):
    """Each of two classes may cost half the share; scales of activations do not matter."""
    activations, probe_ids = rng.normal(size=(2, 1000)), np.arange(0, 1000, 5)
    scores = module.excess(activations, probe_ids, 0.05)
    thresholds = np.sort(activations[:, probe_ids], axis=1)[:, -6]  # 5 of 200 probes lie above
    np.testing.assert_array_equal(scores > 0, (activations > thresholds[:, None]).any(0))
    np.testing.assert_allclose(module.excess(activations * [[1], [100]], probe_ids, 0.05), scores, rtol=1e-6)
    alone = module.excess(activations[:1], probe_ids, 0.05)
    np.testing.assert_array_equal(np.argsort(alone), np.argsort(activations[0]))
    assert (alone[probe_ids] > 0).sum() == 10
    assert np.isfinite(module.excess(np.zeros((1, 1000)), probe_ids, 0.05)).all()


def test_the_best_is_the_smallest_that_flips_enough():
    def found(norms, flipped):
        return trigger_search.Triggers(np.array(norms), np.array(flipped), np.array(norms)[:, None])

    ours = found([5.0, 5, 5, 5, 5], [1.0, 1, 0.5, 0.5, 0.5])
    theirs = found([4.0, 6, 9, 1, 1], [0.99, 1, 0.99, 0.6, 0.4])
    best = ours.better(theirs, 0.99)
    assert best.norms.tolist() == [4, 5, 9, 1, 5]
    assert best.flipped.tolist() == [0.99, 1, 0.99, 0.6, 0.5]
    assert best.features[:, 0].tolist() == best.norms.tolist()


def context_of(count, shape=(8, 8, 3), num_classes=5):
    spec = ModelSpec("resnet_small", shape, num_classes, (8,), 1)
    mesh = make_mesh(jax.devices()[:count])
    context = SimpleNamespace(mesh=mesh, spec=spec, num_classes=num_classes, seed=0, progress=Progress(None))
    return context, create_state(spec, AdamW(), 0, mesh)


SETTINGS = {"epochs": 2, "steps": 4, "batch_size": 4, "learning_rate": 0.1, "penalty": 1e-3, "flipped_share": 0.99}


def test_neither_devices_nor_chunks_change_the_search(monkeypatch, rng):
    probes = rng.random((10, 8, 8, 3)).astype(np.float32)
    results = []
    for devices, values in ((1, 2**23), (4, 1)):  # all classes at once, or one a device
        monkeypatch.setattr(trigger_search, "_VALUES", values)
        context, state = context_of(devices)
        results.append(trigger_search.reverse_engineer(context, probes, state, SETTINGS))
    for name in ("norms", "flipped", "features"):
        np.testing.assert_allclose(getattr(results[1], name), getattr(results[0], name), rtol=1e-3, atol=1e-5)
    assert (results[0].features.shape, results[0].norms.shape) == ((5, 8), (5,))


def test_judgement_leaves_padding_out(rng):
    """Against the network on images that NumPy put the pattern into; batches of 4 of 10 probes."""
    shape = (6, 10, 3)
    context, state = context_of(1, shape, 3)
    _, _, judge = trigger_search.make_steps(context.spec, 0.1, context.mesh)
    probes = rng.random((10, *shape)).astype(np.float32)
    raw = rng.normal(size=(3, *shape[:2], 1)), rng.normal(size=(3, *shape))
    raw = tuple(part.astype(np.float32) for part in raw)
    flips = np.zeros(3)
    for rows, real in trigger_search._blocks(10, 4):
        norms, flipped, _ = judge(raw, np.arange(3), probes[rows], real, state)
        flips += flipped
    masks, patterns = ((np.tanh(part.astype(np.float64)) + 1) / 2 for part in raw)
    network = network_of(context.spec, state)
    shown = [probes * (1 - mask) + mask * pattern for mask, pattern in zip(masks, patterns, strict=True)]
    logits = [np.asarray(network(images.astype(np.float32))) for images in shown]
    assert flips.tolist() == [int((of_class.argmax(1) == target).sum()) for target, of_class in enumerate(logits)]
    np.testing.assert_allclose(norms, masks.sum((1, 2, 3)), rtol=1e-5)


def test_batches_show_the_probes_equally_often(rng):
    order = trigger_search._batches(10, 7, 4, rng)
    assert order.shape == (7, 4)
    assert set(np.bincount(order.ravel(), minlength=10)) == {2, 3}
