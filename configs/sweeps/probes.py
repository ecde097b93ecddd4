"""How many probes are needed; the paper has 250.

As many of them are nearest neighbours, in proportion, as of 250: a fifth for the loss, a fiftieth for the other kinds.
One recording a seed serves all settings, and nothing is retrained.

    badloss sweep --config configs/sweeps/probes.py --workdir /tmp/probes
"""

from ml_collections import ConfigDict

from badloss_jax.sweep import default_sweep


def get_config(variant: str = "") -> ConfigDict:
    sweep = default_sweep(variant)
    sweep.title = "BaDLoss by the number of probes"
    sweep.defenses = ("badloss", "badloss_logits", "badloss_ranked", "badloss_features", "badloss_combined")
    sweep.retrain = False
    sweep.axis = "probes"
    others = ("logits", "ranked", "features")
    sweep.settings = {
        str(count): {"probes.count": count, "scoring.loss.k": count // 5}
        | {f"scoring.{kind}.k": max(1, count // 50) for kind in others}
        for count in (25, 50, 100, 250, 500)
    }
    return sweep
