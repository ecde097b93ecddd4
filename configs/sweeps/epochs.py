"""How many epochs have to be recorded.

One recording a seed serves all settings, of which the first epochs are scored; nothing is retrained.

    badloss sweep --config configs/sweeps/epochs.py --workdir /tmp/epochs
"""

from ml_collections import ConfigDict

from badloss_jax.sweep import default_sweep


def get_config(variant: str = "") -> ConfigDict:
    sweep = default_sweep(variant)
    sweep.title = "BaDLoss by the number of recorded epochs"
    sweep.defenses = ("badloss", "badloss_logits", "badloss_ranked", "badloss_features", "badloss_combined")
    sweep.retrain = False
    sweep.axis = "epochs"
    sweep.settings = {str(epochs): {"scoring.epochs": epochs} for epochs in (3, 4, 5, 7, 10, 15)}
    return sweep
