"""The phases of one run, each of which makes an artefact or takes the one that is there; `defending` has defences."""

from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from badloss_jax.attacks.manifest import Manifest
from badloss_jax.attacks.poisoning import apply_manifest
from badloss_jax.config import to_dict
from badloss_jax.core.files import map_array, write_atomically
from badloss_jax.core.hashing import digest
from badloss_jax.core.processes import on_first
from badloss_jax.data import Dataset
from badloss_jax.defenses import DEFENSES
from badloss_jax.defenses.context import Observed
from badloss_jax.report.gallery import choose_gallery, write_gallery
from badloss_jax.runs.ledger import Ledger
from badloss_jax.runs.recording import Recording
from badloss_jax.runs.trained_models import ModelPlan, TrainedModels
from badloss_jax.runs.trainer import Trainer, Training, place_examples, recipe_of, spec_of
from badloss_jax.training.passes import map_examples
from badloss_jax.training.saved_model import load_model
from badloss_jax.training.state import TrainState
from badloss_jax.training.step import make_observe_step
from badloss_jax.trajectories.store import TrajectoryStore

UNDEFENDED = "undefended"


@dataclass
class Phases:
    """What the phases of one run share, and the phases themselves.

    Attributes:
      trainer: trains, with checkpoints; knows the run's config, folder, artefacts and devices.
      dataset: to train and to test on.
      manifest: who is poisoned with what.
      probe_ids: int64 [P], known to be clean.
      ledger: is told what takes how long.
    """

    trainer: Trainer
    dataset: Dataset
    manifest: Manifest
    probe_ids: Int[np.ndarray, "P"]
    ledger: Ledger

    def __post_init__(self) -> None:
        config = self.trainer.config
        train = self.dataset.train
        self.config = config
        self.workdir = self.trainer.workdir
        self.artefacts = self.trainer.artefacts
        self.mesh = self.trainer.mesh

        self.poisoning = apply_manifest(self.manifest, train.images, train.labels)
        self.labels = self.poisoning.labels
        self.attack_of = self.manifest.attack_of()
        self.is_probe = np.isin(np.arange(len(self.labels)), self.probe_ids)
        self.data = place_examples(config, train, self.poisoning, self.mesh)

        self.spec = spec_of(config, self.dataset.image_shape, self.dataset.num_classes, config.model.name)
        self.models = TrainedModels(self.trainer, self.ledger, self.spec, self.dataset, self.manifest)
        # Everything that every phase stands on; how a phase trains is added to it.
        self.ground = (config.seed, train.fingerprint, self.manifest.digest, asdict(self.spec))

        settings = config.retraining
        self.recipe = recipe_of(config, settings.epochs, settings.epochs, settings.batch_size, settings.augment)
        self.ledger.planned = planned_trainings(config)
        self.trainer.progress.note(self._introduction())

    def _introduction(self) -> str:
        """Says in a line what is about to be done."""
        trainings = _counted(self.ledger.planned, "training")
        devices = _counted(self.mesh.size, f"{jax.default_backend()} device")
        if jax.process_count() > 1:
            devices += f" of {jax.process_count()} processes"
        return (
            f"{self.config.data.source}: {len(self.labels):,} training images {self.dataset.image_shape} in"
            f" {self.dataset.num_classes} classes, {len(self.poisoning.ids):,} poisoned by"
            f" {len(self.manifest.attacks)} attacks, {len(self.probe_ids)} probes; {trainings} on {devices}"
        )

    def keep_gallery(self, distances: dict[str, np.ndarray]) -> None:
        """Keeps the images that the report shows: of each kind, kind -> distances [N], the highest ranked."""
        gallery = choose_gallery(
            self.dataset.train,
            self.manifest,
            self.poisoning,
            distances,
            self.is_probe,
            self.config.report.gallery,
        )
        write_gallery(self.workdir / "gallery.npz", gallery)

    @cached_property
    def recorded(self) -> tuple[TrajectoryStore, dict[str, Any]]:
        """The trajectories, and how good the network is that they are of; recorded unless that was done before."""
        recording = Recording.of(self.config, self.spec, self.ground)
        folder = self.artefacts.path_of("trajectories", "", recording.identity)
        training = partial(recording.train, self.trainer, self.data, self.labels, self.is_probe, folder)
        with self.artefacts.held(folder):
            complete = on_first(lambda: recording.is_in(folder))
            plan = ModelPlan("recording", recording.identity, recording.recipe.epochs, training)
            record = self.models.obtain(plan, complete=complete)
        return TrajectoryStore.open(folder), record["evaluation"]

    def retrain(self, name: str, removed: Bool[np.ndarray, "N"]) -> dict[str, Any]:
        """Trains from scratch on what is left, by the recipe that all of these models share.

        Args:
          name: of the model.
          removed: bool [N].

        Returns:
          How good it is, as `evaluate` says.
        """
        kept = np.flatnonzero(~removed)
        identity = self._identity_of_retrained(kept)

        def training() -> TrainState:
            training = Training(name, identity, "retraining", self.config.seed, self.spec, self.recipe)
            return self.trainer.train(training, self.data, kept)

        with self.artefacts.held(self.models.folder(name, identity)):
            plan = ModelPlan(name, identity, self.config.retraining.epochs, training)
            return self.models.obtain(plan)["evaluation"]

    def _identity_of_retrained(self, kept: Int[np.ndarray, "M"]) -> str:
        """Returns the identity of the model that is trained on these ids."""
        return digest(*self.ground, asdict(self.recipe), kept.tolist())

    @cached_property
    def undefended(self) -> dict[str, Any]:
        """How good the network is that was trained on everything: the attacked one."""
        return self.retrain(UNDEFENDED, np.zeros(len(self.labels), bool))

    def load_undefended(self) -> tuple[Path, TrainState]:
        """Returns the undefended network's folder, and the network loaded anew, as its arrays may be used up."""
        _ = self.undefended  # is trained now, if it was not before
        identity = self._identity_of_retrained(np.arange(len(self.labels)))
        folder = self.models.folder(UNDEFENDED, identity)
        return folder, load_model(folder, self.mesh)[1]

    @cached_property
    def observed(self) -> Observed:
        """What the undefended network says of the training set."""
        model, state = self.load_undefended()
        folder = model / "observed"
        with self.artefacts.held(folder):
            if not on_first((folder / "features.npy").is_file):
                self._observe(folder, state)
        return Observed(map_array(folder / "logits.npy"), map_array(folder / "features.npy"))

    def _observe(self, folder: Path, state: TrainState) -> None:
        """Writes what a network says of the training set, its features last: a folder that has them is whole."""
        step = make_observe_step(self.spec, self.mesh)
        ids = np.arange(len(self.labels))
        logits, features = map_examples(step, self.data, ids, self.config.evaluation.batch_size, self.mesh, state)

        def write() -> None:
            for name, array in (("logits", logits), ("features", features)):
                values = array.astype(np.float32)
                write_atomically(folder / f"{name}.npy", partial(np.save, arr=values, allow_pickle=False))

        on_first(write)


def _counted(count: int, noun: str) -> str:
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun}s"


def records(config: ConfigDict) -> bool:
    """Whether a run records trajectories: for its own kinds, or for a defence that scores them."""
    return bool(config.scoring.kinds) or any(DEFENSES[name].recorded for name in config.defenses.names)


def planned_trainings(config: ConfigDict) -> int:
    """Counts the trainings that a run makes, or finds done: the recording, defences' own, retraining, controls."""
    names = config.defenses.names
    settings = to_dict(config)["defenses"]
    trainings = sum(DEFENSES[name].trainings(settings.get(name, {})) for name in names)
    if records(config):
        trainings += 1
    if config.retraining.enabled:
        # "none" is the undefended network, which is trained whatever the controls.
        controls = [control for control in config.controls if control != "none"]
        trainings += 1 + len(config.retraining.variants) + len(controls)
    elif any(DEFENSES[name].attacked for name in names):
        trainings += 1  # the undefended network, for those that look at it
    return trainings
