"""Defences at work in a run: what they are given, and how what they say, or the network that they train, is kept."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int

from badloss_jax.config import to_dict
from badloss_jax.core.errors import DataError
from badloss_jax.core.hashing import digest
from badloss_jax.core.processes import on_first
from badloss_jax.defenses import DEFENSES, Cleansed, Context, Defense, Suspicion
from badloss_jax.defenses.context import Detection, decide
from badloss_jax.models import ModelSpec
from badloss_jax.runs.phases import UNDEFENDED, Phases
from badloss_jax.runs.suspicion_file import read_suspicion, write_suspicion, wrong_array
from badloss_jax.runs.trained_models import ModelPlan
from badloss_jax.runs.trainer import Training
from badloss_jax.training.batch import Examples
from badloss_jax.training.loop import Recipe
from badloss_jax.training.state import TrainState


def defend(run: Phases, name: str) -> tuple[Detection | dict[str, Any], dict[str, float]]:
    """Lets a defence work, or takes what it found before.

    Args:
      run: whose training set it defends.
      name: of `DEFENSES`.

    Returns:
      What it says of every example, or how good the network is that it trained; and what took how many seconds: the
      defence itself, and the artefacts that it stands on.

    Raises:
      DataError: what it returns, or what was kept of it, is not what it should be.
    """
    run.trainer.preemption.stop_if_reached()
    defense = DEFENSES[name]
    settings = to_dict(run.config)["defenses"].get(name, {})
    # What a defence says of the recorded trajectories alone does not depend on how others are trained.
    recipe = None if defense.recorded else asdict(run.recipe)
    identity = digest("defense", name, *run.ground, recipe, run.probe_ids.tolist(), settings)
    case = _Case(run, name, defense, settings, identity)

    outcome: Detection | dict[str, Any]
    if defense.cleanses:
        outcome, seconds = case.cleanse()
    else:
        suspicion, seconds = case.suspect()
        outcome = decide(suspicion, run.config.rejection, run.probe_ids)

    # What came of them is saved by now.
    for training, of_training in case.trainings.items():
        run.trainer.finish(training, of_training)
    return outcome, seconds


@dataclass(frozen=True)
class _Case:
    """One defence in one run.

    Attributes:
      run: whose training set it defends.
      name: of the defence.
      defense: it.
      settings: its own.
      identity: hash of everything that what it says depends on.
      trainings: those that it asked for -> their identities.
    """

    run: Phases
    name: str
    defense: Defense
    settings: dict[str, Any]
    identity: str
    trainings: dict[str, str] = field(default_factory=dict)

    def cleanse(self) -> tuple[dict[str, Any], dict[str, float]]:
        """Trains a network by the defence, or takes it; returns how good it is, and what took how many seconds."""
        models = self.run.models
        details: dict[str, Any] = {}
        numbered = self.run.ledger.begun

        def training() -> TrainState:
            cleansed: Any = self._work()
            details.update(cleansed.details)
            return cleansed.state

        with self.run.artefacts.held(models.folder(self.name, self.identity)):
            record = models.obtain(ModelPlan(self.name, self.identity, self.run.recipe.epochs, training, details))
        if self.run.ledger.begun == numbered:
            self.run.ledger.skip(self.defense.trainings(self.settings))
        seconds = record.get("seconds_of", {}) | {self.name: record["seconds"]}
        return record["evaluation"] | {"details": record.get("details", {})}, seconds

    def suspect(self) -> tuple[Suspicion, dict[str, float]]:
        """Returns what the defence says of every example, and what took how many seconds."""
        if not self.defense.recorded:
            return self._kept_suspicion()

        # What needs the recorded trajectories alone costs next to nothing, and is not kept.
        with self.run.ledger(self.name) as entry:
            suspicion: Any = self._work()
        return suspicion, entry.used | {self.name: entry.seconds}

    def _kept_suspicion(self) -> tuple[Suspicion, dict[str, float]]:
        """Lets the defence work and keeps what it says in a file, or reads that."""
        run = self.run
        progress = run.trainer.progress
        path = run.artefacts.path_of("defenses", self.name, self.identity).with_suffix(".npz")
        with run.artefacts.held(path), run.ledger(self.name) as entry:
            if on_first(path.is_file):
                run.ledger.skip(self.defense.trainings(self.settings))
                progress.note(f"{self.name}  done before")
                num_examples = len(run.labels)
                num_probes = len(run.probe_ids)
                suspicion, seconds = read_suspicion(path, self.identity, self.name, num_examples, num_probes)
                entry.seconds = seconds[self.name]
                return suspicion, seconds

            progress.phase(self.name)
            suspicion = self._work()  # type: ignore[assignment]
            entry.seconds = entry.so_far()
            seconds = entry.used | {self.name: entry.seconds}
            on_first(lambda: write_suspicion(path, self.identity, suspicion, seconds))
            progress.note(f"{self.name}  done in {entry.seconds:.1f} s")
            return suspicion, seconds

    def _work(self) -> Suspicion | Cleansed:
        """Lets the defence work.

        Raises:
          DataError: what it returns is not what it should be.
        """
        outcome = self.defense.run(self._context(), self.settings)
        if isinstance(outcome, Suspicion):
            wrong = wrong_array(outcome, len(self.run.labels), len(self.run.probe_ids))
            if wrong:
                raise DataError(f"defence {self.name!r} returned {wrong}")
        return outcome

    def _context(self) -> Context:
        """Returns what the defence is given; artefacts of other phases are made when it asks for them."""
        run = self.run
        config = run.config
        return Context(
            data=run.data,
            labels=run.labels,
            probe_ids=run.probe_ids,
            num_classes=run.dataset.num_classes,
            spec=run.spec,
            recipe=run.recipe,
            scoring=config.scoring,
            seed=config.seed,
            batch_size=config.evaluation.batch_size,
            mesh=run.mesh,
            progress=run.trainer.progress,
            trajectories=partial(self._use, "recording", lambda: run.recorded[0]),
            attacked=partial(self._use, UNDEFENDED, lambda: run.load_undefended()[1]),
            observed=partial(self._use, UNDEFENDED, lambda: run.observed),
            train=self._train,
        )

    def _use(self, phase: str, artefact: Callable[[], Any]) -> Any:
        """Returns an artefact of another phase, on which the defence then stands."""
        with self.run.ledger.standing_on(phase):
            return artefact()

    def _train(
        self,
        name: str,
        recipe: Recipe,
        *,
        ids: Int[np.ndarray, "M"] | None = None,
        data: Examples | None = None,
        spec: ModelSpec | None = None,
        initial: TrainState | None = None,
        given: Any = None,
    ) -> TrainState:
        """Trains a network that the defence needs; see `badloss_jax.defenses.context.Train`."""
        run = self.run
        if data is None:
            data = run.data
        if ids is None:
            ids = np.arange(len(data))

        title = f"{self.name}/{name}"
        identity = digest(self.identity, name, repr(recipe), ids.tolist())
        self.trainings[title] = identity
        run.trainer.progress.phase(run.ledger.number(title))
        training = Training(title, identity, title, run.config.seed, spec or run.spec, recipe)
        return run.trainer.train(training, data, ids, initial=initial, given=given)
