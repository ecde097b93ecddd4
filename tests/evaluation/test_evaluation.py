import jax
import numpy as np
import pytest

from badloss_jax.attacks import make_trigger
from badloss_jax.attacks.manifest import AttackPlan, Manifest
from badloss_jax.config import default_config
from badloss_jax.core.mesh import make_mesh
from badloss_jax.data import Split
from badloss_jax.defenses.controls import oracle_removal, random_removal
from badloss_jax.evaluation import classifier
from badloss_jax.evaluation.detection import detection_metrics, recall_at_clean_loss, removal_metrics


def test_detection_metrics_by_hand():
    attack_of = np.array(["", "", "", "", "a", "a", "b", ""], object)
    is_probe = np.array([False] * 7 + [True])
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.35, 0.9, 0.05, 99.0])  # the probe's is left out
    metrics = detection_metrics(scores, attack_of, is_probe)
    assert metrics["auroc"]["a"] == pytest.approx(7 / 8)
    assert metrics["auroc"]["b"] == 0
    assert metrics["auroc"]["overall"] == pytest.approx(7 / 12)
    assert metrics["tpr_at_1_fpr"] == {"overall": pytest.approx(1 / 3), "a": 0.5, "b": 0}
    assert metrics["average_precision"]["a"] == pytest.approx((1 + 2 / 3) / 2)


def test_poisoned_probes_are_left_out_of_the_poison():
    attack_of = np.array(["", "", "a", "a", "b", ""], object)
    is_probe = np.array([False, False, False, True, True, True])
    scores = np.array([0.2, 0.5, 0.4, 0.1, 0.9, 9.0])
    metrics = detection_metrics(scores, attack_of, is_probe)
    assert metrics["auroc"] == {"overall": 0.5, "a": 0.5}  # nothing of b is left to find
    assert recall_at_clean_loss(scores, attack_of, is_probe, np.array([0.5])).keys() == {"a"}
    assert recall_at_clean_loss(scores, attack_of, is_probe, np.array([0.5]))["a"].tolist() == [1.0]
    everyone = np.ones(6, bool)
    everyone[:2] = False
    assert detection_metrics(scores, attack_of, everyone)["auroc"] == {"overall": None}


def test_recall_at_clean_loss_by_hand():
    attack_of = np.array([""] * 10 + ["a", "a", "b", "b", ""], object)
    is_probe = np.array([False] * 14 + [True])
    scores = np.array([*range(10), 8.5, 3.5, 99, 6, 1000])  # the probe's is left out
    got = recall_at_clean_loss(scores, attack_of, is_probe, np.array([0, 0.1, 0.2, 0.29, 0.3, 0.7]))
    assert got["a"].tolist() == [0, 0.5, 0.5, 0.5, 0.5, 1]  # thresholds 9, 8, 7, 7, 6, 2
    assert got["b"].tolist() == [0.5, 0.5, 0.5, 0.5, 0.5, 1]


def test_removal_metrics_by_hand():
    attack_of = np.array(["", "", "", "", "a", "a", "b", "b"], object)
    removed = np.array([True, False, False, False, True, True, True, False])
    assert removal_metrics(removed, attack_of) == {
        "removed_share": 0.5,
        "clean_removed_share": 0.25,
        "recall": {"a": 1.0, "b": 0.5},
    }


def test_controls():
    probes = np.arange(20)
    removed = random_removal(101, probes, 0.4, 0)
    assert removed.sum() == 40
    assert not removed[probes].any()
    assert (removed != random_removal(101, probes, 0.4, 1)).any()
    assert np.flatnonzero(oracle_removal(9, np.array([2, 5]))).tolist() == [2, 5]


def test_evaluate_by_hand(monkeypatch):
    """A "network" that sees class 1 in white corners, else the image's own first pixel as its class."""
    labels = np.array([0, 1, 2, 0, 2, 1])
    images = np.zeros((6, 4, 4, 1), np.uint8)
    images[:, 0, 0, 0] = labels
    images[4, 0, 0, 0] = 0  # a mistake on the clean image

    counts = []

    def predict(spec, state, images, batch_size, mesh, rows=slice(None), trigger=lambda x: x):
        x = trigger(images[rows].astype(np.float32) / 255)
        counts.append(len(x))
        return np.where(x[:, 2, 2, 0] == 1, 1, np.round(x[:, 0, 0, 0] * 255)).astype(int)

    monkeypatch.setattr(classifier, "predict", predict)
    plans = {"single_pix": AttackPlan(1, 0, (0,)), "blend_p": AttackPlan(2, 0, (1,), {"strength": 1e-9})}
    manifest = Manifest(6, 3, (4, 4, 1), plans)
    settings = default_config().evaluation
    got = classifier.evaluate(None, None, Split(images, labels), manifest, settings, None)
    assert got["clean_accuracy"] == pytest.approx(5 / 6)
    assert got["attack_success_rate"] == {"single_pix": 1.0, "blend_p": 0.0}
    assert got["robust_accuracy"] == {"single_pix": 0.0, "blend_p": 1.0}
    assert got["boosted"] == {"blend_p": 0.0}
    counts.clear()
    settings.max_triggered = 2
    classifier.evaluate(None, None, Split(images, labels), manifest, settings, None)
    assert counts == [6, 2, 2, 2]


def test_defense_effectiveness_by_hand():
    before = {"clean_accuracy": 0.9, "attack_success_rate": {"a": 0.8, "b": 0.1}}
    after = {"clean_accuracy": 0.8, "attack_success_rate": {"a": 0.2, "b": 0.3}}
    assert classifier.defense_effectiveness(before, after) == {"a": pytest.approx(0.75), "b": pytest.approx(0.45)}
    assert classifier.defense_effectiveness(after, before) == {"a": pytest.approx(0.5), "b": pytest.approx(0.6)}


def test_predict_pads_the_last_batch(mesh):
    from badloss_jax.models import ModelSpec
    from badloss_jax.training.state import AdamW, create_state

    spec = ModelSpec("resnet_small", (8, 8, 1), 10, (8,), 1)
    state = create_state(spec, AdamW(), 0, mesh)
    images = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 1), np.uint8)
    whole = classifier.predict(spec, state, images, 23, mesh)
    np.testing.assert_array_equal(classifier.predict(spec, state, images, 5, mesh), whole)
    assert whole.shape == (23,)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_network_is_shown_what_the_host_has(devices):
    """Whether bytes travel or what a trigger makes of them, in the order of the rows, black behind the last."""
    mesh = make_mesh(jax.devices()[:devices])
    images = np.arange(256, dtype=np.uint8).repeat(16).reshape(256, 4, 4, 1)
    rows = np.random.default_rng(0).permutation(256)[:250]
    exact = images[rows].astype(np.float32) / 255
    for trigger in (None, make_trigger("patch", (4, 4, 1))):
        batches = list(classifier._placed(images, rows, 20, mesh, trigger))
        assert [(batch.shape, batch.dtype) for batch in batches] == 13 * [((20, 4, 4, 1), np.float32)]
        shown = np.concatenate(batches)
        # Of bytes XLA makes numbers by a product with 1 / 255, as it does of training images.
        np.testing.assert_allclose(shown[:250], trigger(exact) if trigger else exact, rtol=2**-23)
        assert not shown[250:].any()


def test_predict_shows_the_rows_asked_for_with_the_trigger(mesh):
    from badloss_jax.models import ModelSpec
    from badloss_jax.training.state import AdamW, create_state

    spec = ModelSpec("resnet_small", (8, 8, 1), 10, (8,), 1)
    state = create_state(spec, AdamW(), 0, mesh)
    images = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 1), np.uint8)
    trigger, rows = make_trigger("patch", (8, 8, 1)), np.array([3, 22, 7, 0])
    stamped = np.round(trigger(images.astype(np.float32) / 255) * 255).astype(np.uint8)
    expected = classifier.predict(spec, state, stamped, 5, mesh)[rows]
    np.testing.assert_array_equal(classifier.predict(spec, state, images, 5, mesh, rows, trigger), expected)
