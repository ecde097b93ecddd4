"""CIFAR-10 at the paper's settings, from a folder of images `{train,test}/<class>/*`.

Source: BaDLoss (Alex et al., ICLR 2025), section 5 and appendix. The poison ratios are those of the authors' program:
about 6 % of the images with these six attacks. The paper's mean ASR over all seven attacks is 7.98 %. `:quick` is
measured in `configs/results/README.md`; the paper's settings need a GPU and are not measured yet.

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
    if variant == "quick":  # 20,000 images and a small network; no augmentation, so that the attacks take
        config.data.train_examples = 20_000
        config.model.update(name="resnet_small", stages=(16, 32, 64), stem_stride=2)
        config.recording.epochs = 15
        config.retraining.update(epochs=15, augment="none")
    return config
