"""What is left of the attacks, and of the accuracy, when more or less is removed.

Four detectors, each retrained at six shares: meant for `:digits`, where a training takes seconds.

    badloss sweep --config configs/sweeps/removed_share.py:digits --workdir /tmp/removed_share
"""

from ml_collections import ConfigDict

from badloss_jax.sweep import default_sweep


def get_config(variant: str = "") -> ConfigDict:
    sweep = default_sweep(variant)
    sweep.title = "What is left of the attacks, by the share removed"
    rules = [f"fraction@{level}" for level in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)]
    names = ("badloss", "badloss_combined", "mean_loss_low", "spectral_signatures")
    sweep.defenses = ("none", "oracle", *(f"{name}/{rule}" for name in names for rule in rules))
    return sweep
