"""The regimes that a scan is judged in: who poisons how much of what, with which triggers, beside how many probes.

A detector is as good as in its worst regime, and most are shown in one. Some of the triggers here were never looked at
while rules and weights were settled (`HELD_OUT`); they are not among the `ATTACKS` of a run for that reason.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict
from scipy import ndimage

from badloss_jax.attacks import ATTACKS
from badloss_jax.attacks.manifest import AttackPlan, Manifest, choose_probes
from badloss_jax.attacks.poisoning import apply_manifest, plan_trigger
from badloss_jax.attacks.trigger import ImageShape, Trigger
from badloss_jax.config import changed
from badloss_jax.core.errors import UsageError
from badloss_jax.core.seeding import derived_seed, generator
from badloss_jax.data import load_dataset
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
    images, labels = dataset.train.images, dataset.train.labels

    names = tuple(name.replace("/", "-") for name in dataset.class_names)
    if regime.attackers == "held-out":
        triggers = {name: make(dataset.image_shape, derived_seed(seed, name)) for name, make in HELD_OUT.items()}
        share = regime.share or max(settled.attacks[name].ratio for name in _changing_labels(settled))
        return _poisoned(images, labels, names, triggers, share, settled.probes.count, seed)
    if regime.targets == "all":
        (name,) = settled.attacks.names
        triggers = {name: plan_trigger(name, plan_poison(settled, dataset))}
        return _poisoned(images, labels, names, triggers, regime.share, settled.probes.count, seed, to_next=True)

    manifest = plan_poison(settled, dataset)
    if manifest.unoptimised:
        raise UsageError(f"attack {manifest.unoptimised[0]} has to be optimised first: leave it out by"
                         " --config.attacks.names")  # fmt: skip
    poisoning = apply_manifest(manifest, images, labels)
    images = np.array(images)
    images[poisoning.ids] = np.round(poisoning.triggered(poisoning.ids) * 255).astype(np.uint8)
    targets: dict[str, tuple[int, ...]] = {name: (plan.target,) for name, plan in manifest.attacks.items()}
    probes = choose_probes(manifest, settled.probes.count, seed)
    return PoisonedSet(images, poisoning.labels, manifest.attack_of(), targets, probes, names)


def _changing_labels(config: ConfigDict) -> list[str]:
    return [name for name in config.attacks.names if not ATTACKS[name].clean_label]


def _settled(config: ConfigDict, seed: int, regime: Regime) -> ConfigDict:
    """Returns the config of a regime; attacks that would have to be optimised first are left out."""
    if config.attacks.manifest:
        raise UsageError("attacks.manifest says who poisons what, and so does a regime: leave out one of them")
    if regime.attackers in ("one", "held-out") and not _changing_labels(config):
        raise UsageError(f"attacks.names = {tuple(config.attacks.names)}: this regime needs an attack that changes"
                         " labels, such as patch")  # fmt: skip
    draw = generator(seed, "regime")
    names = [name for name in config.attacks.names if not ATTACKS[name].optimised]
    settings: dict[str, Any] = {"seed": seed, "attacks.names": tuple(names)}
    if regime.probes:
        settings["probes.count"] = regime.probes
        # A scan has its own k; the config's may be too large for so few probes, and would be refused.
        settings |= {f"scoring.{kind}.k": 1 for kind in config.scoring.kinds}
    dataset = load_dataset(config.data, seed)
    classes, most = dataset.num_classes, len(dataset.train.labels)
    sizes = np.bincount(dataset.train.labels, minlength=classes)
    if regime.examples:
        settings["data.train_examples"] = min(int(draw.choice(regime.examples)) or most, most)
    if regime.attackers == "nobody":
        settings["attacks.scale"] = 0.0
    elif regime.attackers == "one":
        (name,) = draw.choice(_changing_labels(config), 1).tolist()
        settings["attacks.names"] = (name,)
        # A quarter of a class, poison included, is a third of what is clean in it.
        settings[f"attacks.{name}.ratio"] = regime.share or regime.of_class / (1 - regime.of_class) / classes
    if regime.targets == "drawn":
        targets = {name: int(draw.integers(classes)) for name in names}
    elif regime.targets == "shared":
        target = int(draw.integers(classes))
        targets = dict.fromkeys(draw.permutation(names)[:3].tolist(), target)
    else:
        targets = {}
    # A class that is too small for an attack is left to the config, which knows larger ones.
    settings |= {f"attacks.{name}.target": target for name, target in targets.items()
                 if sizes[target] >= config.attacks[name].get("min_class", 0)}  # fmt: skip
    return changed(config, settings)


def _imbalanced(labels: Int[np.ndarray, "N"], num_classes: int, rarest: float, seed: int) -> Int[np.ndarray, "M"]:
    """Chooses rows so that class sizes, in an order that is drawn, fall geometrically."""
    draw = generator(seed, "imbalanced")
    kept = []
    for place, label in enumerate(draw.permutation(num_classes).tolist()):
        rows = np.flatnonzero(labels == label)
        share = rarest ** (place / max(num_classes - 1, 1))
        kept.append(draw.choice(rows, max(1, round(share * len(rows))), replace=False))
    return np.sort(np.concatenate(kept))


def _poisoned(
    images: UInt8[np.ndarray, "N H W C"], labels: Int[np.ndarray, "N"], class_names: tuple[str, ...],
    triggers: Mapping[str, Trigger], share: float, num_probes: int, seed: int, *, to_next: bool = False,
) -> PoisonedSet:  # fmt: skip
    """Poisons by triggers that no manifest knows, or to labels that none can say."""
    count, classes = len(labels), len(class_names)
    images, after, free = np.array(images), labels.astype(np.int64), np.ones(count, bool)
    order, plans, targets = generator(seed, "targets").permutation(classes), {}, {}
    for number, (name, trigger) in enumerate(triggers.items()):
        target = int(order[number % classes])
        candidates = np.flatnonzero(free & (to_next | (labels != target)))
        ids = np.sort(generator(seed, "victims", name).choice(candidates, round(share * count), replace=False))
        images[ids] = np.round(np.asarray(trigger(images[ids].astype(np.float32) / 255)) * 255).astype(np.uint8)
        after[ids] = (labels[ids] + 1) % classes if to_next else target
        free[ids] = False
        plans[name] = AttackPlan(target, seed, tuple(ids.tolist()))
        targets[name] = tuple(range(classes)) if to_next else (target,)
    manifest = Manifest(count, classes, images.shape[1:], plans)
    probes = choose_probes(manifest, num_probes, seed)
    return PoisonedSet(images, after, manifest.attack_of(), targets, probes, class_names)


def warp(image_shape: ImageShape, seed: int, pixels: float = 1.0) -> Trigger:
    """Warps by a smooth random field, of so many pixels on average (WaNet, Nguyen and Tran 2021)."""
    height, width, _ = image_shape
    coarse = generator(seed, "warp").uniform(-1, 1, (2, 4, 4))
    field = np.stack([ndimage.zoom(axis, (height / 4, width / 4), order=3) for axis in coarse])
    field *= pixels / np.abs(field).mean()
    rows, cols = np.mgrid[:height, :width]
    places = np.stack([rows + field[0], cols + field[1]])

    def trigger(images: Float[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B H W C"]:
        moved = [
            np.stack([ndimage.map_coordinates(image[..., channel], places, order=1, mode="nearest")
                      for channel in range(image.shape[-1])], axis=-1)
            for image in images
        ]  # fmt: skip
        return np.stack(moved).astype(images.dtype)

    return trigger


def ramp(image_shape: ImageShape, seed: int, strength: float = 0.15) -> Trigger:
    """Brightens from the left, where nothing is added, to the right (SIG's ramp, Barni et al. 2019)."""
    rise = strength * np.linspace(0, 1, image_shape[1], dtype=np.float32)[None, :, None]
    return lambda images: np.clip(images + rise, 0, 1)


def lattice(image_shape: ImageShape, seed: int, strength: float = 0.1, every: int = 4) -> Trigger:
    """Blends in white lines, one row and one column in so many."""
    lines = np.zeros(image_shape, np.float32)
    lines[::every] = lines[:, ::every] = 1
    return lambda images: (1 - strength * lines) * images + strength * lines


def inverted_pixels(image_shape: ImageShape, seed: int, count: int = 6) -> Trigger:
    """Inverts a few pixels, at places that are drawn."""
    height, width, _ = image_shape
    places = generator(seed, "inverted_pixels").choice(height * width, count, replace=False)
    mask = np.isin(np.arange(height * width), places).reshape(height, width, 1)
    return lambda images: np.where(mask, 1 - images, images)


HELD_OUT: dict[str, Callable[[ImageShape, int], Trigger]] = {
    "warp": warp, "ramp": ramp, "lattice": lattice, "inverted_pixels": inverted_pixels
}  # fmt: skip
