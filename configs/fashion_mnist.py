"""Fashion-MNIST (Xiao et al. 2017) as gzipped IDX files, at the paper's CIFAR-10 settings; the paper has no figures.

The full set needs a GPU and is not measured yet. `:quick` is measured in `configs/results/README.md`: 20,000 images, a
small network, on one CPU core.

    badloss run --config configs/fashion_mnist.py:quick --workdir /tmp/fashion
"""

from ml_collections import ConfigDict

from badloss_jax.config import check_variant, default_config


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, ("quick",))
    config = default_config()
    config.data.source = "idx"
    config.data.dir = "/usr/share/datasets/fashion-mnist"  # Debian's package dataset-fashion-mnist
    config.data.class_names = (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
    )  # fmt: skip
    config.rejection.rules = ("fraction", "fraction@0.1", "alpha", "fdr")
    kinds = ("loss", "features", "combined")
    config.retraining.variants = tuple(f"{kind}/{rule}" for kind in kinds for rule in ("fraction", "fraction@0.1"))
    if variant == "quick":
        config.data.train_examples = 20_000
        config.model.update(name="resnet_small", stages=(16, 32, 64), stem_stride=2)
        config.recording.update(epochs=15, batch_size=64)
        config.retraining.update(epochs=20, batch_size=64)  # without augmentation, which alone undoes weak triggers
        config.evaluation.max_triggered = 2_000
    return config
