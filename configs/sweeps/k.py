"""How many nearest probes count; the paper takes 50 of 250 for the loss.

One recording a seed serves all settings, and nothing is retrained.

    badloss sweep --config configs/sweeps/k.py --workdir /tmp/k
"""

from ml_collections import ConfigDict

from badloss_jax.sweep import default_sweep


def get_config(variant: str = "") -> ConfigDict:
    sweep = default_sweep(variant)
    sweep.title = "BaDLoss by the number of nearest probes"
    sweep.defenses = ("badloss", "badloss_logits", "badloss_ranked", "badloss_features", "badloss_combined")
    sweep.retrain = False
    sweep.axis = "k"
    kinds = ("loss", "logits", "ranked", "features")
    sweep.settings = {str(k): {f"scoring.{kind}.k": k for kind in kinds} for k in (1, 2, 3, 5, 10, 20, 50)}
    return sweep
