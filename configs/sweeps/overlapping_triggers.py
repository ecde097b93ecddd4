"""What becomes of BaDLoss when poisoned images carry the trigger of another attack below their own.

Each share has its own recording and undefended network.

    badloss sweep --config configs/sweeps/overlapping_triggers.py --workdir /tmp/overlapping_triggers
"""

from ml_collections import ConfigDict

from badloss_jax.sweep import default_sweep


def get_config(variant: str = "") -> ConfigDict:
    sweep = default_sweep(variant)
    sweep.title = "BaDLoss by how many poisoned images carry two triggers"
    sweep.axis = "share with two triggers"
    sweep.defenses = ("none", "badloss/fraction", "badloss_combined/fraction@0.1", "oracle")
    sweep.settings = {str(share): {"attacks.overlap": share} for share in (0.0, 0.25, 0.5, 0.75)}
    return sweep
