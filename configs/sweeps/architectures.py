"""Other networks: narrower, wider, and MobileNetV2 in place of a ResNet-8.

Each network has its own recording.

    badloss sweep --config configs/sweeps/architectures.py --workdir /tmp/architectures
"""

from ml_collections import ConfigDict

from badloss_jax.sweep import default_sweep


def get_config(variant: str = "") -> ConfigDict:
    sweep = default_sweep(variant)
    sweep.title = "BaDLoss by the network"
    sweep.axis = "network"
    sweep.defenses = ("none", "badloss/fraction", "badloss_combined/fraction@0.1", "random")
    sweep.settings = {
        "ResNet-8 8-16-32": {"model.stages": (8, 16, 32)},
        "ResNet-8 16-32-64": {"model.stages": (16, 32, 64)},
        "ResNet-8 32-64-128": {"model.stages": (32, 64, 128)},
        "MobileNetV2": {"model.name": "mobilenet_v2"},
    }
    return sweep
