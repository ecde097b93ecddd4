"""The regimes that scans are judged in poison what they say, and as much."""

import numpy as np
import pytest

from badloss_jax.benchmarks.gauntlet import REGIMES, draw_set
from badloss_jax.benchmarks.held_out import HELD_OUT
from badloss_jax.benchmarks.scan import ABOUT
from badloss_jax.config import load_config, override
from badloss_jax.core.errors import UsageError

SIX = "('patch','single_pix','blend_r','blend_p','sinusoid','frequency')"


@pytest.fixture(scope="module")
def config():
    return load_config("configs/digits.py", [f"--config.attacks.names={SIX}", "--config.probes.count=60",
                                               "--config.scoring.loss.k=55"])  # fmt: skip


@pytest.fixture(scope="module")
def clean(config):
    """The images of seed 1 as they are."""
    return draw_set(load_config("configs/digits.py", ["--config.attacks.scale=0"]), 1)


@pytest.mark.parametrize("name", [name for name in REGIMES if name != "probes-1000"])
def test_a_regime_poisons_what_it_says(config, clean, name):
    regime = REGIMES[name]
    one, again = draw_set(config, 1, regime), draw_set(config, 1, regime)
    np.testing.assert_array_equal(one.images, again.images)
    np.testing.assert_array_equal(one.labels, again.labels)
    assert one.images.dtype == np.uint8
    assert len(one.probe_ids) == (regime.probes or 60)
    assert (one.attack_of[one.probe_ids] == "").all()

    poisoned = one.attack_of != ""
    assert set(one.attack_of[poisoned]) == set(one.targets)
    for attack, targets in one.targets.items():
        assert set(one.labels[one.attack_of == attack]) <= set(targets)
    if regime.share > 0:
        assert poisoned.mean() == pytest.approx(regime.share, abs=1 / len(poisoned))
    if not regime.examples and regime.rarest == 1:
        # Nobody else is touched.
        np.testing.assert_array_equal(one.images[~poisoned], clean.images[~poisoned])
        np.testing.assert_array_equal(one.labels[~poisoned], clean.labels[~poisoned])
        assert (one.images[poisoned] != clean.images[poisoned]).any(axis=(1, 2, 3)).mean() > 0.9


def test_regimes_are_what_they_are_called(config):
    def of(name, seed=1):
        return draw_set(config, seed, REGIMES[name])

    assert len(set(of("distinct").targets.values())) == 6
    of_shared = sorted(of("shared").targets.values())
    assert max(of_shared.count(targets) for targets in of_shared) >= 3
    assert len({tuple(sorted(of("drawn", seed).targets.items())) for seed in range(3)}) == 3
    assert set(of("held-out").targets) == set(HELD_OUT)
    assert not of("clean").targets

    quarter = of("quarter")
    ((attack, (target,)),) = quarter.targets.items()
    assert (quarter.attack_of[quarter.labels == target] == attack).mean() == pytest.approx(0.25, abs=0.03)
    sizes = np.bincount(of("imbalanced").labels)
    assert sizes.min() < 0.25 * sizes.max()

    moved, before = of("all-to-all"), draw_set(load_config("configs/digits.py", ["--config.attacks.scale=0"]), 1)
    rows = moved.attack_of != ""
    np.testing.assert_array_equal(moved.labels[rows], (before.labels[rows] + 1) % 10)


@pytest.mark.parametrize("name", ["drawn", "shared"])
def test_a_target_is_large_enough_for_its_attack(config, clean, name):
    sizes = np.bincount(clean.labels)
    least = int(np.median(sizes)) + 1
    picky = override(config, [f"--config.attacks.sinusoid.min_class={least}"])
    targets = [draw_set(picky, seed, REGIMES[name]).targets["sinusoid"][0] for seed in range(6)]
    assert (sizes[targets] >= least).all()
    before = [draw_set(config, seed, REGIMES[name]).targets["sinusoid"][0] for seed in range(6)]
    assert (sizes[before] < least).any()


@pytest.mark.parametrize(
    ("setting", "regime", "told"),
    [
        ("manifest='given.json'", "drawn", "leave out one of them"),
        ("names='sinusoid'", "one", "needs an attack that changes labels"),
    ],
)
def test_a_config_that_a_regime_cannot_use(config, setting, regime, told):
    with pytest.raises(UsageError, match=told):
        draw_set(override(config.copy_and_resolve_references(), [f"--config.attacks.{setting}"]), 1, REGIMES[regime])


@pytest.mark.parametrize("name", HELD_OUT)
@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3)])
def test_held_out_triggers_are_slight_and_drawn_by_the_seed(rng, name, shape):
    images = rng.random((4, *shape), np.float32)
    before = images.copy()
    trigger = HELD_OUT[name](shape, 0)
    triggered = np.asarray(trigger(images))
    np.testing.assert_array_equal(images, before)
    assert triggered.shape == images.shape
    assert 0 <= triggered.min() <= triggered.max() <= 1
    assert 0.001 < np.abs(triggered - images).mean() < 0.3
    np.testing.assert_array_equal(HELD_OUT[name](shape, 0)(images), triggered)


def test_the_help_names_every_regime():
    words = ABOUT.replace(",", " ").replace("-100 ", "probes-100 ").replace("-1000 ", "probes-1000 ").split()
    assert set(REGIMES) <= set(words)
