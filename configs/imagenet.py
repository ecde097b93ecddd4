"""ImageNet-1k at the paper's settings, from the official archives (in TARS; `badloss prepare --help` names them).

Source: BaDLoss (Alex et al., ICLR 2025), section 5 and appendix: 224 px, five attacks, the authors' poison ratios,
batches of 256, computed in bfloat16 (`model.dtype`). The paper's mean ASR is 15.61 %. Not measured yet. Images are
streamed: a few batches of them lie in memory at a time.

`:large_batch` records and retrains in batches of 4,096, and multiplies the learning rate by the square root of
4,096 / 256, the rule for Adam (Malladi et al., On the SDEs and scaling rules for adaptive gradient algorithms, NeurIPS
2022). That rule would change b1 and b2 as well, which is impossible for a factor of 16 (1 - 16 (1 - b1) is negative):
they stay. Not measured.

    badloss prepare imagenet2012 --from TARS --to DIR
    badloss run --config configs/imagenet.py --config.data.dir=DIR --workdir /tmp/imagenet

`badloss prepare --size 224` stores pixels, which are read far faster. A folder of images `{train,val}/<wnid>/*` is
prepared in the same way; read as it is, with `--config.data.source=image_folder`, it would have to fit the memory.
"""

import math

from ml_collections import ConfigDict

from badloss_jax.config import check_variant, default_config


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, ("large_batch",))
    config = default_config()
    config.data.update(source="tfds", image_size=224)
    config.attacks.names = ("patch", "blend_r", "blend_p", "sinusoid", "frequency")
    config.attacks.patch.ratio = 0.001
    config.attacks.blend_r.update(ratio=0.0005, strength=0.15)
    config.attacks.blend_p.update(ratio=0.0002, strength=0.15)
    config.attacks.sinusoid.strength = 0.15
    config.attacks.frequency.update(ratio=0.001, magnitude=90.0)
    config.model.update(name="resnet50", dtype="bfloat16")
    config.recording.update(batch_size=256, kinds=("ranked", "features"), feature_dim=32)
    config.scoring.kinds = ("loss", "ranked", "features", "combined")
    config.rejection.rules = ("fraction", "fraction@0.1", "alpha", "fdr")
    config.retraining.update(epochs=50, batch_size=256, augment="resized_crop_flip")
    kinds = ("loss", "features", "combined")
    config.retraining.variants = tuple(f"{kind}/{rule}" for kind in kinds for rule in ("fraction", "fraction@0.1"))
    config.evaluation.max_triggered = 2_000
    if variant == "large_batch":
        config.optimizer.learning_rate *= math.sqrt(4096 / config.recording.batch_size)
        config.recording.batch_size = config.retraining.batch_size = 4096
    return config
