import numpy as np
import pytest

from badloss_jax.defenses import DEFENSES, baselines


def test_statistics_by_hand():
    losses = np.array([[4.0, 2.0, 0.0], [1.0, 1.0, 1.0]], np.float32)
    np.testing.assert_array_equal(baselines.mean_loss(losses), [2, 1])
    np.testing.assert_allclose(baselines.loss_variance(losses), [8 / 3, 0])
    margins = np.array([[-1, 2, -1, 3], [1, 1, 1, 1], [-1, -1, -1, -1], [-1, -2, -1, 4]], np.float32)
    np.testing.assert_array_equal(baselines.forgetting_events(margins), [1, 0, 4, 0])
    np.testing.assert_allclose(baselines.area_under_margin(margins), [0.75, 1, -1, 0])
    np.testing.assert_array_equal(baselines.first_learned_epoch(margins), [1, 0, 4, 3])


BASELINES = [name for name, defense in DEFENSES.items() if defense.recorded and not name.startswith("badloss")]


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_cost_nothing_beyond_the_recording(at_home, name):
    results = at_home(name, "--config.retraining.enabled=False")
    assert "undefended" not in results
    variant = results["variants"][f"{name}/fraction"]
    assert variant["cost"]["seconds_of"].keys() == {"recording", name}
    assert variant["recall"].keys() == {"patch"}
    assert 0 <= variant["detection"]["auroc"]["overall"] <= 1


def test_low_and_high_are_each_other_reversed(at_home):
    low, high = (at_home(f"mean_loss_{way}", "--config.retraining.enabled=False") for way in ("low", "high"))
    aurocs = [next(iter(found["variants"].values()))["detection"]["auroc"]["overall"] for found in (low, high)]
    assert sum(aurocs) == pytest.approx(1)
