"""Imagenette (10 classes of ImageNet) at the paper's settings, from the official folder `{train,val}/<wnid>/*`.

Source: BaDLoss (Alex et al., ICLR 2025), section 5 and appendix: 224 px, five attacks, the authors' poison ratios. The
paper's mean ASR is 19.17 %. These settings need a GPU, compute in bfloat16 (`model.dtype`) and are not measured yet.

    badloss run --config configs/imagenette.py --config.data.dir=DIR/imagenette2 --workdir /tmp/imagenette
"""

from ml_collections import ConfigDict

from badloss_jax.config import check_variant, default_config


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, ())
    config = default_config()
    config.data.update(source="image_folder", image_size=224)
    config.data.class_names = (
        "tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck",
        "gas pump", "golf ball", "parachute",
    )  # fmt: skip
    config.attacks.names = ("patch", "blend_r", "blend_p", "sinusoid", "frequency")
    config.attacks.patch.ratio = 0.05
    for name in ("blend_r", "blend_p", "sinusoid"):
        config.attacks[name].strength = 0.15
    config.attacks.frequency.magnitude = 90.0
    config.model.update(name="resnet50", dtype="bfloat16")
    config.recording.update(batch_size=256, schedule_epochs=250)
    config.rejection.rules = ("fraction", "fraction@0.1", "alpha", "fdr")
    config.retraining.update(epochs=250, batch_size=256, augment="resized_crop_flip")
    kinds = ("loss", "features", "combined")
    config.retraining.variants = tuple(f"{kind}/{rule}" for kind in kinds for rule in ("fraction", "fraction@0.1"))
    return config
