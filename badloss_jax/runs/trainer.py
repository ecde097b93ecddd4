"""What the trainings of a run share: network, recipe and data by the config; checkpoints, metrics, resuming."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import ConfigDict

from badloss_jax.attacks.poisoning import Poisoning, unpoisoned
from badloss_jax.core.errors import NonFiniteLossError, UsageError
from badloss_jax.core.mesh import check_batch_size
from badloss_jax.core.preemption import Preemption
from badloss_jax.core.processes import first
from badloss_jax.core.progress import Progress
from badloss_jax.data import Split, is_streamed
from badloss_jax.models import ModelSpec
from badloss_jax.runs.artefacts import Artefacts
from badloss_jax.runs.workdir import add_resume, append_metrics, start_metrics
from badloss_jax.runs.writers import Writer
from badloss_jax.training.batch import Examples
from badloss_jax.training.checkpoint import Checkpoints, Position
from badloss_jax.training.footprint import check_train_step
from badloss_jax.training.loop import Passengers, Recipe, train
from badloss_jax.training.objective import MeanLoss
from badloss_jax.training.recorder import Recorder
from badloss_jax.training.resident import ResidentData
from badloss_jax.training.state import AdamW, TrainState
from badloss_jax.training.streamed import StreamedData
from badloss_jax.training.watchdog import Watchdog

BATCH_SIZES = {  # phase -> the setting that has its batch size
    "recording": "recording.batch_size",
    "retraining": "retraining.batch_size",
    "surrogate": "retraining.batch_size",
}


@dataclass(frozen=True)
class Training:
    """One training of a run.

    Attributes:
      name: of the model, such as "undefended" or "abl/flooding".
      identity: hash of everything that can change it.
      phase: names the streams of random numbers for order and augmentation.
      seed: of weights, order and augmentation.
      spec: the network.
      recipe: how it is trained.
    """

    name: str
    identity: str
    phase: str
    seed: int
    spec: ModelSpec
    recipe: Recipe


@dataclass
class Trainer:
    """Trains one network after the other, each from its last checkpoint, and tells how it goes.

    Attributes:
      config: of the run.
      workdir: its folder.
      artefacts: where checkpoints lie.
      mesh: the devices.
      progress: is told how far it is.
      writers: get the scalars of each epoch.
      preemption: says when to save and stop.
      seconds_before: that the training at hand took before it was taken up again.
    """

    config: ConfigDict
    workdir: Path
    artefacts: Artefacts
    mesh: Mesh
    progress: Progress
    writers: Sequence[Writer]
    preemption: Preemption
    seconds_before: float = 0.0
    _name: str = ""

    def train(
        self,
        training: Training,
        data: Examples,
        ids: Int[np.ndarray, "M"],
        *,
        recorder: Recorder | None = None,
        initial: TrainState | None = None,
        given: Any = None,
    ) -> TrainState:
        """Trains a network, whose checkpoints are kept as long as `finish` is not called.

        Args:
          training: which.
          data: the training set.
          ids: int [M], the examples of it that are trained on.
          recorder: records trajectories on the way.
          initial: where to begin in place of fresh weights; it is used up.
          given: what the recipe's objective asks for.

        Returns:
          The trained state.

        Raises:
          UsageError: a step cannot fit the devices' memory.
          NonFiniteLossError: a loss became NaN or infinite.
          PreemptedError: the run is to stop; all is saved.
        """
        kinds = recorder.step_kinds if recorder else None
        key = BATCH_SIZES.get(training.phase, f"the batch size of {training.name}")
        check_train_step(key, training.spec, training.recipe, kinds, self.mesh, initial, given)

        self._name = training.name  # for what is called back
        settings = self.config.checkpoint
        checkpoints = Checkpoints(
            self.artefacts.path_of("checkpoints", training.name, training.identity),
            training.identity,
            len(data),
            every_steps=settings.every_steps,
            every_minutes=settings.every_minutes,
            preemption=self.preemption,
        )

        with checkpoints, Watchdog(settings.stall_minutes) as watchdog:
            try:
                return train(
                    training.spec,
                    training.recipe,
                    data,
                    ids,
                    seed=training.seed,
                    phase=training.phase,
                    mesh=self.mesh,
                    initial=initial,
                    given=given,
                    passengers=Passengers(
                        recorder=recorder,
                        checkpoints=checkpoints,
                        watchdog=watchdog,
                        progress=self.progress,
                        on_begin=self._begin,
                        on_epoch=self._after_epoch,
                    ),
                )
            except NonFiniteLossError as error:
                if first():
                    append_metrics(self.workdir, {"model": training.name, "error": str(error)})
                raise

    def finish(self, name: str, identity: str) -> None:
        """Drops the checkpoints of a training whose outcome is saved.

        Args:
          name: of the training.
          identity: its hash.
        """
        if first():
            shutil.rmtree(self.artefacts.path_of("checkpoints", name, identity), ignore_errors=True)

    def write(self, name: str, values: dict[str, float], epoch: int) -> None:
        """Hands scalars to the writers.

        Args:
          name: of the model.
          values: tag -> value.
          epoch: that they belong to, from 0.
        """
        for writer in self.writers:
            writer.write(name, values, epoch)

    def _begin(self, begun: Position, steps_done: int) -> None:
        """Is called when a training begins, or goes on after so many steps."""
        self.seconds_before = begun.seconds
        if steps_done:
            self.progress.note(f"{self._name} goes on after step {steps_done:,}, in epoch {begun.epoch + 1}")
        if not first():
            return

        if steps_done:
            add_resume(self.workdir, self._name, steps_done)
        # What was written of the epochs that come now would else be there twice.
        start_metrics(self.workdir, self._name, begun.epoch)
        for writer in self.writers:
            writer.start(self._name, begun.epoch)

    def _after_epoch(self, record: dict[str, Any]) -> None:
        """Is called with the figures of each finished epoch."""
        if not first():
            return

        append_metrics(self.workdir, {"model": self._name} | record)
        epoch = record.pop("epoch")
        self.write(self._name, record, epoch)


def check_devices(config: ConfigDict, mesh: Mesh) -> None:
    """Checks that the devices can share the batches, and compute in the precision asked for.

    Args:
      config: of the run.
      mesh: the devices.

    Raises:
      UsageError: they cannot.
    """
    check_batch_size("recording.batch_size", config.recording.batch_size, mesh)
    check_batch_size("retraining.batch_size", config.retraining.batch_size, mesh)

    if config.model.dtype == "float64" and not jax.config.values["jax_enable_x64"]:
        raise UsageError("model.dtype = 'float64' needs the environment variable JAX_ENABLE_X64=1")


def place_examples(config: ConfigDict, train: Split, poisoning: Poisoning, mesh: Mesh) -> Examples:
    """Puts the training set on the devices, or at the beginning of its way there.

    Args:
      config: of the run, which says how images travel.
      train: the training set.
      poisoning: what of it is poisoned.
      mesh: the devices.

    Returns:
      The training set, with triggers on what is poisoned.
    """
    if is_streamed(train, config.data.input):
        return StreamedData(poisoning, mesh, config.data.workers, config.data.threads)

    # Triggers are put on once, and the poisoned images kept beside the others.
    triggered = poisoning.triggered(poisoning.ids)
    return ResidentData.place(mesh, poisoning.images, poisoning.labels, poisoning.ids, triggered)


def place_clean(config: ConfigDict, train: Split, mesh: Mesh) -> Examples:
    """Puts the training set on the devices as it is, with nothing poisoned.

    Args:
      config: of the run, which says how images travel.
      train: the training set.
      mesh: the devices.

    Returns:
      The training set.
    """
    return place_examples(config, train, unpoisoned(train.images, train.labels), mesh)


def spec_of(config: ConfigDict, image_shape: tuple[int, int, int], num_classes: int, name: str) -> ModelSpec:
    """Returns the network of a name, with the config's settings.

    Args:
      config: of the run.
      image_shape: (H, W, C).
      num_classes: K.
      name: of `MODELS`.
    """
    model = config.model
    return ModelSpec(
        name,
        image_shape,
        num_classes,
        tuple(model.stages),
        model.stem_stride,
        model.dtype,
        model.ghost_batch,
    )


def recipe_of(config: ConfigDict, epochs: int, schedule_epochs: int, batch_size: int, augment: str = "none") -> Recipe:
    """Returns how to train, with the optimiser of the config.

    Args:
      config: of the run.
      epochs: to train for.
      schedule_epochs: length of the cosine that these are the start of.
      batch_size: B.
      augment: of `AUGMENTATIONS`.
    """
    settings = config.optimizer
    adamw = AdamW(settings.weight_decay, settings.b1, settings.b2)
    objective = MeanLoss(settings.loss_clamp)
    return Recipe(epochs, schedule_epochs, batch_size, settings.learning_rate, adamw, objective, augment)
