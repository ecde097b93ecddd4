"""The poisoned view of a data set: new labels, and the triggered images of the poisoned ids alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from badloss_jax.attacks import ATTACKS, make_trigger
from badloss_jax.attacks.manifest import AttackPlan, Manifest
from badloss_jax.attacks.trigger import Trigger
from badloss_jax.seeding import generator


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
        triggered.append(plan_trigger(name, manifest)(images[ids].astype(np.float32) / 255))
    empty = np.zeros((0, *manifest.image_shape), np.float32)
    return Poisoning(new_labels, manifest.poisoned_ids, np.concatenate([empty, *triggered]))


def evaluation_triggers(manifest: Manifest, boost: float) -> Iterator[tuple[str, AttackPlan, str, Trigger]]:
    """Yields (attack, plan, version, trigger) of every attack.

    The versions: "plain"; "boosted", `boost` times as strong, if it can be; "scrambled" of an optimised trigger, whose
    values are permuted over pixels and channels: noise of the very same size, which should do nothing.
    """
    for name, plan in manifest.attacks.items():
        yield name, plan, "plain", plan_trigger(name, manifest)
        stronger = ATTACKS[name].boosted
        if stronger is not None:
            yield name, plan, "boosted", plan_trigger(name, manifest, **{stronger: boost * plan.parameters[stronger]})
        if ATTACKS[name].optimised:
            noise = generator(plan.seed, "scrambled").permutation(np.array(plan.perturbation))
            yield name, plan, "scrambled", plan_trigger(name, manifest, perturbation=noise)


def plan_trigger(name: str, manifest: Manifest, **changed: Any) -> Trigger:
    """Builds the trigger of an attack as the manifest has it, or with some of its parameters changed."""
    plan = manifest.attacks[name]
    given: dict[str, Any] = dict(plan.parameters)
    if ATTACKS[name].optimised:
        given["perturbation"] = np.array(plan.perturbation)
    return make_trigger(name, manifest.image_shape, plan.seed, **{**given, **changed})
