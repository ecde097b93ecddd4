"""The poisoned view of a data set: new labels, and the triggered images of the poisoned ids alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from badloss_jax.attacks import ATTACKS, make_trigger
from badloss_jax.attacks.manifest import AttackPlan, Manifest
from badloss_jax.attacks.trigger import Trigger


@dataclass(frozen=True)
class Poisoning:
    """What a manifest changes in a training set.

    Attributes:
      labels: int32 [N], the labels that the victim trains on.
      ids: int64 [M], the poisoned examples.
      images: float32 [M, H, W, C] in [0, 1], their triggered images.
    """

    labels: Int[np.ndarray, "N"]
    ids: Int[np.ndarray, "M"]
    images: Float[np.ndarray, "M H W C"]


def apply_manifest(manifest: Manifest, images: UInt8[np.ndarray, "N H W C"], labels: Int[np.ndarray, "N"]) -> Poisoning:
    """Applies every attack of the manifest to its ids; the arrays given stay as they are."""
    new_labels, triggered = labels.astype(np.int32), []
    for name, plan in manifest.attacks.items():
        ids = list(plan.example_ids)
        new_labels[ids] = plan.target
        triggered.append(_trigger(name, manifest, plan)(images[ids].astype(np.float32) / 255))
    empty = np.zeros((0, *manifest.image_shape), np.float32)
    return Poisoning(new_labels, manifest.poisoned_ids, np.concatenate([empty, *triggered]))


def evaluation_triggers(manifest: Manifest, boost: float) -> Iterator[tuple[str, AttackPlan, bool, Trigger]]:
    """Yields (attack, plan, boosted, trigger) of every attack, and once more `boost` times as strong if it can be."""
    for name, plan in manifest.attacks.items():
        yield name, plan, False, _trigger(name, manifest, plan)
        stronger = ATTACKS[name].boosted
        if stronger is not None:
            yield name, plan, True, _trigger(name, manifest, plan, **{stronger: boost * plan.parameters[stronger]})


def _trigger(name: str, manifest: Manifest, plan: AttackPlan, **changed: Any) -> Trigger:
    return make_trigger(name, manifest.image_shape, plan.seed, **{**plan.parameters, **changed})
