"""scikit-learn's digits: the whole experiment on a laptop, with no download.

About a minute on two CPU cores; `configs/results/README.md` has what it gave. `:step` records the training step's own
outputs instead of sweeping after each epoch: faster, and not equivalent.

    badloss run --config configs/digits.py --workdir /tmp/digits
"""

from ml_collections import ConfigDict

from badloss_jax.config import check_variant, default_config


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, ("step",))
    config = default_config()
    config.data.pad = 2  # 8x8 to 12x12: the patch needs a border to lie on
    config.attacks.patch.ratio = 0.02
    config.attacks.single_pix.ratio = 0.02
    config.attacks.blend_r.update(ratio=0.02, strength=0.15)
    config.attacks.blend_p.update(ratio=0.02, strength=0.10)
    config.attacks.sinusoid.update(ratio=0.3, strength=0.2, cycles=2.0)
    config.attacks.frequency.update(ratio=0.02, magnitude=120.0)
    config.probes.count = 100
    config.model.update(name="resnet_small", stages=(16, 32), stem_stride=1)
    config.recording.update(epochs=30, schedule_epochs=100, batch_size=32, feature_dim=16)
    config.scoring.loss.k = 20
    config.scoring.prob.k = 20
    for kind in ("logits", "ranked", "features"):
        config.scoring[kind].k = 2
    config.retraining.update(epochs=30, batch_size=32)
    if variant == "step":
        config.recording.capture = "step"
    return config
