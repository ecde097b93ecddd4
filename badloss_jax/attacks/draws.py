"""All that is drawn for a manifest, from one seed: target classes, victims, overlaps of triggers, and the probes.

Every draw has a random stream of its own, so that another attack, or another count, moves no other draw.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from badloss_jax.attacks import ATTACKS
from badloss_jax.attacks.plan import AttackPlan, Manifest
from badloss_jax.core.errors import UsageError
from badloss_jax.core.seeding import derived_seed, generator


def draw_manifest(
    settings: Mapping[str, Any],
    labels: Int[np.ndarray, "N"],
    num_classes: int,
    image_shape: tuple[int, int, int],
    seed: int,
) -> Manifest:
    """Draws target classes and victims (BaDLoss, section 5.1): no image twice, one target class an attack.

    Attacks that change labels take images of other classes than their target; clean-label attacks take images of their
    target class, and `ratio` is a share of that class. Targets differ while there are classes enough, and an attack has
    the same one with or without the others (of which a fixed target moves the drawn ones).

    Args:
      settings: `config.attacks`.
      labels: int [N], the true labels.
      num_classes: K.
      image_shape: (H, W, C).
      seed: of all that is drawn.

    Returns:
      The manifest, its attacks in the order of `names`; at scale 0 it has none.

    Raises:
      UsageError: more poison asked for than there are images, naming both numbers; a target that is no class.
    """
    names: tuple[str, ...] = ()
    if settings["scale"]:
        names = tuple(settings["names"])
    class_sizes = np.bincount(labels, minlength=num_classes)
    targets = _choose_targets(settings, class_sizes, names, num_classes, seed)

    free = np.ones(len(labels), bool)
    plans = {}
    # Clean-label attacks come first: only their target class will do for them.
    for name in sorted(names, key=lambda name: not ATTACKS[name].clean_label):
        attack_seed = derived_seed(seed, "attack", name)
        victims = _draw_victims(name, settings, labels == targets[name], free, targets[name], attack_seed)
        free[victims] = False
        parameters = {key: float(settings[name][key]) for key in ATTACKS[name].parameters}
        plans[name] = AttackPlan(targets[name], attack_seed, tuple(int(i) for i in np.sort(victims)), parameters)

    plans = _overlap(plans, settings["overlap"], seed)
    return Manifest(len(labels), num_classes, image_shape, {name: plans[name] for name in names})


def choose_probes(manifest: Manifest, count: int, seed: int, contaminated: float = 0.0) -> Int[np.ndarray, "P"]:
    """Draws P clean example ids. Fewer probes of the same seed are a subset of more.

    Args:
      manifest: of the training set.
      count: P.
      seed: of the draw.
      contaminated: the share, from 0 to 1, that is drawn from the poison instead: probes that a careless defender
        trusts.

    Returns:
      int64 [P], sorted.

    Raises:
      UsageError: no clean example would be left beside the probes, or more of them are to be poisoned than there is
        poison, naming both numbers.
    """
    poison = manifest.poisoned_ids
    clean = np.setdiff1d(np.arange(manifest.num_examples), poison)
    if count >= len(clean):
        raise UsageError(
            f"probes.count = {count}, and {len(clean)} examples are clean: expected fewer probes than that"
        )
    # Only what is neither poison nor a probe tells how many clean images a defence removes.
    if count > len(clean) / 5:
        warnings.warn(
            f"probes.count = {count} of {len(clean)} clean examples: little is left to measure on", stacklevel=2
        )

    num_poisoned = round(contaminated * count)
    if num_poisoned > len(poison):
        raise UsageError(
            f"probes.contaminated = {contaminated} asks for {num_poisoned} poisoned probes, and {len(poison)} examples"
            " are poisoned"
        )

    # The first of a permutation, so that fewer probes are a subset of more.
    clean_probes = generator(seed, "probes").permutation(clean)[: count - num_poisoned]
    poisoned_probes = generator(seed, "contaminated probes").permutation(poison)[:num_poisoned]
    return np.sort(np.concatenate([clean_probes, poisoned_probes]))


# --- targets


def _choose_targets(
    settings: Mapping[str, Any],
    class_sizes: Int[np.ndarray, "K"],
    names: Sequence[str],
    num_classes: int,
    seed: int,
) -> dict[str, int]:
    """Returns the target class of every attack: the fixed one, or one that is drawn."""
    targets = {name: settings[name]["target"] for name in names}
    for name, target in targets.items():
        if target >= num_classes:
            raise UsageError(f"attacks.{name}.target = {target}: expected a class from 0 to {num_classes - 1}")

    order = generator(seed, "targets").permutation(num_classes)
    # Where every class is somebody's fixed target, drawn targets are shared.
    drawn = [int(target) for target in order if target not in targets.values()] or order.tolist()
    return targets | _draw_targets(settings, drawn, class_sizes, names)


def _draw_targets(
    settings: Mapping[str, Any],
    drawn: Sequence[int],
    class_sizes: Int[np.ndarray, "K"],
    names: Sequence[str],
) -> dict[str, int]:
    """Gives each attack without a fixed target the class at its place in `drawn`, or the next that is large enough."""
    # Places count all attacks there are, so an attack's class does not depend on which others take part.
    wish = {name: drawn[place % len(drawn)] for place, name in enumerate(ATTACKS)}
    targets = {}
    for name in names:
        least = settings[name].get("min_class", 0)
        fixed = settings[name]["target"]
        if fixed >= 0:
            if class_sizes[fixed] < least:
                raise UsageError(
                    f"attacks.{name}.target = {fixed} has {class_sizes[fixed]} images, and attacks.{name}.min_class ="
                    f" {least}"
                )
            continue

        others = {target for other, target in wish.items() if other != name}
        spare = [target for target in drawn if target not in others and class_sizes[target] >= least]
        large = [target for target in (wish[name], *spare, *drawn) if class_sizes[target] >= least]
        if not large:
            raise UsageError(
                f"attacks.{name}.min_class = {least}: the largest class has {class_sizes.max()} images, and none may be"
                " the target"
            )
        targets[name] = large[0]
    return targets


# --- victims


def _draw_victims(
    name: str,
    settings: Mapping[str, Any],
    of_target: Bool[np.ndarray, "N"],
    free: Bool[np.ndarray, "N"],
    target: int,
    attack_seed: int,
) -> Int[np.ndarray, "M"]:
    """Draws the ids that one attack poisons, from the `free` ones inside or outside of its target class."""
    ratio = settings["scale"] * settings[name]["ratio"]
    if ATTACKS[name].clean_label:
        count = round(ratio * of_target.sum())
        candidates = np.flatnonzero(free & of_target)
        where = f"of its target class {target}"
    else:
        count = round(ratio * len(of_target))
        candidates = np.flatnonzero(free & ~of_target)
        where = f"outside its target class {target}"

    count = max(count, settings[name].get("min_images", 0))
    if not 1 <= count <= len(candidates):
        raise UsageError(
            f"attacks.{name}.ratio = {ratio} asks for {count} images, and {len(candidates)} unpoisoned ones {where}"
            " are there; expected at least 1 and at most that many"
        )
    return generator(attack_seed, "victims").choice(candidates, count, replace=False)


def _overlap(plans: dict[str, AttackPlan], share: float, seed: int) -> dict[str, AttackPlan]:
    """Puts the trigger of another attack, drawn for each image, below that of so many of each attack's images."""
    if not share:
        return plans
    if len(plans) == 1:
        raise UsageError(f"attacks.overlap = {share} needs a second attack: attacks.names has {', '.join(plans)} alone")

    below: dict[str, list[int]] = {name: [] for name in plans}
    for name, plan in plans.items():
        draw = generator(seed, "overlap", name)
        others = [other for other in plans if other != name]
        count = round(share * len(plan.example_ids))
        for example_id in np.sort(draw.choice(plan.example_ids, count, replace=False)):
            other = others[draw.integers(len(others))]
            below[other].append(int(example_id))
    return {name: replace(plan, below_ids=tuple(sorted(below[name]))) for name, plan in plans.items()}
