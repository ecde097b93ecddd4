"""The networks of a run: each is trained, evaluated and saved once, and taken from its folder after that."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from badloss_jax.attacks.manifest import Manifest
from badloss_jax.config import to_dict
from badloss_jax.core.environment import environment
from badloss_jax.core.errors import UsageError
from badloss_jax.core.hashing import digest
from badloss_jax.core.processes import on_first
from badloss_jax.data import Dataset
from badloss_jax.evaluation.classifier import evaluate
from badloss_jax.models import ModelSpec
from badloss_jax.runs.ledger import Entry, Ledger
from badloss_jax.runs.trainer import Trainer
from badloss_jax.training.saved_model import load_model, read_about, save_model, write_about
from badloss_jax.training.state import TrainState


@dataclass(frozen=True)
class ModelPlan:
    """A model that is made once, and taken from its folder after that.

    Attributes:
      name: of its folder.
      identity: hash of everything that it depends on.
      epochs: that it is trained for.
      training: trains it.
      details: of a defence that trains it, what else it found; filled by `training`.
    """

    name: str
    identity: str
    epochs: int
    training: Callable[[], TrainState]
    details: dict[str, Any] | None = None


@dataclass(frozen=True)
class TrainedModels:
    """Makes the networks of one run, or takes those that are there.

    Attributes:
      trainer: of the run.
      ledger: is told what takes how long.
      spec: of all these networks.
      dataset: to test on.
      manifest: who is poisoned with what.
    """

    trainer: Trainer
    ledger: Ledger
    spec: ModelSpec
    dataset: Dataset
    manifest: Manifest

    def folder(self, name: str, identity: str) -> Path:
        """Returns where a network lies.

        Args:
          name: of the model.
          identity: hash of everything that it depends on.
        """
        return self.trainer.artefacts.path_of("models", name, identity)

    def obtain(self, plan: ModelPlan, *, complete: bool = True) -> dict[str, Any]:
        """Trains, evaluates and saves a model under models/NAME, or takes what an earlier run of this left there.

        Args:
          plan: which.
          complete: whether all that belongs to it is there. What is not, as a recording whose trajectories were lost,
            is made again all the same.

        Returns:
          What about.json says of it.

        Raises:
          UsageError: the folder holds another model.
        """
        self.trainer.preemption.stop_if_reached()
        folder = self.folder(plan.name, plan.identity)
        title = plan.name
        # A network that a defence trains itself has no number: its trainings, of which it asks for several, have.
        if plan.details is None:
            title = self.ledger.number(plan.name)
            self.trainer.progress.phase(title)

        # Weights do not depend on how they are tested, so that only the test is made again where that changed.
        config = self.trainer.config
        tested = digest(plan.identity, self.dataset.test.fingerprint, to_dict(config)["evaluation"])
        record = on_first(lambda: read_about(folder))
        if record is not None and record["hash"] != plan.identity:
            raise UsageError(
                f"{folder} was trained on other data, or by another version, than this run: choose another --workdir"
            )

        with self.ledger(plan.name) as entry:
            if record is None or not complete:
                record = self._make(plan, folder, tested, entry)
            elif record["tested"] != tested:
                self.trainer.progress.note(f"{title}  trained before, is tested again")
                evaluation = self._evaluate(plan, load_model(folder, self.trainer.mesh)[1])
                record |= {"tested": tested, "evaluation": evaluation}
                write_about(folder, record)
            else:
                self.trainer.progress.note(f"{title}  done before")
            entry.seconds = record["seconds"]

        # All is saved, and nothing goes on from a checkpoint any more.
        self.trainer.finish(plan.name, plan.identity)
        return record

    def _make(self, plan: ModelPlan, folder: Path, tested: str, entry: Entry) -> dict[str, Any]:
        """Trains, evaluates and saves a model; returns what about.json says of it."""
        state = plan.training()
        evaluation = self._evaluate(plan, state)
        entry.before = self.trainer.seconds_before
        entry.seconds = entry.so_far()
        record = {
            "hash": plan.identity,
            "tested": tested,
            "evaluation": evaluation,
            "seconds": entry.seconds,
            "environment": environment(),
        }
        if plan.details is not None:
            record |= {"details": plan.details, "seconds_of": entry.used}

        save_model(folder, self.spec, state, record)
        return record

    def _evaluate(self, plan: ModelPlan, state: TrainState) -> dict[str, Any]:
        """Measures a network, and hands the writers what it measured."""
        trainer = self.trainer
        settings = trainer.config.evaluation
        evaluation = evaluate(self.spec, state, self.dataset.test, self.manifest, settings, trainer.mesh)

        scalars = {"clean_accuracy": evaluation["clean_accuracy"]}
        for attack, rate in evaluation["attack_success_rate"].items():
            scalars[f"attack_success_rate/{attack}"] = rate
        trainer.write(plan.name, scalars, plan.epochs - 1)
        return evaluation
