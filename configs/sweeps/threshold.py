"""Where to cut: shares of all images, and levels of the calibrated rules.

One recording a seed serves all, and nothing is retrained; `removed_share` does that.

    badloss sweep --config configs/sweeps/threshold.py --workdir /tmp/threshold
"""

from ml_collections import ConfigDict

from badloss_jax.sweep import default_sweep


def get_config(variant: str = "") -> ConfigDict:
    sweep = default_sweep(variant)
    sweep.title = "BaDLoss by what is removed"
    sweep.retrain = False
    rules = [f"fraction@{level}" for level in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)]
    rules += [f"alpha@{level}" for level in (0.01, 0.02, 0.05, 0.1, 0.2)] + ["fdr@0.05", "fdr@0.1", "fdr@0.3"]
    names = ("badloss", "badloss_logits", "badloss_ranked", "badloss_features", "badloss_combined")
    sweep.defenses = tuple(f"{name}/{rule}" for name in names for rule in rules)
    return sweep
