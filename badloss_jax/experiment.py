"""One run, from a config to a verdict: poison, record, score, reject, retrain, evaluate, report."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from badloss_jax.attacks.manifest import Manifest, choose_probes, draw_manifest, load_manifest, read_manifest
from badloss_jax.attacks.narcissus import optimise_perturbation
from badloss_jax.attacks.poisoning import apply_manifest, plan_trigger, unpoisoned
from badloss_jax.config import check_config, config_hash, differences, digest, settled, to_dict
from badloss_jax.data import Dataset, load_dataset
from badloss_jax.defenses.badloss import Detection, detect
from badloss_jax.defenses.controls import oracle_removal, random_removal
from badloss_jax.errors import DataError, UsageError
from badloss_jax.evaluation.classifier import defense_effectiveness, evaluate
from badloss_jax.files import read_json, write_text
from badloss_jax.models import ModelSpec
from badloss_jax.processes import agree, code_hash, on_first
from badloss_jax.progress import Progress
from badloss_jax.report.gallery import choose_gallery, write_gallery
from badloss_jax.report.page import write_reports
from badloss_jax.report.plots import save_triggers
from badloss_jax.report.results import environment, header, variant_entry, write_results, write_scores
from badloss_jax.report.writers import Writer, open_writers
from badloss_jax.seeding import derived_seed
from badloss_jax.trainer import Trainer, place_examples, recipe_of, spec_of
from badloss_jax.training.loop import Recipe, train
from badloss_jax.training.mesh import check_batch_size, make_mesh, round_up, to_host
from badloss_jax.training.preemption import Preemption
from badloss_jax.training.saved_model import read_about, save_model
from badloss_jax.training.state import TrainState
from badloss_jax.training.step import network_of
from badloss_jax.trajectories.kinds import Kinds
from badloss_jax.trajectories.recorder import Recorder
from badloss_jax.trajectories.store import TrajectoryStore
from badloss_jax.workdir import claim, read_config, read_resumes


def run_experiment(
    config: ConfigDict, workdir: Path, progress: Progress | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Runs the whole experiment in a folder, going on with what finished phases left there.

    Args:
      config: see `badloss_jax.config`.
      workdir: see `badloss_jax.workdir`.
      progress: tells how far it is; silent by default.
      mesh: of the devices to run on, all by default.

    Returns:
      What results.json holds.

    Raises:
      UsageError, DataError, NonFiniteLossError: see `badloss_jax.errors`; what was finished is kept.
    """
    check_config(config)
    mesh = mesh or make_mesh()
    _check_devices(config, mesh)
    started, progress = time.monotonic(), progress or Progress(None)
    dataset = load_dataset(config.data, config.seed)
    planned = plan_poison(config, dataset)
    probe_ids = choose_probes(planned, config.probes.count, config.seed)
    _check_agreement(config, dataset, planned)
    with Preemption() as preemption, _claimed(workdir, config) as writers:
        seconds = {"data": time.monotonic() - started}
        trainer = Trainer(config, workdir, mesh, progress, writers, preemption)
        manifest, spent = _keep_manifest(workdir / "manifest.json", planned, dataset, trainer)
        seconds |= {"surrogate": spent} if spent else {}
        about = header(config, manifest, dataset.class_names)
        run = _Run(config, workdir, mesh, dataset, manifest, probe_ids, trainer, seconds)

        store, recording_model = run.record()
        with run.timed("scoring"):
            detections, epochs = detect(store, probe_ids, config.scoring, config.rejection, mesh)

        undefended = run.retrain("undefended", np.zeros(manifest.num_examples, bool))
        variants = {}
        for name, removed, detection in _removals(config, detections, manifest, probe_ids):
            wanted = detection is None or name in config.retraining.variants
            retrained = run.retrain(name, removed) if wanted else None
            if retrained is not None:
                retrained = retrained | {"defense_effectiveness": defense_effectiveness(undefended, retrained)}
            variants[name] = variant_entry(removed, run.attack_of, run.is_probe, detection, retrained)

        results = about | {
            "seconds": run.seconds,
            "resumes": read_resumes(workdir),
            "epochs_kept": epochs.tolist(),
            "undefended": undefended,
            "recording_model": recording_model,
            "variants": variants,
        }

        def write() -> None:
            write_scores(workdir / "scores.parquet", run.labels, dataset.class_names, run.attack_of, run.is_probe,
                         detections, config.scoring.transform)  # fmt: skip
            run.keep_gallery({kind: detection.distances for kind, detection in detections.items()})
            write_results(workdir / "results.json", results)
            write_reports(workdir)

        on_first(write)
        return results


def rescore(workdir: Path, change: Callable[[ConfigDict], ConfigDict]) -> tuple[Path, dict[str, Any]]:
    """Scores the stored trajectories of a run with other `scoring` and `rejection` settings, without training.

    Returns:
      The folder `rescored/<hash>` with its own results.json, scores.parquet and report, and what results.json holds.

    Raises:
      UsageError: no run is there, or another setting is changed, which would need training.
      DataError: the trajectories are incomplete or damaged.
    """
    stored = read_config(workdir)
    original = config_hash(stored)
    stored.retraining.variants = ()  # nothing is retrained, so no kind must be there for it
    config = change(stored)
    changed = [group for group, value in to_dict(config).items() if value != to_dict(stored)[group]]
    needing_training = [group for group in changed if group not in ("scoring", "rejection")]
    if needing_training:
        raise UsageError(
            f"badloss score changes scoring.* and rejection.* only; {', '.join(needing_training)} would need training:"
            " use badloss run with another --workdir"
        )
    store = TrajectoryStore.open(workdir / "trajectories")
    if not store.complete:
        raise DataError(
            f"{store.folder} is not complete: its `badloss run` is still at work, or did not come to the end"
        )
    labels, probe_ids = store.labels(), store.probe_ids()
    is_probe = np.isin(np.arange(store.num_examples), probe_ids)
    manifest = read_manifest(workdir / "manifest.json")
    if manifest.num_examples != store.num_examples:
        raise DataError(
            f"manifest.json speaks of {manifest.num_examples} examples, trajectories/ of {store.num_examples}"
        )
    attack_of, class_names = manifest.attack_of(), _class_names(workdir, manifest)
    started = time.monotonic()
    detections, epochs = detect(store, probe_ids, config.scoring, config.rejection)
    results = header(config, manifest, class_names) | {
        "rescored_from": original,
        "changed": differences(to_dict(config), to_dict(stored)),
        "seconds": {"scoring": time.monotonic() - started},
        "epochs_kept": epochs.tolist(),
        "variants": {
            f"{kind}/{rule}": variant_entry(removed, attack_of, is_probe, detection)
            for kind, detection in detections.items()
            for rule, removed in detection.removed.items()
        },
    }
    folder = workdir / "rescored" / digest(to_dict(config)["scoring"], to_dict(config)["rejection"])
    write_scores(folder / "scores.parquet", labels, class_names, attack_of, is_probe, detections,
                 config.scoring.transform)  # fmt: skip
    write_results(folder / "results.json", results)
    write_reports(folder)
    return folder, results


@dataclass
class _Run:
    """What the phases of one run share."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    dataset: Dataset
    manifest: Manifest
    probe_ids: np.ndarray
    trainer: Trainer
    seconds: dict[str, float]
    _number: int = 0

    def __post_init__(self) -> None:
        train = self.dataset.train
        self.poisoning = poisoning = apply_manifest(self.manifest, train.images, train.labels)
        self.labels, self.attack_of = poisoning.labels, self.manifest.attack_of()
        self.is_probe = np.isin(np.arange(len(self.labels)), self.probe_ids)
        self.data = place_examples(self.config, self.dataset, poisoning, self.mesh)
        self.spec = spec_of(self.config, self.dataset, self.config.model.name)
        # Everything that every phase stands on; how a phase trains is added to it.
        self.ground = (self.config.seed, train.fingerprint, self.manifest.digest, asdict(self.spec))
        self._trainings = 2 + len(self.config.retraining.variants) + len(self.config.controls)
        processes = jax.process_count()
        self.trainer.progress.note(
            f"{self.config.data.source}: {len(self.labels):,} training images {self.dataset.image_shape} in"
            f" {self.dataset.num_classes} classes, {len(poisoning.ids):,} poisoned by {len(self.manifest.attacks)}"
            f" attacks, {len(self.probe_ids)} probes; {self._trainings} trainings on {self.mesh.size}"
            f" {jax.default_backend()} device{'s' * (self.mesh.size > 1)}"
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

    def record(self) -> tuple[TrajectoryStore, dict[str, Any]]:
        """Trains the recording model and stores the trajectories, unless that was done before."""
        settings = self.config.recording
        kinds = Kinds(tuple(settings.kinds), self.dataset.num_classes, self.spec.num_features, settings.feature_dim,
                      settings.ranked_others, derived_seed(self.config.seed, "projection"))  # fmt: skip
        recipe = recipe_of(self.config, settings.epochs, settings.schedule_epochs, settings.batch_size)
        identity = digest(*self.ground, asdict(recipe), asdict(kinds), settings.capture)
        folder = self.workdir / "trajectories"

        def start_store() -> None:
            TrajectoryStore.create(folder, identity, self.labels, self.is_probe, settings.epochs, kinds.layout())

        def training() -> TrainState:
            on_first(start_store)
            batch_size = round_up(self.config.evaluation.batch_size, self.mesh)
            recorder = Recorder(kinds, settings.capture, TrajectoryStore.open(folder), self.mesh, batch_size)
            return self._train("recording", identity, "recording", recipe, np.arange(len(self.labels)), recorder)

        recorded = on_first(lambda: _is_recorded(folder, identity))
        evaluation = self._model("recording", identity, training, settings.epochs, recorded)
        return TrajectoryStore.open(folder), evaluation

    def retrain(self, name: str, removed: np.ndarray) -> dict[str, Any]:
        """Trains from scratch on what is left, by the recipe that all of these models share."""
        settings = self.config.retraining
        recipe = recipe_of(self.config, settings.epochs, settings.epochs, settings.batch_size, settings.augment)
        kept = np.flatnonzero(~removed)
        identity = digest(*self.ground, asdict(recipe), kept.tolist())

        def training() -> TrainState:
            return self._train(name, identity, "retraining", recipe, kept)

        return self._model(name, identity, training, settings.epochs)

    def _train(
        self, name: str, identity: str, phase: str, recipe: Recipe, ids: np.ndarray, recorder: Recorder | None = None
    ) -> TrainState:
        return self.trainer.train(name, identity, phase, self.config.seed, self.spec, recipe, self.data, ids, recorder)

    def _model(
        self, name: str, identity: str, training: Callable[[], TrainState], epochs: int, recorded: bool = True
    ) -> dict[str, Any]:
        """Trains, evaluates and saves a model under models/NAME, or takes what an earlier run of this left there."""
        self.trainer.preemption.stop_if_reached()
        folder = self.workdir / "models" / name.replace("/", "-")
        self._number += 1
        title = f"[{self._number}/{self._trainings}] {name}"
        self.trainer.progress.phase(title)
        tested = digest(identity, self.dataset.test.fingerprint, to_dict(self.config)["evaluation"])
        about = on_first(lambda: read_about(folder))
        if about is not None and about["hash"] != identity:
            raise UsageError(
                f"{folder} was trained on other data, or by another version, than this run: choose another --workdir"
            )
        if about is None or not recorded or about["tested"] != tested:
            started = time.monotonic()
            state = training()
            evaluation = evaluate(self.spec, state, self.dataset.test, self.manifest, self.config.evaluation, self.mesh)
            rates = {f"attack_success_rate/{k}": v for k, v in evaluation["attack_success_rate"].items()}
            self.trainer.write(name, {"clean_accuracy": evaluation["clean_accuracy"], **rates}, epochs - 1)
            seconds = self.trainer.seconds_before + time.monotonic() - started
            about = {"hash": identity, "tested": tested, "evaluation": evaluation, "seconds": seconds,
                     "environment": environment()}  # fmt: skip
            save_model(folder, self.spec, state, about)
        else:
            self.trainer.progress.note(f"{title}  done before")
        self.trainer.finish(name)
        self.seconds[name] = about["seconds"]
        return about["evaluation"]


@contextmanager
def _claimed(workdir: Path, config: ConfigDict) -> Iterator[Sequence[Writer]]:
    """Holds the folder and opens the writers, in the first process; checks that all processes see the folder."""
    writers: list[Writer] = []
    with ExitStack() as stack:

        def claim_it() -> None:
            stack.enter_context(claim(workdir, config))
            writers.extend(stack.enter_context(open_writers(workdir, config)))

        on_first(claim_it)
        seen = "a run" if (workdir / "config.json").is_file() else "nothing"
        agree({f"what is in --workdir {workdir}, which has to be one folder that all processes share,": seen})
        yield writers


def _check_agreement(config: ConfigDict, dataset: Dataset, manifest: Manifest) -> None:
    """Raises UsageError, in every process, if some have other settings, code or data than the first."""
    agree(
        {f"config.{key}": str(value) for key, value in settled(config).items()}
        | {
            "the code of badloss_jax (a hash)": code_hash(),
            "the version of jax": jax.__version__,
            "the training images and labels (a hash)": dataset.train.fingerprint,
            "the test images and labels (a hash)": dataset.test.fingerprint,
            "the poison (a hash)": manifest.digest,
        }
    )


def _is_recorded(folder: Path, identity: str) -> bool:
    try:
        store = TrajectoryStore.open(folder)
    except DataError:
        return False
    return store.complete and store.recording_hash == identity


def _check_devices(config: ConfigDict, mesh: Mesh) -> None:
    check_batch_size("recording.batch_size", config.recording.batch_size, mesh)
    check_batch_size("retraining.batch_size", config.retraining.batch_size, mesh)
    if config.model.dtype == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise UsageError("model.dtype = 'float64' needs the environment variable JAX_ENABLE_X64=1")


def _removals(
    config: ConfigDict, detections: dict[str, Detection], manifest: Manifest, probe_ids: np.ndarray
) -> Iterator[tuple[str, np.ndarray, Detection | None]]:
    """Yields (variant, removed bool [N], its detection) of every kind and rule, then of the controls."""
    for kind, detection in detections.items():
        for rule, removed in detection.removed.items():
            yield f"{kind}/{rule}", removed, detection
    size = manifest.num_examples
    if "random" in config.controls:
        yield "random/fraction", random_removal(size, probe_ids, config.rejection.fraction, config.seed), None
    if "oracle" in config.controls:
        yield "oracle", oracle_removal(size, manifest.poisoned_ids), None


def plan_poison(config: ConfigDict, dataset: Dataset) -> Manifest:
    """Draws the manifest, or takes the one that the config names; perturbations may still have to be optimised."""
    size = len(dataset.train.labels), dataset.num_classes, dataset.image_shape
    if config.attacks.manifest:
        return load_manifest(Path(config.attacks.manifest).expanduser(), *size)
    return draw_manifest(config.attacks, dataset.train.labels, *size[1:], config.seed)


def picture_attacks(config: ConfigDict, path: Path, progress: Progress, images: int = 3) -> dict[str, Any]:
    """Draws every attack's trigger on some of the images that it poisons, and returns what results.json begins with.

    Raises:
      UsageError, DataError: see `badloss_jax.errors`.
    """
    check_config(config)
    mesh = make_mesh()
    _check_devices(config, mesh)
    dataset = load_dataset(config.data, config.seed)
    manifest = plan_poison(config, dataset)
    if not manifest.attacks:
        raise UsageError("attacks.names, or attacks.manifest, is empty: there is no trigger to show")

    def train_surrogate(attack: str, spec: ModelSpec, recipe: Recipe, seed: int) -> TrainState:
        progress.phase(f"surrogate for {attack}")
        clean = unpoisoned(dataset.train.images, dataset.train.labels)
        data = place_examples(config, dataset, clean, mesh)
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
        spec, epochs = spec_of(config, dataset, settings.surrogate), settings.surrogate_epochs
        recipe = recipe_of(config, epochs, epochs, config.retraining.batch_size)
        state = train_surrogate(name, spec, recipe, plan.seed)
        here = jax.tree.map(lambda leaf: jnp.asarray(to_host(leaf)), state)
        of_target = dataset.train.images[dataset.train.labels == plan.target]

        given = network_of(spec, here), of_target, plan.target, settings.epsilon, settings.steps, plan.seed
        optimise = partial(lambda *given: optimise_perturbation(*given).tolist(), *given)
        manifest = manifest.with_perturbation(name, np.array(on_first(optimise)))
    return manifest


def _keep_manifest(path: Path, planned: Manifest, dataset: Dataset, trainer: Trainer) -> tuple[Manifest, float]:
    """Returns the manifest with its perturbations, and the seconds these took; writes it, or takes what is there."""
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

    def train_surrogate(attack: str, spec: ModelSpec, recipe: Recipe, seed: int) -> TrainState:
        trainer.progress.phase(f"surrogate for {attack}")
        clean = unpoisoned(train_set.images, train_set.labels)
        data = place_examples(trainer.config, dataset, clean, trainer.mesh)
        identity = digest("surrogate", seed, train_set.fingerprint, asdict(spec), asdict(recipe))
        return trainer.train(
            f"surrogate/{attack}", identity, "surrogate", seed, spec, recipe, data, np.arange(len(data))
        )

    manifest = optimise_triggers(planned, trainer.config, dataset, train_surrogate)

    def write() -> None:
        if planned.unoptimised:
            seconds = trainer.seconds_before + time.monotonic() - started
            write_text(path.with_name("surrogate.json"), json.dumps({"seconds": seconds}))
        write_text(path, manifest.to_json())

    on_first(write)
    for attack in planned.unoptimised:
        trainer.finish(f"surrogate/{attack}")
    return manifest, _surrogate_seconds(path)


def _surrogate_seconds(manifest: Path) -> float:
    """Returns what the surrogates of the manifest took, 0 if none was trained in its folder."""
    try:
        return float(read_json(manifest.with_name("surrogate.json"))["seconds"])
    except (FileNotFoundError, KeyError):
        return 0.0


def _class_names(workdir: Path, manifest: Manifest) -> list[str]:
    """Returns what the run called its classes; numbers, if it did not come to its end."""
    try:
        names = read_json(workdir / "results.json")["class_names"]
    except (FileNotFoundError, KeyError):
        names = []
    numbers = [str(label) for label in range(manifest.num_classes)]
    return [str(name) for name in names] if len(names) == manifest.num_classes else numbers
