"""CIFAR-10 at the paper's settings, from a folder of images `{train,test}/<class>/*`.

Source: BaDLoss (Alex et al., ICLR 2025), section 5 and appendix. The poison ratios are those of the authors' program:
about 6 % of the images with these seven attacks. The paper's mean ASR over them is 7.98 %. These settings need a GPU,
compute in bfloat16 (`model.dtype`) and are not measured yet, nor is `:resnet18`, the same with a ResNet-18. `:quick` is
measured in `configs/results/README.md`: 20,000 images, a small network, float32, on one CPU core.

    badloss run --config configs/cifar10.py:quick --config.data.dir=DIR --workdir /tmp/cifar10
"""

from ml_collections import ConfigDict

from badloss_jax.config import check_variant, default_config


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, ("quick", "resnet18"))
    config = default_config()
    config.data.source = "image_folder"
    config.attacks.names = ("patch", "single_pix", "blend_r", "blend_p", "sinusoid", "frequency", "narcissus")
    config.model.update(name="resnet50", dtype="bfloat16")
    config.rejection.rules = ("fraction", "fraction@0.1", "alpha", "fdr")
    config.retraining.augment = "crop_flip"
    kinds = ("loss", "features", "combined")
    config.retraining.variants = tuple(f"{kind}/{rule}" for kind in kinds for rule in ("fraction", "fraction@0.1"))
    if variant == "resnet18":
        config.model.name = "resnet18"
    if variant == "quick":
        config.data.train_examples = 20_000
        # About as many images an attack as 1 % of all 50,000, at the paper's strengths. With half as many a small
        # network learns no trigger but the patch (mean ASR 35 %): there would be nothing to defend against.
        for name in ("patch", "single_pix", "blend_r", "blend_p", "frequency"):
            config.attacks[name].ratio = 0.02
        config.attacks.sinusoid.ratio = 0.2
        config.attacks.narcissus.ratio = 0.01
        config.model.update(name="resnet_small", dtype="float32", stages=(16, 32, 64), stem_stride=2)
        config.recording.update(epochs=15, batch_size=64)
        config.retraining.update(epochs=20, batch_size=64, augment="none")  # augmentation alone undoes weak triggers
        config.evaluation.max_triggered = 2_000
    return config
