"""The training that trajectories are recorded of: its settings, its identity, its store."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from badloss_jax.core.errors import DataError
from badloss_jax.core.hashing import digest
from badloss_jax.core.mesh import pass_batch_size
from badloss_jax.core.processes import on_first
from badloss_jax.core.seeding import derived_seed
from badloss_jax.models import ModelSpec
from badloss_jax.runs.trainer import BATCH_SIZES, Trainer, Training, recipe_of
from badloss_jax.training.batch import Examples
from badloss_jax.training.footprint import check_sweep_step, check_train_step
from badloss_jax.training.loop import Recipe
from badloss_jax.training.recorder import Recorder, step_kinds, sweep_kinds
from badloss_jax.training.state import TrainState
from badloss_jax.trajectories.kinds import Kinds
from badloss_jax.trajectories.store import TrajectoryStore


@dataclass(frozen=True)
class Recording:
    """The training that trajectories are recorded of.

    Attributes:
      spec: the network.
      kinds: what is recorded.
      recipe: how it is trained.
      capture: "sweep" or "step".
      identity: hash of everything that could change the trajectories.
    """

    spec: ModelSpec
    kinds: Kinds
    recipe: Recipe
    capture: str
    identity: str

    @classmethod
    def of(cls, config: ConfigDict, spec: ModelSpec, ground: Sequence[Any]) -> "Recording":
        """Returns the recording of a config.

        Args:
          config: of the run.
          spec: the network.
          ground: the rest that trajectories depend on: seed, images, poison; JSON-able.
        """
        settings = config.recording
        kinds = Kinds(
            tuple(settings.kinds),
            spec.num_classes,
            spec.num_features,
            settings.feature_dim,
            settings.ranked_others,
            derived_seed(config.seed, "projection"),
        )
        recipe = recipe_of(config, settings.epochs, settings.schedule_epochs, settings.batch_size)
        # Not of how it is tested or shown, on which trajectories do not depend.
        identity = digest(*ground, asdict(recipe), asdict(kinds), settings.capture)
        return cls(spec, kinds, recipe, settings.capture, identity)

    def check_fits(self, config: ConfigDict, mesh: Mesh) -> None:
        """Checks, before anything is written, that the steps of training and sweep can fit the devices' memory.

        Args:
          config: of the run.
          mesh: the devices.

        Raises:
          UsageError: one cannot; setting, value and both numbers are named.
        """
        kinds = step_kinds(self.kinds, self.capture)
        check_train_step(BATCH_SIZES["recording"], self.spec, self.recipe, kinds, mesh)
        if self.capture == "sweep":
            size = pass_batch_size(config.evaluation.batch_size, mesh)
            check_sweep_step("evaluation.batch_size", self.spec, self.recipe, size, sweep_kinds(self.kinds), mesh)

    def train(
        self,
        trainer: Trainer,
        data: Examples,
        labels: Int[np.ndarray, "N"],
        is_probe: Bool[np.ndarray, "N"],
        folder: Path,
    ) -> TrainState:
        """Trains, and writes the trajectories of all examples to a store.

        Args:
          trainer: of the run.
          data: the training set.
          labels: int [N], as trained on.
          is_probe: bool [N].
          folder: of the store.

        Returns:
          The trained state.
        """

        def start_store() -> None:
            # Of a training that goes on, it has the epochs before the checkpoint.
            begun = self._store_in(folder)
            if begun:
                begun.mark_probes(np.flatnonzero(is_probe))
            else:
                layout = self.kinds.layout()
                TrajectoryStore.create(folder, self.identity, labels, is_probe, self.recipe.epochs, layout)

        # The recorders of all processes open the store that the first one makes.
        on_first(start_store)
        batch_size = pass_batch_size(trainer.config.evaluation.batch_size, trainer.mesh)
        recorder = Recorder(self.kinds, self.capture, TrajectoryStore.open(folder), trainer.mesh, batch_size)
        training = Training("recording", self.identity, "recording", trainer.config.seed, self.spec, self.recipe)
        return trainer.train(training, data, np.arange(len(labels)), recorder=recorder)

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds the whole of it."""
        store = self._store_in(folder)
        return store is not None and store.complete

    def _store_in(self, folder: Path) -> TrajectoryStore | None:
        """Returns what a folder holds of it; None if that is nothing, or of another recording."""
        try:
            store = TrajectoryStore.open(folder)
        except DataError:
            return None
        return store if store.recording_hash == self.identity else None
