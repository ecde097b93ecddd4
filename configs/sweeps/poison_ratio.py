"""How much poison there is, from none to twice the ratios of the config.

Each ratio has its own recording and undefended network.

    badloss sweep --config configs/sweeps/poison_ratio.py --workdir /tmp/poison_ratio
"""

from ml_collections import ConfigDict

from badloss_jax.sweep import default_sweep


def get_config(variant: str = "") -> ConfigDict:
    sweep = default_sweep(variant)
    sweep.title = "BaDLoss by how much is poisoned"
    sweep.axis = "poison, multiple of the ratios"
    sweep.defenses = ("none", "badloss/fraction", "badloss_combined/fraction@0.1", "random")
    sweep.settings = {str(scale): {"attacks.scale": float(scale)} for scale in (0, 0.25, 0.5, 1, 2)}
    return sweep
