"""What of the network's output to record, beside the free baselines.

One recording a seed serves all, and nothing is retrained.

    badloss sweep --config configs/sweeps/kind.py --workdir /tmp/kind
"""

from ml_collections import ConfigDict

from badloss_jax.sweep import default_sweep


def get_config(variant: str = "") -> ConfigDict:
    sweep = default_sweep(variant)
    sweep.title = "BaDLoss by the kind of trajectory, beside what needs no probes"
    sweep.retrain = False
    sweep.all_detectors = True
    sweep.defenses = ()
    return sweep
