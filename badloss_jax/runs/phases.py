"""The phases of one run, each of which makes an artefact or takes the one that is there."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from badloss_jax.attacks.manifest import Manifest
from badloss_jax.attacks.poisoning import apply_manifest
from badloss_jax.config import to_dict
from badloss_jax.core.environment import environment
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import NPZ_ERRORS, map_array, write_atomically
from badloss_jax.core.hashing import digest
from badloss_jax.core.processes import on_first
from badloss_jax.data import Dataset
from badloss_jax.defenses import DEFENSES, Cleansed, Context, Suspicion
from badloss_jax.defenses.context import Detection, Observed, decide
from badloss_jax.evaluation.classifier import evaluate
from badloss_jax.models import ModelSpec
from badloss_jax.report.gallery import choose_gallery, write_gallery
from badloss_jax.runs.artefacts import Artefacts
from badloss_jax.runs.trainer import Recording, Trainer, place_examples, recipe_of, spec_of
from badloss_jax.training.batch import Examples
from badloss_jax.training.loop import Recipe
from badloss_jax.training.passes import map_examples
from badloss_jax.training.saved_model import load_model, read_about, save_model, write_about
from badloss_jax.training.state import TrainState
from badloss_jax.training.step import make_observe_step
from badloss_jax.trajectories.store import TrajectoryStore

UNDEFENDED = "undefended"


@dataclass
class Phases:
    """What the phases of one run share, and the phases themselves."""

    config: ConfigDict
    workdir: Path
    artefacts: Artefacts
    mesh: Mesh
    dataset: Dataset
    manifest: Manifest
    probe_ids: np.ndarray
    trainer: Trainer
    seconds: dict[str, float]
    _number: int = 0
    _identities: dict[str, str] = field(default_factory=dict)  # of the models
    _used: dict[str, float] = field(default_factory=dict)  # by the defence at work: what took how many seconds
    _elsewhere: float = 0.0  # seconds that the defence at work waited for these

    def __post_init__(self) -> None:
        train, config = self.dataset.train, self.config
        self.poisoning = poisoning = apply_manifest(self.manifest, train.images, train.labels)
        self.labels, self.attack_of = poisoning.labels, self.manifest.attack_of()
        self.is_probe = np.isin(np.arange(len(self.labels)), self.probe_ids)
        self.data = place_examples(config, train, poisoning, self.mesh)
        self.spec = spec_of(config, self.dataset.image_shape, self.dataset.num_classes, config.model.name)
        # Everything that every phase stands on; how a phase trains is added to it.
        self.ground = (config.seed, train.fingerprint, self.manifest.digest, asdict(self.spec))
        settings = config.retraining
        self.recipe = recipe_of(config, settings.epochs, settings.epochs, settings.batch_size, settings.augment)
        defenses = [DEFENSES[name] for name in config.defenses.names]
        recording = bool(config.scoring.kinds) or any(defense.recorded for defense in defenses)
        controls = sum(control != "none" for control in config.controls)
        shown = (1 + len(settings.variants) + controls) * settings.enabled
        attacked = not settings.enabled and any(not defense.recorded for defense in defenses)
        self._trainings = (
            recording
            + shown
            + attacked
            + sum(DEFENSES[name].trainings(to_dict(config)["defenses"].get(name, {})) for name in config.defenses.names)
        )
        processes = jax.process_count()
        self.trainer.progress.note(
            f"{config.data.source}: {len(self.labels):,} training images {self.dataset.image_shape} in"
            f" {self.dataset.num_classes} classes, {len(poisoning.ids):,} poisoned by {len(self.manifest.attacks)}"
            f" attacks, {len(self.probe_ids)} probes; {self._trainings} training{'s' * (self._trainings != 1)} on"
            f" {self.mesh.size} {jax.default_backend()} device{'s' * (self.mesh.size > 1)}"
            + f" of {processes} processes"
            * (processes > 1)
        )

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Measures a phase's seconds."""
        started = time.monotonic()
        yield
        self.seconds[phase] = time.monotonic() - started

    def keep_gallery(self, distances: dict[str, np.ndarray]) -> None:
        """Keeps the images that the report shows."""
        gallery = choose_gallery(self.dataset.train, self.manifest, self.poisoning, distances, self.is_probe,
                                 self.config.report.gallery)  # fmt: skip
        write_gallery(self.workdir / "gallery.npz", gallery)

    @cached_property
    def recorded(self) -> tuple[TrajectoryStore, dict[str, Any]]:
        """The trajectories, and how good the network is that they are of; recorded unless that was done before."""
        recording = Recording.of(self.config, self.spec, self.ground)
        folder = self.artefacts.place("trajectories", "", recording.identity)
        training = partial(recording.train, self.trainer, self.data, self.labels, self.is_probe, folder)
        with self.artefacts.held(folder):
            recorded = on_first(lambda: recording.is_in(folder))
            epochs = recording.recipe.epochs
            about = self._model("recording", recording.identity, training, epochs, recorded=recorded)
        return TrajectoryStore.open(folder), about["evaluation"]

    def retrain(self, name: str, removed: np.ndarray) -> dict[str, Any]:
        """Trains from scratch on what is left, by the recipe that all of these models share."""
        kept = np.flatnonzero(~removed)
        identity = digest(*self.ground, asdict(self.recipe), kept.tolist())

        def training() -> TrainState:
            return self.trainer.train(name, identity, "retraining", self.config.seed, self.spec, self.recipe, self.data,
                                      kept)  # fmt: skip

        with self.artefacts.held(self.artefacts.place("models", name, identity)):
            return self._model(name, identity, training, self.config.retraining.epochs)["evaluation"]

    @cached_property
    def undefended(self) -> dict[str, Any]:
        """How good the network is that was trained on everything: the attacked one."""
        return self.retrain(UNDEFENDED, np.zeros(len(self.labels), bool))

    def defend(self, name: str) -> tuple[Detection | dict[str, Any], dict[str, float]]:
        """Lets a defence work, or takes what it found before.

        Returns:
          What it says of every example, or how good the network is that it trained; and what took how many seconds:
          the defence itself, and the artefacts that it stands on.
        """
        self.trainer.preemption.stop_if_reached()
        defense, self._used, self._elsewhere = DEFENSES[name], {}, 0.0
        settings = to_dict(self.config)["defenses"].get(name, {})
        recipe = None if defense.recorded else asdict(self.recipe)
        identity = digest("defense", name, *self.ground, recipe, self.probe_ids.tolist(), settings)
        trained: dict[str, str] = {}
        context = self._context(name, identity, trained)

        def work() -> Suspicion | Cleansed:
            found = defense.run(context, settings)
            if isinstance(found, Suspicion) and (wrong := _wrong(found, len(self.labels), len(self.probe_ids))):
                raise DataError(f"defence {name!r} returned {wrong}")
            return found

        outcome: Detection | dict[str, Any]
        if defense.cleanses:
            outcome, seconds = self._cleansed(name, identity, work)
        elif defense.recorded:
            started = time.monotonic()
            suspicion: Any = work()
            seconds = self._used | {name: time.monotonic() - started - self._elsewhere}
            outcome = decide(suspicion, self.config.rejection, self.probe_ids)
        else:
            suspicion, seconds = self._kept_suspicion(name, identity, work)
            outcome = decide(suspicion, self.config.rejection, self.probe_ids)
        for training, of_training in trained.items():
            self.trainer.finish(training, of_training)
        self.seconds[name] = seconds[name]
        return outcome, seconds

    def _cleansed(
        self, name: str, identity: str, work: Callable[[], Suspicion | Cleansed]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Keeps the network that a defence trains."""
        details: dict[str, Any] = {}

        def training() -> TrainState:
            cleansed = work()
            details.update(cleansed.details)
            return cleansed.state  # type: ignore[union-attr]

        with self.artefacts.held(self.artefacts.place("models", name, identity)):
            about = self._model(name, identity, training, self.recipe.epochs, details)
        seconds = about.get("seconds_of", {}) | {name: about["seconds"]}
        return about["evaluation"] | {"details": about.get("details", {})}, seconds

    def _kept_suspicion(
        self, name: str, identity: str, work: Callable[[], Suspicion | Cleansed]
    ) -> tuple[Suspicion, dict[str, float]]:
        """Keeps what a defence found."""
        path = self.artefacts.place("defenses", name, identity).with_suffix(".npz")
        with self.artefacts.held(path):
            if on_first(path.is_file):
                self.trainer.progress.note(f"{name}  done before")
                return _read_suspicion(path, identity, name, len(self.labels), len(self.probe_ids))
            self.trainer.progress.phase(name)
            started = time.monotonic()
            suspicion: Any = work()
            seconds = self._used | {name: time.monotonic() - started - self._elsewhere}
            on_first(lambda: _write_suspicion(path, identity, suspicion, seconds))
            self.trainer.progress.note(f"{name}  done in {seconds[name]:.1f} s")
            return suspicion, seconds

    def _context(self, defense: str, identity: str, trained: dict[str, str]) -> Context:
        def train(
            name: str, recipe: Recipe, *, ids: np.ndarray | None = None, data: Examples | None = None,
            spec: ModelSpec | None = None, initial: TrainState | None = None, given: Any = None,
        ) -> TrainState:  # fmt: skip
            data, full = self.data if data is None else data, f"{defense}/{name}"
            ids = np.arange(len(data)) if ids is None else ids
            trained[full] = digest(identity, name, repr(recipe), ids.tolist())
            self._count(full)
            return self.trainer.train(full, trained[full], full, self.config.seed, spec or self.spec, recipe, data, ids,
                                      initial=initial, given=given)  # fmt: skip

        config = self.config
        return Context(
            self.data, self.labels, self.probe_ids, self.dataset.num_classes, self.spec, self.recipe,
            config.scoring, config.seed, config.evaluation.batch_size, self.mesh, self.trainer.progress,
            trajectories=partial(self._use, "recording", lambda: self.recorded[0]),
            attacked=partial(self._use, UNDEFENDED, lambda: self._attacked[1]),
            observed=partial(self._use, UNDEFENDED, lambda: self._observed),
            train=train,
        )  # fmt: skip

    def _use(self, phase: str, artefact: Callable[[], Any]) -> Any:
        """Returns an artefact and notes that the defence at work stands on it."""
        started = time.monotonic()
        made = artefact()
        self._elsewhere += time.monotonic() - started
        self._used[phase] = self.seconds[phase]
        return made

    @property
    def _attacked(self) -> tuple[Path, TrainState]:
        """The undefended network, loaded anew, as its arrays may be used up, and its folder."""
        _ = self.undefended
        folder = self.artefacts.place("models", UNDEFENDED, self._identities[UNDEFENDED])
        return folder, load_model(folder, self.mesh)[1]

    @cached_property
    def _observed(self) -> Observed:
        folder, state = self._attacked
        folder = folder / "observed"
        with self.artefacts.held(folder):
            if not on_first((folder / "features.npy").is_file):
                step, size = make_observe_step(self.spec, self.mesh), self.config.evaluation.batch_size
                arrays = map_examples(step, self.data, np.arange(len(self.labels)), size, self.mesh, state)

                def write() -> None:
                    for name, array in zip(("logits", "features"), arrays, strict=True):
                        values = array.astype(np.float32)
                        write_atomically(folder / f"{name}.npy", partial(np.save, arr=values, allow_pickle=False))

                on_first(write)
        return Observed(map_array(folder / "logits.npy"), map_array(folder / "features.npy"))

    def _count(self, name: str) -> str:
        """Tells which training, or other long work, begins."""
        self._number += 1
        title = f"[{self._number}/{max(self._number, self._trainings)}] {name}"
        self.trainer.progress.phase(title)
        return title

    def _model(
        self, name: str, identity: str, training: Callable[[], TrainState], epochs: int,
        details: dict[str, Any] | None = None, recorded: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        """Trains, evaluates and saves a model under models/NAME, or takes what an earlier run of this left there."""
        self.trainer.preemption.stop_if_reached()
        folder = self.artefacts.place("models", name, identity)
        self._identities[name] = identity
        title = self._count(name) if details is None else name
        tested = digest(identity, self.dataset.test.fingerprint, to_dict(self.config)["evaluation"])
        about = on_first(lambda: read_about(folder))
        if about is not None and about["hash"] != identity:
            raise UsageError(
                f"{folder} was trained on other data, or by another version, than this run: choose another --workdir"
            )
        if about is None or not recorded:
            started = time.monotonic()
            state = training()
            evaluation = self._evaluate(name, state, epochs)
            seconds = self.trainer.seconds_before + time.monotonic() - started
            about = {"hash": identity, "tested": tested, "evaluation": evaluation, "seconds": seconds,
                     "environment": environment()}  # fmt: skip
            if details is not None:
                about |= {"seconds": seconds - self._elsewhere, "details": details, "seconds_of": self._used}
            save_model(folder, self.spec, state, about)
        elif about["tested"] != tested:
            self.trainer.progress.note(f"{title}  trained before, is tested again")
            evaluation = self._evaluate(name, load_model(folder, self.mesh)[1], epochs)
            about |= {"tested": tested, "evaluation": evaluation}
            write_about(folder, about)
        else:
            self.trainer.progress.note(f"{title}  done before")
        self.trainer.finish(name, identity)
        self.seconds[name] = about["seconds"]
        return about

    def _evaluate(self, name: str, state: TrainState, epochs: int) -> dict[str, Any]:
        """Measures a network, and hands the writers what it measured."""
        evaluation = evaluate(self.spec, state, self.dataset.test, self.manifest, self.config.evaluation, self.mesh)
        rates = {f"attack_success_rate/{k}": v for k, v in evaluation["attack_success_rate"].items()}
        self.trainer.write(name, {"clean_accuracy": evaluation["clean_accuracy"], **rates}, epochs - 1)
        return evaluation


def _write_suspicion(path: Path, identity: str, suspicion: Suspicion, seconds: Mapping[str, float]) -> None:
    about = json.dumps({"identity": identity, "seconds": dict(seconds), "details": dict(suspicion.details)})
    arrays = {"scores": np.asarray(suspicion.scores, np.float64), "about": np.frombuffer(about.encode(), np.uint8)}
    for name in ("probe_scores", "removed"):
        if getattr(suspicion, name) is not None:
            arrays[name] = np.asarray(getattr(suspicion, name))
    write_atomically(path, lambda aside: np.savez(aside, **arrays))  # type: ignore[arg-type]


def _wrong(suspicion: Suspicion, num_examples: int, num_probes: int) -> str:
    """Says which array of a suspicion is not what it should be; "" if all are."""
    for name, kinds, size in (("scores", "fiu", num_examples), ("probe_scores", "fiu", num_probes),
                              ("removed", "b", num_examples)):  # fmt: skip
        array = getattr(suspicion, name)
        if array is None and name != "scores":
            continue
        if array.dtype.kind not in kinds or array.shape != (size,) or not np.isfinite(array).all():
            what = "truth values" if kinds == "b" else "finite numbers"
            return f"{name}, {array.dtype} {array.shape}, that are not {size} {what}"
    return ""


def _read_suspicion(
    path: Path, identity: str, name: str, num_examples: int, num_probes: int
) -> tuple[Suspicion, dict[str, float]]:  # fmt: skip
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays.pop("about").tobytes())
        if about["identity"] != identity:
            raise ValueError("it belongs to other data, other settings or another version")
        suspicion = Suspicion(**arrays, details=dict(about["details"]))
        seconds = {phase: float(spent) for phase, spent in about["seconds"].items()}
        if wrong := _wrong(suspicion, num_examples, num_probes):
            raise ValueError(f"it has {wrong}")
        if name not in seconds:
            raise ValueError(f"it does not say how long {name} took")
        return suspicion, seconds
    except NPZ_ERRORS as error:
        raise DataError(f"{path} cannot be used: {error}; remove it to let the defence work again") from error
