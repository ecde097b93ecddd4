"""ImageNet-1k at the paper's settings, from a folder of images `{train,val}/<wnid>/*`.

Source: BaDLoss (Alex et al., ICLR 2025), section 5 and appendix: 224 px, five attacks, the authors' poison ratios. The
paper's mean ASR is 15.61 %. Not measured yet. All images in DIR are decoded into memory, 150 KB each, and copied to
every device: the whole of ImageNet is 193 GB, so DIR has to hold a part of it.

    badloss run --config configs/imagenet.py --config.data.dir=DIR --workdir /tmp/imagenet
"""

from ml_collections import ConfigDict

from badloss_jax.config import check_variant, default_config


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, ())
    config = default_config()
    config.data.update(source="image_folder", image_size=224)
    config.attacks.names = ("patch", "blend_r", "blend_p", "sinusoid", "frequency")
    config.attacks.patch.ratio = 0.001
    config.attacks.blend_r.update(ratio=0.0005, strength=0.15)
    config.attacks.blend_p.update(ratio=0.0002, strength=0.15)
    config.attacks.sinusoid.strength = 0.15
    config.attacks.frequency.update(ratio=0.001, magnitude=90.0)
    config.model.name = "resnet50"
    config.recording.update(batch_size=256, kinds=("ranked", "features"), feature_dim=32)
    config.scoring.kinds = ("loss", "ranked", "features", "combined")
    config.rejection.rules = ("fraction", "fraction@0.1", "alpha", "fdr")
    config.retraining.update(epochs=50, batch_size=256, augment="resized_crop_flip")
    kinds = ("loss", "features", "combined")
    config.retraining.variants = tuple(f"{kind}/{rule}" for kind in kinds for rule in ("fraction", "fraction@0.1"))
    config.evaluation.max_triggered = 2_000
    return config
