"""The regimes that a scan is judged in: who poisons how much of what, with which triggers, beside how many probes.

A detector is as good as in its worst regime, and most are shown in one. Some of the triggers here were never looked at
while rules and weights were settled (`HELD_OUT`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from badloss_jax.attacks import ATTACKS
from badloss_jax.attacks.manifest import AttackPlan, Manifest, choose_probes
from badloss_jax.attacks.poisoning import apply_manifest, plan_trigger
from badloss_jax.attacks.trigger import Trigger
from badloss_jax.benchmarks.held_out import HELD_OUT
from badloss_jax.config import changed
from badloss_jax.core.errors import UsageError
from badloss_jax.core.seeding import derived_seed, generator
from badloss_jax.data import load_dataset
from badloss_jax.data.dataset import Dataset
from badloss_jax.runs.poison import plan_poison


@dataclass(frozen=True)
class Regime:
    """Who attacks, and what there is to go by.

    Attributes:
      attackers: "config", those of the config; "one" of them that changes labels, drawn by the seed; "held-out", those
        of `HELD_OUT`; or "nobody".
      targets: "config", that is, distinct unless the config fixes them; "drawn" with replacement; "shared", three of
        the attackers on one class; or "all", label y to y + 1.
      share: poisoned images of all, by each attacker; 0 leaves it to the config.
      of_class: or, of one attacker, poisoned images of its target class, of the average size.
      examples: numbers of images, of which the seed draws one; none leaves it to the config.
      probes: 0 leaves it to the config.
      rarest: images of the smallest class as a share of those of the largest.
    """

    attackers: str = "config"
    targets: str = "config"
    share: float = 0.0
    of_class: float = 0.0
    examples: tuple[int, ...] = ()
    probes: int = 0
    rarest: float = 1.0


REGIMES = {
    "distinct": Regime(),
    "drawn": Regime(targets="drawn"),
    "shared": Regime(targets="shared"),
    "held-out": Regime("held-out"),
    "few": Regime("one", share=0.003),
    "one": Regime("one", share=0.01),
    "many": Regime("one", share=0.06),
    "quarter": Regime("one", of_class=0.25, examples=(2000, 3500, 5000)),
    "all-to-all": Regime("one", "all", share=0.06),
    "imbalanced": Regime(rarest=0.1),
    "probes-50": Regime(probes=50),
    "probes-100": Regime(probes=100),
    "probes-1000": Regime(probes=1000),
    "clean": Regime("nobody", examples=(1000, 2000, 4000, 0)),
}


@dataclass(frozen=True)
class PoisonedSet:
    """A training set as its victim sees it, with the truth.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int [N].
      attack_of: str [N], "" of the clean.
      targets: the classes that each attack moves images to, or hides them in.
      probe_ids: int [P], clean ones.
      class_names: K, as folders can be called.
    """

    images: UInt8[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, "N"]
    attack_of: np.ndarray
    targets: dict[str, tuple[int, ...]]
    probe_ids: Int[np.ndarray, "P"]
    class_names: tuple[str, ...]


def draw_set(config: ConfigDict, seed: int, regime: Regime | None = None) -> PoisonedSet:
    """Draws images, poison and probes.

    Args:
      config: of the data set, the attacks and the number of probes.
      seed: of all that is drawn.
      regime: None takes the config as it is.

    Returns:
      The training set, with the truth.

    Raises:
      UsageError: an attack that has to be optimised first; more images, probes or poison than there are images; a
        regime of a config whose poison is planned already, or that has no attack for it.
    """
    settled = _settled(config, seed, regime) if regime else changed(config, {"seed": seed})
    regime = regime or Regime()

    dataset = load_dataset(settled.data, seed)
    if regime.rarest < 1:
        rows = _imbalanced(dataset.train.labels, dataset.num_classes, regime.rarest, seed)
        dataset = replace(dataset, train=dataset.train.view(rows, 0))

    # No manifest knows these triggers, or targets.
    if regime.attackers == "held-out":
        triggers = {name: make(dataset.image_shape, derived_seed(seed, name)) for name, make in HELD_OUT.items()}
        share = regime.share or max(settled.attacks[name].ratio for name in _changing_labels(settled))
        return _poisoned_by(triggers, share, dataset, settled)
    if regime.targets == "all":
        (name,) = settled.attacks.names
        triggers = {name: plan_trigger(name, plan_poison(settled, dataset))}
        return _poisoned_by(triggers, regime.share, dataset, settled, to_next=True)
    return _poisoned_as_planned(plan_poison(settled, dataset), dataset, settled)


def _settled(config: ConfigDict, seed: int, regime: Regime) -> ConfigDict:
    """Returns the config of a regime; attacks that would have to be optimised first are left out."""
    if config.attacks.manifest:
        raise UsageError("attacks.manifest says who poisons what, and so does a regime: leave out one of them")
    if regime.attackers in ("one", "held-out") and not _changing_labels(config):
        raise UsageError(
            f"attacks.names = {tuple(config.attacks.names)}: this regime needs an attack that changes"
            " labels, such as patch"
        )

    names = [name for name in config.attacks.names if not ATTACKS[name].optimised]
    settings: dict[str, Any] = {"seed": seed, "attacks.names": tuple(names)}
    if regime.probes:
        settings["probes.count"] = regime.probes
        # A scan has its own k; the config's may be too large for so few probes, and would be refused.
        settings |= {f"scoring.{kind}.k": 1 for kind in config.scoring.kinds}

    # One generator in this order: number of images, attacker, targets.
    draw = generator(seed, "regime")
    dataset = load_dataset(config.data, seed)
    if regime.examples:
        available = len(dataset.train.labels)
        settings["data.train_examples"] = min(int(draw.choice(regime.examples)) or available, available)
    settings |= _attacker_settings(config, regime, dataset.num_classes, draw)
    settings |= _target_settings(config, regime, names, dataset, draw)
    return changed(config, settings)


def _attacker_settings(
    config: ConfigDict, regime: Regime, num_classes: int, draw: np.random.Generator
) -> dict[str, Any]:
    """Returns the settings that say who attacks."""
    if regime.attackers == "nobody":
        return {"attacks.scale": 0.0}
    if regime.attackers != "one":
        return {}

    (name,) = draw.choice(_changing_labels(config), 1).tolist()
    # A quarter of a class, poison included, is a third of what is clean in it.
    ratio = regime.share or regime.of_class / (1 - regime.of_class) / num_classes
    return {"attacks.names": (name,), f"attacks.{name}.ratio": ratio}


def _target_settings(
    config: ConfigDict,
    regime: Regime,
    names: list[str],
    dataset: Dataset,
    draw: np.random.Generator,
) -> dict[str, Any]:
    """Returns the settings that say which class each attack is for, if the regime does."""
    classes = dataset.num_classes
    targets = {}
    if regime.targets == "drawn":
        targets = {name: int(draw.integers(classes)) for name in names}
    elif regime.targets == "shared":
        target = int(draw.integers(classes))
        targets = dict.fromkeys(draw.permutation(names)[:3].tolist(), target)

    # A class that is too small for an attack is left to the config, which knows larger ones.
    sizes = np.bincount(dataset.train.labels, minlength=classes)
    return {
        f"attacks.{name}.target": target
        for name, target in targets.items()
        if sizes[target] >= config.attacks[name].get("min_class", 0)
    }


def _changing_labels(config: ConfigDict) -> list[str]:
    return [name for name in config.attacks.names if not ATTACKS[name].clean_label]


def _imbalanced(labels: Int[np.ndarray, "N"], num_classes: int, rarest: float, seed: int) -> Int[np.ndarray, "M"]:
    """Chooses rows so that class sizes, in an order that is drawn, fall geometrically."""
    draw = generator(seed, "imbalanced")
    kept = []
    for number, label in enumerate(draw.permutation(num_classes).tolist()):
        rows = np.flatnonzero(labels == label)
        share = rarest ** (number / max(num_classes - 1, 1))
        kept.append(draw.choice(rows, max(1, round(share * len(rows))), replace=False))
    return np.sort(np.concatenate(kept))


def _poisoned_as_planned(manifest: Manifest, dataset: Dataset, config: ConfigDict) -> PoisonedSet:
    """Poisons as a run of the config would."""
    if manifest.unoptimised:
        raise UsageError(
            f"attack {manifest.unoptimised[0]} has to be optimised first: leave it out by --config.attacks.names"
        )

    poisoning = apply_manifest(manifest, dataset.train.images, dataset.train.labels)
    # On a copy, rounded as PNG files have it: uint8 is what the victim sees.
    images = np.array(dataset.train.images)
    images[poisoning.ids] = np.round(poisoning.triggered(poisoning.ids) * 255).astype(np.uint8)

    targets: dict[str, tuple[int, ...]] = {name: (plan.target,) for name, plan in manifest.attacks.items()}
    probes = choose_probes(manifest, config.probes.count, config.seed)
    return PoisonedSet(images, poisoning.labels, manifest.attack_of(), targets, probes, _folder_names(dataset))


def _poisoned_by(
    triggers: Mapping[str, Trigger],
    share: float,
    dataset: Dataset,
    config: ConfigDict,
    *,
    to_next: bool = False,
) -> PoisonedSet:
    """Poisons by triggers that no manifest knows, or to labels that none can say."""
    images = np.array(dataset.train.images)
    labels = dataset.train.labels
    poisoned_labels = labels.astype(np.int64)
    count = len(labels)
    classes = dataset.num_classes
    seed = config.seed

    # An image has one attack at most.
    is_free = np.ones(count, bool)
    order = generator(seed, "targets").permutation(classes)
    plans = {}
    targets = {}
    for number, (name, trigger) in enumerate(triggers.items()):
        target = int(order[number % classes])
        candidates = np.flatnonzero(is_free & (to_next | (labels != target)))
        ids = np.sort(generator(seed, "victims", name).choice(candidates, round(share * count), replace=False))
        images[ids] = np.round(np.asarray(trigger(images[ids].astype(np.float32) / 255)) * 255).astype(np.uint8)
        is_free[ids] = False

        plans[name] = AttackPlan(target, seed, tuple(ids.tolist()))
        if to_next:
            poisoned_labels[ids] = (labels[ids] + 1) % classes
            targets[name] = tuple(range(classes))
        else:
            poisoned_labels[ids] = target
            targets[name] = (target,)

    manifest = Manifest(count, classes, images.shape[1:], plans)
    probes = choose_probes(manifest, config.probes.count, seed)
    return PoisonedSet(images, poisoned_labels, manifest.attack_of(), targets, probes, _folder_names(dataset))


def _folder_names(dataset: Dataset) -> tuple[str, ...]:
    # Some data sets have a slash in the name of a class, such as "T-shirt/top".
    return tuple(name.replace("/", "-") for name in dataset.class_names)
