"""The poison manifest: for each attack its target class, trigger parameters and the example ids that it poisons.

Attacks never write images. The manifest and the source reproduce a poisoned training set bit by bit.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from badloss_jax.attacks import ATTACKS
from badloss_jax.core.errors import BadlossError, DataError, UsageError
from badloss_jax.core.files import read_json
from badloss_jax.core.hashing import digest
from badloss_jax.core.seeding import derived_seed, generator

_FORMAT = "badloss_jax.manifest/1"


@dataclass(frozen=True)
class AttackPlan:
    """What one attacker does: the trigger (seed and parameters), the target class and the poisoned example ids.

    An optimised trigger's `perturbation` is in 1/255, flattened from [H, W, C]; the others have none. `below_ids` are
    examples of other attacks that carry this trigger, too, below their own: where triggers overlap.
    """

    target: int
    seed: int
    example_ids: tuple[int, ...]
    parameters: dict[str, float] = field(default_factory=dict)
    perturbation: tuple[int, ...] = ()
    below_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Who is poisoned with what, in a training set of `num_examples` images of `num_classes` classes."""

    num_examples: int
    num_classes: int
    image_shape: tuple[int, int, int]
    attacks: dict[str, AttackPlan]

    @property
    def digest(self) -> str:
        """Hashes all of it to 16 hexadecimal digits."""
        return digest(asdict(self))

    @property
    def poisoned_ids(self) -> Int[np.ndarray, "M"]:
        """All poisoned example ids, attack by attack."""
        return np.array([i for plan in self.attacks.values() for i in plan.example_ids], np.int64)

    def attack_of(self) -> np.ndarray:
        """Returns for each example the name of its attack, or "", as str [N]."""
        names = np.full(self.num_examples, "", dtype=object)
        for name, plan in self.attacks.items():
            names[list(plan.example_ids)] = name
        return names

    @property
    def unoptimised(self) -> tuple[str, ...]:
        """The attacks whose perturbation is not there yet."""
        return tuple(n for n, plan in self.attacks.items() if ATTACKS[n].optimised and not plan.perturbation)

    def with_perturbation(self, name: str, perturbation: Int[np.ndarray, "H W C"]) -> "Manifest":
        """Returns a copy in which this attack has its perturbation, in 1/255 (none, if that is empty)."""
        plan = replace(self.attacks[name], perturbation=tuple(int(value) for value in perturbation.ravel()))
        return replace(self, attacks=self.attacks | {name: plan})

    def to_json(self) -> str:
        """Returns what `read_manifest` reads."""
        return json.dumps({"format": _FORMAT, **asdict(self)})


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

    Raises:
      UsageError: more poison asked for than there are images, naming both numbers; a target that is no class.
    """
    names = tuple(settings["names"]) if settings["scale"] else ()
    targets = {name: settings[name]["target"] for name in names}
    for name, target in targets.items():
        if target >= num_classes:
            raise UsageError(f"attacks.{name}.target = {target}: expected a class from 0 to {num_classes - 1}")
    order = generator(seed, "targets").permutation(num_classes)
    drawn = [int(target) for target in order if target not in targets.values()] or order.tolist()
    targets |= _draw_targets(settings, drawn, np.bincount(labels, minlength=num_classes), names)
    free = np.ones(len(labels), bool)
    plans = {}
    for name in sorted(names, key=lambda name: not ATTACKS[name].clean_label):  # the choosy ones first
        target, attack_seed = targets[name], derived_seed(seed, "attack", name)
        of_target = labels == target
        clean_label = ATTACKS[name].clean_label
        ratio = settings["scale"] * settings[name]["ratio"]
        count = round(ratio * (of_target.sum() if clean_label else len(labels)))
        count = max(count, settings[name].get("min_images", 0))
        candidates = np.flatnonzero(free & (of_target if clean_label else ~of_target))
        if not 1 <= count <= len(candidates):
            where = f"of its target class {target}" if clean_label else f"outside its target class {target}"
            raise UsageError(
                f"attacks.{name}.ratio = {ratio} asks for {count} images, and {len(candidates)} unpoisoned ones {where}"
                " are there; expected at least 1 and at most that many"
            )
        chosen = generator(attack_seed, "victims").choice(candidates, count, replace=False)
        free[chosen] = False
        parameters = {key: float(settings[name][key]) for key in ATTACKS[name].parameters}
        plans[name] = AttackPlan(target, attack_seed, tuple(int(i) for i in np.sort(chosen)), parameters)
    plans = _overlap(plans, settings["overlap"], seed)
    return Manifest(len(labels), num_classes, image_shape, {name: plans[name] for name in names})


def _overlap(plans: dict[str, AttackPlan], share: float, seed: int) -> dict[str, AttackPlan]:
    """Puts the trigger of another attack, drawn for each image, below that of so many of each attack's images."""
    below: dict[str, list[int]] = {name: [] for name in plans}
    if share and len(plans) == 1:
        raise UsageError(f"attacks.overlap = {share} needs a second attack: attacks.names has {', '.join(plans)} alone")
    for name, plan in plans.items() if share else ():
        draw, others = generator(seed, "overlap", name), [other for other in plans if other != name]
        for example_id in np.sort(draw.choice(plan.example_ids, round(share * len(plan.example_ids)), replace=False)):
            below[others[draw.integers(len(others))]].append(int(example_id))
    return {name: replace(plan, below_ids=tuple(sorted(below[name]))) for name, plan in plans.items()}


def _draw_targets(
    settings: Mapping[str, Any], drawn: Sequence[int], sizes: Int[np.ndarray, "K"], names: Sequence[str]
) -> dict[str, int]:
    """Gives each attack without a fixed target the class at its place in `drawn`, or the next that is large enough."""
    wish = {name: drawn[place % len(drawn)] for place, name in enumerate(ATTACKS)}
    targets = {}
    for name in names:
        least = settings[name].get("min_class", 0)
        if settings[name]["target"] >= 0:
            if sizes[settings[name]["target"]] < least:
                raise UsageError(
                    f"attacks.{name}.target = {settings[name]['target']} has {sizes[settings[name]['target']]} images,"
                    f" and attacks.{name}.min_class = {least}"
                )
            continue
        others = {target for other, target in wish.items() if other != name}
        spare = [target for target in drawn if target not in others and sizes[target] >= least]
        large = [target for target in (wish[name], *spare, *drawn) if sizes[target] >= least]
        if not large:
            raise UsageError(
                f"attacks.{name}.min_class = {least}: the largest class has {sizes.max()} images, and none may be the"
                " target"
            )
        targets[name] = large[0]
    return targets


def choose_probes(manifest: Manifest, count: int, seed: int, contaminated: float = 0.0) -> Int[np.ndarray, "P"]:
    """Draws P clean example ids, sorted. Fewer probes of the same seed are a subset of more.

    Of these, the share `contaminated` is drawn from the poison instead: probes that a careless defender trusts.

    Raises:
      UsageError: no clean example would be left beside the probes, or more of them are to be poisoned than there is
        poison, naming both numbers.
    """
    clean = np.setdiff1d(np.arange(manifest.num_examples), manifest.poisoned_ids)
    if count >= len(clean):
        raise UsageError(
            f"probes.count = {count}, and {len(clean)} examples are clean: expected fewer probes than that"
        )
    if count > len(clean) / 5:
        warnings.warn(
            f"probes.count = {count} of {len(clean)} clean examples: little is left to measure on", stacklevel=2
        )
    poison, wrong = manifest.poisoned_ids, round(contaminated * count)
    if wrong > len(poison):
        raise UsageError(
            f"probes.contaminated = {contaminated} asks for {wrong} poisoned probes, and {len(poison)} examples are"
            " poisoned"
        )
    order = generator(seed, "probes").permutation(clean)[: count - wrong]
    trusted = generator(seed, "contaminated probes").permutation(poison)[:wrong]
    return np.sort(np.concatenate([order, trusted]))


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest that may come from anybody.

    Raises:
      UsageError: no such file.
      DataError: it is not a manifest, or names unknown attacks, impossible parameters or targets, or an id twice.
    """
    try:
        raw = read_json(path)
        if raw.get("format") != _FORMAT:
            raise DataError(f"its format is not {_FORMAT}")
        height, width, channels = (_integer(size) for size in raw["image_shape"])
        manifest = Manifest(
            num_examples=_integer(raw["num_examples"]),
            num_classes=_integer(raw["num_classes"]),
            image_shape=(height, width, channels),
            attacks={str(name): _plan(plan) for name, plan in raw["attacks"].items()},
        )
        _check(manifest)
    except FileNotFoundError as error:
        raise UsageError(f"manifest {path} does not exist") from error
    except (BadlossError, KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is not a usable manifest: {error}") from error
    return manifest


def load_manifest(path: Path, num_examples: int, num_classes: int, image_shape: tuple[int, int, int]) -> Manifest:
    """Reads a manifest for a training set of the given size.

    Raises:
      UsageError: no such file, or it was made for another data set (both sizes are named).
      DataError: see `read_manifest`.
    """
    manifest = read_manifest(path)
    ours = (num_examples, num_classes, tuple(image_shape))
    theirs = (manifest.num_examples, manifest.num_classes, manifest.image_shape)
    if ours != theirs:
        raise UsageError(
            f"attacks.manifest: {path} was made for (examples, classes, image shape) = {theirs}, and this training set"
            f" has {ours}"
        )
    return manifest


def _plan(raw: Mapping[str, Any]) -> AttackPlan:
    parameters = {str(key): float(value) for key, value in raw["parameters"].items()}
    ids = tuple(_integer(i) for i in raw["example_ids"])
    perturbation = tuple(raw.get("perturbation", ()))
    if not all(type(value) is int and -127 <= value <= 127 for value in perturbation):
        raise DataError("a perturbation holds something else than integers from -127 to 127")
    below = tuple(_integer(i) for i in raw.get("below_ids", ()))
    return AttackPlan(_integer(raw["target"]), _integer(raw["seed"]), ids, parameters, perturbation, below)


def _check(manifest: Manifest) -> None:
    for name, plan in manifest.attacks.items():
        if name not in ATTACKS:
            raise DataError(f"unknown attack {name!r}: expected one of {', '.join(ATTACKS)}")
        expected = ATTACKS[name].parameters
        if plan.parameters.keys() != set(expected):
            raise DataError(f"attack {name!r} has the parameters {sorted(plan.parameters)}, expected {list(expected)}")
        for key, value in plan.parameters.items():
            if not 0 < value <= (1 if key == "strength" else 1e6):
                raise DataError(f"attack {name!r} has {key} {value}")
        if not 0 <= plan.target < manifest.num_classes:
            raise DataError(f"attack {name!r} has target {plan.target} of {manifest.num_classes} classes")
        if not plan.example_ids:
            raise DataError(f"attack {name!r} poisons nothing")
        size = math.prod(manifest.image_shape) if ATTACKS[name].optimised else 0
        if len(plan.perturbation) != size:
            raise DataError(f"attack {name!r} has a perturbation of {len(plan.perturbation)} values, expected {size}")
    ids = manifest.poisoned_ids
    outside = ids[(ids < 0) | (ids >= manifest.num_examples)]
    if len(outside):
        raise DataError(f"example id {outside[0]} is outside 0 to {manifest.num_examples - 1}")
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        raise DataError(f"example id {unique[counts > 1][0]} is poisoned twice")
    below = [i for plan in manifest.attacks.values() for i in plan.below_ids]
    for plan in manifest.attacks.values():
        strangers = set(plan.below_ids) - (set(unique.tolist()) - set(plan.example_ids))
        if strangers or len(set(below)) < len(below):
            raise DataError(f"below_ids name {min(strangers, default='an id')} that no other attack poisons, or twice")


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise DataError(f"{value!r} is not a non-negative integer")
    return value
