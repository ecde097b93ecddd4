"""The poisoned view of a data set: new labels, and the triggered images of the poisoned ids alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from badloss_jax.attacks import ATTACKS, make_trigger
from badloss_jax.attacks.plan import AttackPlan, Manifest
from badloss_jax.attacks.trigger import Trigger
from badloss_jax.core.seeding import generator


@dataclass(frozen=True)
class Poisoning:
    """A training set as its victim sees it; triggers are put on images when these are asked for.

    Attributes:
      images: uint8 [N, H, W, C], the originals.
      labels: int32 [N], the labels that the victim trains on.
      ids: int64 [M], the poisoned examples.
      attack_of: int8 [N], the number of the attack that poisons an example, or -1.
      triggers: of the attacks.
      below: int8 [N], the number of another attack whose trigger lies below the example's own, or -1.
    """

    images: UInt8[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, "N"]
    ids: Int[np.ndarray, "M"]
    attack_of: Int[np.ndarray, "N"]
    triggers: tuple[Trigger, ...]
    below: Int[np.ndarray, "N"]

    def triggered(self, ids: Int[np.ndarray, "m"]) -> Float[np.ndarray, "m H W C"]:
        """Returns the triggered images of poisoned examples, float32 in [0, 1]."""
        ids = np.asarray(ids, np.int64)
        out = np.zeros((len(ids), *self.images.shape[1:]), np.float32)

        # What is not poisoned stays zero, and is not read: the images may have to be decoded.
        poisoned = np.flatnonzero(self.attack_of[ids] >= 0)
        out[poisoned] = self.images[ids[poisoned]].astype(np.float32) / 255

        # An example's own trigger comes last, on top of the other attack's.
        for layer in (self.below, self.attack_of):
            for number, trigger in enumerate(self.triggers):
                rows = np.flatnonzero(layer[ids] == number)
                if len(rows):
                    out[rows] = trigger(out[rows])
        return out


def apply_manifest(manifest: Manifest, images: UInt8[np.ndarray, "N H W C"], labels: Int[np.ndarray, "N"]) -> Poisoning:
    """Applies every attack of the manifest to its ids.

    Args:
      manifest: of these N examples.
      images: uint8 [N, H, W, C]; stay as they are.
      labels: int [N], the true ones; stay as they are.

    Returns:
      The training set as the victim sees it.
    """
    new_labels = labels.astype(np.int32)
    attack_of = np.full(len(labels), -1, np.int8)
    below = np.full(len(labels), -1, np.int8)
    for number, plan in enumerate(manifest.attacks.values()):
        ids = list(plan.example_ids)
        new_labels[ids] = plan.target
        attack_of[ids] = number
        below[list(plan.below_ids)] = number

    triggers = tuple(plan_trigger(name, manifest) for name in manifest.attacks)
    return Poisoning(images, new_labels, manifest.poisoned_ids, attack_of, triggers, below)


def unpoisoned(images: UInt8[np.ndarray, "N H W C"], labels: Int[np.ndarray, "N"]) -> Poisoning:
    """Returns a training set that nobody touched.

    Args:
      images: uint8 [N, H, W, C].
      labels: int [N].

    Returns:
      The same, without an attack.
    """
    nobody = np.full(len(labels), -1, np.int8)
    return Poisoning(images, labels.astype(np.int32), np.zeros(0, np.int64), nobody, (), nobody)


def evaluation_triggers(manifest: Manifest, boost: float) -> Iterator[tuple[str, AttackPlan, str, Trigger]]:
    """Yields (attack, plan, version, trigger) of every attack.

    The versions: "plain"; "boosted", `boost` times as strong, if it can be; "scrambled" of an optimised trigger, whose
    values are permuted over pixels and channels: noise of the very same size, which should do nothing.

    Args:
      manifest: of the attacks.
      boost: factor of the strength.

    Yields:
      The versions of one attack after those of the other, in the order of the manifest.
    """
    for name, plan in manifest.attacks.items():
        yield name, plan, "plain", plan_trigger(name, manifest)

        boosted = ATTACKS[name].boosted
        if boosted is not None:
            stronger = {boosted: boost * plan.parameters[boosted]}
            yield name, plan, "boosted", plan_trigger(name, manifest, **stronger)

        if ATTACKS[name].optimised:
            noise = generator(plan.seed, "scrambled").permutation(np.array(plan.perturbation))
            yield name, plan, "scrambled", plan_trigger(name, manifest, perturbation=noise)


def plan_trigger(name: str, manifest: Manifest, **changed: Any) -> Trigger:
    """Builds the trigger of an attack as the manifest has it, or with some of its parameters changed.

    Args:
      name: of an attack in the manifest.
      manifest: with its plan.
      **changed: parameters in place of the plan's.

    Returns:
      The trigger.

    Raises:
      UsageError: as `make_trigger`.
    """
    plan = manifest.attacks[name]
    parameters: dict[str, Any] = dict(plan.parameters)
    if ATTACKS[name].optimised:
        parameters["perturbation"] = np.array(plan.perturbation)
    parameters.update(changed)
    return make_trigger(name, manifest.image_shape, plan.seed, **parameters)
