"""The paper's comparison: every defence, all attacks at once, each alone, and none at all.

Source: BaDLoss (Alex et al., ICLR 2025), section 5, tables 1 and 2, at a size for two CPU cores. `:digits`, `:cifar10`
and `:gtsrb` are about other configs than Fashion-MNIST; `configs/results/README.md` has what was measured, and how long
it took. The whole is days on two cores: `--attacks all` runs the multi-attack setting alone.

    badloss sweep --config configs/sweeps/paper_table.py --attacks all --workdir /tmp/paper_table
"""

from ml_collections import ConfigDict

from badloss_jax.sweep import default_sweep


def get_config(variant: str = "") -> ConfigDict:
    sweep = default_sweep(variant)
    sweep.title = "Every defence, with all attacks at once, with each alone, and with none"
    names = ["patch", "single_pix", "blend_r", "blend_p", "sinusoid", "frequency"]
    names += ["narcissus"] if variant == "cifar10" else []
    sweep.attacks = {"all": tuple(names)} | {name: (name,) for name in names} | {"none": ()}
    sweep.defenses = (
        "none", "oracle", "random", "badloss/fraction", "badloss_combined/fraction@0.1",
        "badloss_combined/clusters", "badloss_features/fraction@0.1", "badloss_logits/fraction@0.1",
        "badloss_step/fraction",
        "spectral_signatures/own", "activation_clustering/own", "frequency_analysis/own", "abl/own",
        "neural_cleanse/own", "cognitive_distillation/own", "cbd", "pss",
    )  # fmt: skip
    sweep.all_detectors = True
    return sweep
