"""CIFAR-10 at the paper's settings, from a folder of images `{train,test}/<class>/*`.

Source: BaDLoss (Alex et al., ICLR 2025), section 5 and appendix. The poison ratios are those of the authors' program:
about 6 % of the images with these six attacks. The paper's mean ASR over all seven attacks is 7.98 %. These settings
need a GPU and are not measured yet. `:quick` is measured in `configs/results/README.md`: 20,000 images, a small
network, about 18 minutes on two CPU cores.

    badloss run --config configs/cifar10.py:quick --config.data.dir=DIR --workdir /tmp/cifar10
"""

from ml_collections import ConfigDict

from badloss_jax.config import check_variant, default_config


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, ("quick",))
    config = default_config()
    config.data.source = "image_folder"
    config.model.name = "resnet50"
    config.retraining.augment = "crop_flip"
    config.retraining.variants = ("loss/fraction", "logits/fraction", "combined/fraction", "combined/alpha")
    if variant == "quick":
        config.data.train_examples = 20_000
        # About as many images an attack as 1 % of all 50,000, at the paper's strengths. With half as many a small
        # network learns no trigger but the patch (mean ASR 35 %): there would be nothing to defend against.
        for name in ("patch", "single_pix", "blend_r", "blend_p", "frequency"):
            config.attacks[name].ratio = 0.02
        config.attacks.sinusoid.ratio = 0.2
        config.model.update(name="resnet_small", stages=(16, 32, 64), stem_stride=2)
        config.recording.update(epochs=15, batch_size=64)
        config.retraining.update(epochs=30, batch_size=64, augment="none")  # augmentation alone undoes weak triggers
    return config
