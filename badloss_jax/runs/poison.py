"""The poison of a run: the manifest is drawn, or taken, and what an attack needs a network for is optimised on one."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from badloss_jax.attacks.manifest import Manifest, draw_manifest, load_manifest, read_manifest
from badloss_jax.attacks.narcissus import optimise_perturbation
from badloss_jax.attacks.poisoning import plan_trigger, unpoisoned
from badloss_jax.config import check_config, to_dict
from badloss_jax.core.errors import UsageError
from badloss_jax.core.files import read_json, write_text
from badloss_jax.core.hashing import digest
from badloss_jax.core.mesh import make_mesh, to_host
from badloss_jax.core.processes import on_first
from badloss_jax.core.progress import Progress
from badloss_jax.data import Dataset, load_dataset
from badloss_jax.models import ModelSpec
from badloss_jax.report.plots import save_triggers
from badloss_jax.report.results import header
from badloss_jax.runs.trainer import Trainer, check_devices, place_examples, recipe_of, spec_of
from badloss_jax.training.loop import Recipe, train
from badloss_jax.training.state import TrainState
from badloss_jax.training.step import network_of


def plan_poison(config: ConfigDict, dataset: Dataset) -> Manifest:
    """Draws the manifest, or takes the one that the config names; perturbations may still have to be optimised."""
    size = len(dataset.train.labels), dataset.num_classes, dataset.image_shape
    if config.attacks.manifest:
        return load_manifest(Path(config.attacks.manifest).expanduser(), *size)
    return draw_manifest(config.attacks, dataset.train.labels, *size[1:], config.seed)


def picture_attacks(config: ConfigDict, path: Path, progress: Progress, images: int = 3) -> dict[str, Any]:
    """Draws every attack's trigger on some of the images that it poisons, and returns what results.json begins with.

    Raises:
      UsageError, DataError: see `badloss_jax.core.errors`.
    """
    check_config(config)
    mesh = make_mesh()
    check_devices(config, mesh)
    dataset = load_dataset(config.data, config.seed)
    manifest = plan_poison(config, dataset)
    if not manifest.attacks:
        raise UsageError("attacks.names, or attacks.manifest, is empty: there is no trigger to show")

    def train_surrogate(attack: str, spec: ModelSpec, recipe: Recipe, seed: int) -> TrainState:
        progress.phase(f"surrogate for {attack}")
        clean = unpoisoned(dataset.train.images, dataset.train.labels)
        data = place_examples(config, dataset.train, clean, mesh)
        ids = np.arange(len(data))
        return train(spec, recipe, data, ids, seed=seed, phase="surrogate", mesh=mesh, progress=progress)

    manifest = optimise_triggers(manifest, config, dataset, train_surrogate)
    before, after = [], []
    for name, plan in manifest.attacks.items():
        spread = np.linspace(0, len(plan.example_ids) - 1, images).astype(int)  # sources come class by class
        before.append(dataset.train.images[np.array(plan.example_ids)[spread]])
        triggered = plan_trigger(name, manifest)(before[-1].astype(np.float32) / 255)
        after.append(np.round(triggered * 255).astype(np.uint8))
    targets = [f"{name}\n→ {dataset.class_names[plan.target]}" for name, plan in manifest.attacks.items()]
    save_triggers(path, targets, np.array(before), np.array(after))
    return header(config, manifest, dataset.class_names)


def optimise_triggers(
    manifest: Manifest,
    config: ConfigDict,
    dataset: Dataset,
    train_surrogate: Callable[[str, ModelSpec, Recipe, int], TrainState],
) -> Manifest:
    """Optimises the perturbation of each attack that needs one, on a network trained on the clean training set.

    `train_surrogate` is given the attack's name, the network, how to train it, and the seed.
    """
    for name in manifest.unoptimised:
        settings, plan = config.attacks[name], manifest.attacks[name]
        spec, recipe = _surrogate_of(name, config, dataset)
        state = train_surrogate(name, spec, recipe, plan.seed)
        here = jax.tree.map(lambda leaf: jnp.asarray(to_host(leaf)), state)
        of_target = dataset.train.images[dataset.train.labels == plan.target]

        given = network_of(spec, here), of_target, plan.target, settings.epsilon, settings.steps, plan.seed
        optimise = partial(lambda *given: optimise_perturbation(*given).tolist(), *given)
        manifest = manifest.with_perturbation(name, np.array(on_first(optimise)))
    return manifest


def _surrogate_of(attack: str, config: ConfigDict, dataset: Dataset) -> tuple[ModelSpec, Recipe]:
    settings = config.attacks[attack]
    epochs = settings.surrogate_epochs
    spec = spec_of(config, dataset.image_shape, dataset.num_classes, settings.surrogate)
    return spec, recipe_of(config, epochs, epochs, config.retraining.batch_size)


def keep_manifest(workdir: Path, planned: Manifest, dataset: Dataset, trainer: Trainer) -> tuple[Manifest, float]:
    """Returns the manifest with its perturbations, and the seconds these took; writes it, or takes what is there."""
    artefacts, config = trainer.artefacts, trainer.config
    surrogates = [
        (to_dict(config)["attacks"][name], *(asdict(part) for part in _surrogate_of(name, config, dataset)))
        for name in planned.unoptimised
    ]
    identity = digest(planned.digest, dataset.train.fingerprint, *surrogates)
    folder = artefacts.place("poison", "", identity) if artefacts.shared else workdir
    with artefacts.held(folder):
        manifest, seconds = _made_manifest(folder / "manifest.json", planned, dataset, trainer)
    if artefacts.shared:
        on_first(lambda: write_text(workdir / "manifest.json", manifest.to_json()))
    return manifest, seconds


def _made_manifest(path: Path, planned: Manifest, dataset: Dataset, trainer: Trainer) -> tuple[Manifest, float]:
    if on_first(path.is_file):
        stored = read_manifest(path)
        bare = stored
        for name in planned.unoptimised:
            bare = bare.with_perturbation(name, np.zeros(0, int)) if name in bare.attacks else bare
        if bare != planned:
            raise UsageError(
                f"{path} was drawn for other data or taken from another attacks.manifest: choose another --workdir"
            )
        return stored, _surrogate_seconds(path)
    train_set, started = dataset.train, time.monotonic()
    identities: dict[str, str] = {}

    def train_surrogate(attack: str, spec: ModelSpec, recipe: Recipe, seed: int) -> TrainState:
        trainer.progress.phase(f"surrogate for {attack}")
        clean = unpoisoned(train_set.images, train_set.labels)
        data = place_examples(trainer.config, dataset.train, clean, trainer.mesh)
        identities[attack] = digest("surrogate", seed, train_set.fingerprint, asdict(spec), asdict(recipe))
        return trainer.train(
            f"surrogate/{attack}", identities[attack], "surrogate", seed, spec, recipe, data, np.arange(len(data))
        )

    manifest = optimise_triggers(planned, trainer.config, dataset, train_surrogate)

    def write() -> None:
        if planned.unoptimised:
            seconds = trainer.seconds_before + time.monotonic() - started
            write_text(path.with_name("surrogate.json"), json.dumps({"seconds": seconds}))
        write_text(path, manifest.to_json())

    on_first(write)
    for attack, identity in identities.items():
        trainer.finish(f"surrogate/{attack}", identity)
    return manifest, _surrogate_seconds(path)


def _surrogate_seconds(manifest: Path) -> float:
    """Returns what the surrogates of the manifest took, 0 if none was trained in its folder."""
    try:
        return float(read_json(manifest.with_name("surrogate.json"))["seconds"])
    except (FileNotFoundError, KeyError):
        return 0.0
