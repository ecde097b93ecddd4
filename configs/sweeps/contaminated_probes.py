"""What becomes of BaDLoss when some of the probes, which it trusts, are poisoned.

One recording a seed serves all settings, and nothing is retrained.

    badloss sweep --config configs/sweeps/contaminated_probes.py --workdir /tmp/contaminated_probes
"""

from ml_collections import ConfigDict

from badloss_jax.sweep import default_sweep


def get_config(variant: str = "") -> ConfigDict:
    sweep = default_sweep(variant)
    sweep.title = "BaDLoss by how much of the probes is poisoned"
    sweep.defenses = ("badloss", "badloss_logits", "badloss_ranked", "badloss_features", "badloss_combined")
    sweep.retrain = False
    sweep.axis = "poisoned probes, share"
    sweep.settings = {str(share): {"probes.contaminated": share} for share in (0.0, 0.004, 0.02, 0.04, 0.1, 0.2)}
    return sweep
