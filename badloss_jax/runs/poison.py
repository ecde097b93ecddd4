"""The poison of a run: the manifest is drawn, or taken, and what an attack needs a network for is optimised on one."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from badloss_jax.attacks.manifest import Manifest, draw_manifest, load_manifest, read_manifest
from badloss_jax.attacks.narcissus import optimise_perturbation
from badloss_jax.attacks.poisoning import plan_trigger
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
from badloss_jax.runs.trainer import Trainer, Training, check_devices, place_clean, recipe_of, spec_of
from badloss_jax.training.batch import Examples
from badloss_jax.training.loop import Passengers, Recipe, train
from badloss_jax.training.state import TrainState
from badloss_jax.training.step import network_of


@dataclass(frozen=True)
class Surrogate:
    """The network that an attack's perturbation is optimised on, trained on the clean training set.

    Attributes:
      attack: its name.
      spec: the network.
      recipe: how it is trained.
      seed: of its weights and order.
    """

    attack: str
    spec: ModelSpec
    recipe: Recipe
    seed: int

    @classmethod
    def of(cls, attack: str, config: ConfigDict, dataset: Dataset, seed: int) -> "Surrogate":
        """Returns that of a config's attack.

        Args:
          attack: its name.
          config: of the run.
          dataset: clean.
          seed: of the attack in the manifest.
        """
        settings = config.attacks[attack]
        epochs = settings.surrogate_epochs
        spec = spec_of(config, dataset.image_shape, dataset.num_classes, settings.surrogate)
        recipe = recipe_of(config, epochs, epochs, config.retraining.batch_size)
        return cls(attack, spec, recipe, seed)

    def training(self, fingerprint: str) -> Training:
        """Returns how a run trains it, on the training set of this fingerprint."""
        name = f"surrogate/{self.attack}"
        identity = digest("surrogate", self.seed, fingerprint, asdict(self.spec), asdict(self.recipe))
        return Training(name, identity, "surrogate", self.seed, self.spec, self.recipe)


def plan_poison(config: ConfigDict, dataset: Dataset) -> Manifest:
    """Draws the manifest, or takes the one that the config names; perturbations may still have to be optimised.

    Args:
      config: of the run.
      dataset: that is poisoned.

    Returns:
      The manifest, the same for the same config and data.

    Raises:
      UsageError: the manifest is of another data set, or more is to be poisoned than there is.
      DataError: the manifest is damaged.
    """
    labels = dataset.train.labels
    if config.attacks.manifest:
        path = Path(config.attacks.manifest).expanduser()
        return load_manifest(path, len(labels), dataset.num_classes, dataset.image_shape)
    return draw_manifest(config.attacks, labels, dataset.num_classes, dataset.image_shape, config.seed)


def picture_attacks(config: ConfigDict, path: Path, progress: Progress, images: int = 3) -> dict[str, Any]:
    """Draws every attack's trigger on some of the images that it poisons.

    Args:
      config: of the attacks.
      path: of the picture, .png.
      progress: tells how far a surrogate is.
      images: how many of each attack.

    Returns:
      What results.json begins with.

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

    manifest = optimise_triggers(manifest, config, dataset, mesh, progress, partial(_train_unkept, mesh, progress))
    clean = []
    triggered = []
    for name, plan in manifest.attacks.items():
        # Sources come class by class, so the images are taken from all along the list.
        spread = np.linspace(0, len(plan.example_ids) - 1, images).astype(int)
        chosen = dataset.train.images[np.array(plan.example_ids)[spread]]
        with_trigger = plan_trigger(name, manifest)(chosen.astype(np.float32) / 255)
        clean.append(chosen)
        triggered.append(np.round(with_trigger * 255).astype(np.uint8))

    titles = [f"{name}\n→ {dataset.class_names[plan.target]}" for name, plan in manifest.attacks.items()]
    save_triggers(path, titles, np.array(clean), np.array(triggered))
    return header(config, manifest, dataset.class_names)


def _train_unkept(mesh: Mesh, progress: Progress, surrogate: Surrogate, data: Examples) -> TrainState:
    """Trains a surrogate of which nothing is kept."""
    return train(
        surrogate.spec,
        surrogate.recipe,
        data,
        np.arange(len(data)),
        seed=surrogate.seed,
        phase="surrogate",
        mesh=mesh,
        passengers=Passengers(progress=progress),
    )


def optimise_triggers(
    manifest: Manifest,
    config: ConfigDict,
    dataset: Dataset,
    mesh: Mesh,
    progress: Progress,
    train_on: Callable[[Surrogate, Examples], TrainState],
) -> Manifest:
    """Optimises the perturbation of each attack that needs one, on a network trained on the clean training set.

    Args:
      manifest: with perturbations that are missing.
      config: of the run.
      dataset: clean.
      mesh: the devices.
      progress: is told which surrogate begins.
      train_on: trains a surrogate on the clean examples.

    Returns:
      The manifest with all perturbations.
    """
    for name in manifest.unoptimised:
        settings = config.attacks[name]
        plan = manifest.attacks[name]
        surrogate = Surrogate.of(name, config, dataset, plan.seed)
        progress.phase(f"surrogate for {name}")
        state = train_on(surrogate, place_clean(config, dataset.train, mesh))

        # The first process optimises alone, so the network has to lie on its own devices.
        here = jax.tree.map(lambda leaf: jnp.asarray(to_host(leaf)), state)
        of_target = dataset.train.images[dataset.train.labels == plan.target]
        optimise = partial(
            optimise_perturbation,
            network_of(surrogate.spec, here),
            of_target,
            plan.target,
            settings.epsilon,
            settings.steps,
            plan.seed,
        )
        perturbation = on_first(lambda optimise=optimise: optimise().tolist())  # type: ignore[misc]
        manifest = manifest.with_perturbation(name, np.array(perturbation))
    return manifest


def keep_manifest(workdir: Path, planned: Manifest, dataset: Dataset, trainer: Trainer) -> tuple[Manifest, float]:
    """Completes the manifest of a run and writes it, or takes the one that is there.

    Args:
      workdir: of the run.
      planned: the manifest, in which perturbations may be missing.
      dataset: clean.
      trainer: of the run, for surrogates.

    Returns:
      The manifest with its perturbations, and the seconds these took.

    Raises:
      UsageError: another manifest is there.
    """
    config = trainer.config
    surrogates = []
    for name in planned.unoptimised:
        surrogate = Surrogate.of(name, config, dataset, planned.attacks[name].seed)
        settings = to_dict(config)["attacks"][name]
        surrogates.append((settings, asdict(surrogate.spec), asdict(surrogate.recipe)))
    identity = digest(planned.digest, dataset.train.fingerprint, *surrogates)

    artefacts = trainer.artefacts
    folder = artefacts.path_of("poison", "", identity) if artefacts.shared else workdir
    with artefacts.held(folder):
        manifest, seconds = _made_manifest(folder / "manifest.json", planned, dataset, trainer)

    # A run's own folder says who is poisoned, wherever the manifest was made.
    if artefacts.shared:
        on_first(lambda: write_text(workdir / "manifest.json", manifest.to_json()))
    return manifest, seconds


def _made_manifest(path: Path, planned: Manifest, dataset: Dataset, trainer: Trainer) -> tuple[Manifest, float]:
    """Returns the manifest in the file, or optimises and writes it."""
    if on_first(path.is_file):
        return _stored_manifest(path, planned), _surrogate_seconds(path)

    started = time.monotonic()
    trainings: list[Training] = []
    train_kept = partial(_train_kept, trainer, dataset.train.fingerprint, trainings)
    manifest = optimise_triggers(planned, trainer.config, dataset, trainer.mesh, trainer.progress, train_kept)

    def write() -> None:
        # The manifest comes last: where it is, the seconds are.
        if planned.unoptimised:
            seconds = trainer.seconds_before + time.monotonic() - started
            write_text(path.with_name("surrogate.json"), json.dumps({"seconds": seconds}))
        write_text(path, manifest.to_json())

    on_first(write)
    for training in trainings:
        trainer.finish(training.name, training.identity)
    return manifest, _surrogate_seconds(path)


def _train_kept(
    trainer: Trainer, fingerprint: str, trainings: list[Training], surrogate: Surrogate, data: Examples
) -> TrainState:
    """Trains a surrogate with checkpoints, and adds the training to the list of those whose checkpoints are to go."""
    training = surrogate.training(fingerprint)
    trainings.append(training)
    return trainer.train(training, data, np.arange(len(data)))


def _stored_manifest(path: Path, planned: Manifest) -> Manifest:
    """Reads a manifest that is the planned one, up to perturbations that have been optimised since."""
    stored = read_manifest(path)
    bare = stored
    for name in planned.unoptimised:
        if name in bare.attacks:
            bare = bare.with_perturbation(name, np.zeros(0, int))
    if bare != planned:
        raise UsageError(
            f"{path} was drawn for other data or taken from another attacks.manifest: choose another --workdir"
        )
    return stored


def _surrogate_seconds(manifest: Path) -> float:
    """Returns what the surrogates of the manifest took, 0 if none was trained in its folder."""
    try:
        return float(read_json(manifest.with_name("surrogate.json"))["seconds"])
    except (FileNotFoundError, KeyError):
        return 0.0
