"""One run, from a config to a verdict: poison, record, score, reject, retrain, evaluate, report."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from badloss_jax.attacks.manifest import Manifest, choose_probes, draw_manifest, load_manifest, read_manifest
from badloss_jax.attacks.narcissus import optimise_perturbation
from badloss_jax.attacks.poisoning import apply_manifest, plan_trigger
from badloss_jax.config import check_config, config_hash, differences, digest, to_dict
from badloss_jax.data import Dataset, load_dataset
from badloss_jax.defenses.badloss import Detection, detect
from badloss_jax.defenses.controls import oracle_removal, random_removal
from badloss_jax.errors import DataError, UsageError
from badloss_jax.evaluation.classifier import defense_effectiveness, evaluate
from badloss_jax.files import read_json, write_text
from badloss_jax.models import ModelSpec
from badloss_jax.progress import Progress
from badloss_jax.report.gallery import choose_gallery, write_gallery
from badloss_jax.report.page import write_reports
from badloss_jax.report.plots import save_triggers
from badloss_jax.report.results import environment, header, variant_entry, write_results, write_scores
from badloss_jax.report.writers import Writer, open_writers
from badloss_jax.seeding import derived_seed
from badloss_jax.training.checkpoint import read_about, save_model
from badloss_jax.training.loop import Recipe, train
from badloss_jax.training.mesh import check_batch_size, make_mesh, round_up
from badloss_jax.training.resident import ResidentData
from badloss_jax.training.state import AdamW, TrainState
from badloss_jax.training.step import network_of
from badloss_jax.trajectories.kinds import Kinds
from badloss_jax.trajectories.recorder import Recorder
from badloss_jax.trajectories.store import TrajectoryStore
from badloss_jax.workdir import append_metrics, claim, read_config, start_metrics


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
    with claim(workdir, config), open_writers(workdir, config) as writers:
        seconds = {"data": time.monotonic() - started}
        manifest, spent = _keep_manifest(workdir / "manifest.json", planned, config, dataset, mesh, progress)
        seconds |= {"surrogate": spent} if spent else {}
        about = header(config, manifest, dataset.class_names)
        run = _Run(config, workdir, mesh, dataset, manifest, probe_ids, progress, writers, seconds)

        store, recording_model = run.record()
        with run.timed("scoring"):
            detections, epochs = detect(store, probe_ids, config.scoring, config.rejection)

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
            "epochs_kept": epochs.tolist(),
            "undefended": undefended,
            "recording_model": recording_model,
            "variants": variants,
        }
        write_scores(workdir / "scores.parquet", run.labels, dataset.class_names, run.attack_of, run.is_probe,
                     detections, config.scoring.transform)  # fmt: skip
        run.keep_gallery({kind: detection.distances for kind, detection in detections.items()})
        write_results(workdir / "results.json", results)
        write_reports(workdir)
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
    labels, is_probe = store.read_examples()
    manifest = read_manifest(workdir / "manifest.json")
    if manifest.num_examples != store.num_examples:
        raise DataError(
            f"manifest.json speaks of {manifest.num_examples} examples, trajectories/ of {store.num_examples}"
        )
    attack_of, class_names = manifest.attack_of(), _class_names(workdir, manifest)
    started = time.monotonic()
    detections, epochs = detect(store, np.flatnonzero(is_probe), config.scoring, config.rejection)
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
    progress: Progress
    writers: Sequence[Writer]
    seconds: dict[str, float]
    _name: str = ""
    _number: int = 0

    def __post_init__(self) -> None:
        train = self.dataset.train
        self.poisoning = poisoning = apply_manifest(self.manifest, train.images, train.labels)
        self.labels, self.attack_of = poisoning.labels, self.manifest.attack_of()
        self.is_probe = np.isin(np.arange(len(self.labels)), self.probe_ids)
        self.data = ResidentData.place(self.mesh, train.images, self.labels, poisoning.ids, poisoning.images)
        self.spec = _spec(self.config, self.dataset, self.config.model.name)
        # Everything that every phase stands on; how a phase trains is added to it.
        self.ground = (self.config.seed, train.fingerprint, self.manifest.digest, asdict(self.spec))
        self._trainings = 2 + len(self.config.retraining.variants) + len(self.config.controls)
        self.progress.note(
            f"{self.config.data.source}: {len(self.labels):,} training images {self.dataset.image_shape} in"
            f" {self.dataset.num_classes} classes, {len(poisoning.ids):,} poisoned by {len(self.manifest.attacks)}"
            f" attacks, {len(self.probe_ids)} probes; {self._trainings} trainings on {self.mesh.size}"
            f" {jax.default_backend()} device{'s' * (self.mesh.size > 1)}"
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
        recipe = _recipe(self.config, settings.epochs, settings.schedule_epochs, settings.batch_size)
        identity = digest(*self.ground, asdict(recipe), asdict(kinds), settings.capture)
        folder = self.workdir / "trajectories"

        def training() -> TrainState:
            store = TrajectoryStore.create(
                folder, identity, self.labels, self.is_probe, settings.epochs, kinds.layout()
            )
            batch_size = round_up(self.config.evaluation.batch_size, self.mesh)
            recorder = Recorder(kinds, settings.capture, store, self.mesh, batch_size)
            return self._train("recording", recipe, np.arange(len(self.labels)), recorder)

        evaluation = self._model("recording", identity, training, recorded=_is_recorded(folder, identity))
        return TrajectoryStore.open(folder), evaluation

    def retrain(self, name: str, removed: np.ndarray) -> dict[str, Any]:
        """Trains from scratch on what is left, by the recipe that all of these models share."""
        settings = self.config.retraining
        recipe = _recipe(self.config, settings.epochs, settings.epochs, settings.batch_size, settings.augment)
        kept = np.flatnonzero(~removed)
        identity = digest(*self.ground, asdict(recipe), kept.tolist())
        return self._model(name, identity, lambda: self._train("retraining", recipe, kept))

    def _train(self, phase: str, recipe: Recipe, ids: np.ndarray, recorder: Recorder | None = None) -> TrainState:
        return train(
            self.spec, recipe, self.data, ids, seed=self.config.seed, phase=phase, mesh=self.mesh, recorder=recorder,
            progress=self.progress, on_epoch=self._after_epoch,
        )  # fmt: skip

    def _after_epoch(self, record: dict[str, Any]) -> None:
        append_metrics(self.workdir, {"model": self._name} | record)
        epoch = record.pop("epoch")
        for writer in self.writers:
            writer.write(self._name, record, epoch)

    def _model(
        self, name: str, identity: str, training: Callable[[], TrainState], recorded: bool = True
    ) -> dict[str, Any]:
        """Trains, evaluates and saves a model under models/NAME, or takes what an earlier run of this left there."""
        folder = self.workdir / "models" / name.replace("/", "-")
        self._number += 1
        self._name = name
        title = f"[{self._number}/{self._trainings}] {name}"
        self.progress.phase(title)
        tested = digest(identity, self.dataset.test.fingerprint, to_dict(self.config)["evaluation"])
        about = read_about(folder)
        if about is not None and about["hash"] != identity:
            raise UsageError(
                f"{folder} was trained on other data, or by another version, than this run: choose another --workdir"
            )
        if about is None or not recorded or about["tested"] != tested:
            started = time.monotonic()
            start_metrics(self.workdir, name)
            for writer in self.writers:
                writer.start(name)
            state = training()
            evaluation = evaluate(self.spec, state, self.dataset.test, self.manifest, self.config.evaluation, self.mesh)
            epochs = self.config.recording.epochs if name == "recording" else self.config.retraining.epochs
            for writer in self.writers:
                rates = {f"attack_success_rate/{k}": v for k, v in evaluation["attack_success_rate"].items()}
                writer.write(name, {"clean_accuracy": evaluation["clean_accuracy"], **rates}, epochs - 1)
            about = {"hash": identity, "tested": tested, "evaluation": evaluation,
                     "seconds": time.monotonic() - started, "environment": environment()}  # fmt: skip
            save_model(folder, self.spec, state, about)
        else:
            self.progress.note(f"{title}  done before")
        self.seconds[name] = about["seconds"]
        return about["evaluation"]


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
    manifest = optimise_triggers(manifest, config, dataset, mesh, progress)
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
    manifest: Manifest, config: ConfigDict, dataset: Dataset, mesh: Mesh, progress: Progress
) -> Manifest:
    """Trains a surrogate on the clean training set for each attack that needs one, and optimises its perturbation."""
    train_set = dataset.train
    for name in manifest.unoptimised:
        settings, plan = config.attacks[name], manifest.attacks[name]
        data = ResidentData.place(mesh, train_set.images, train_set.labels, np.zeros(0, int),
                                  np.zeros((0, *dataset.image_shape), np.float32))  # fmt: skip
        spec, epochs = _spec(config, dataset, settings.surrogate), settings.surrogate_epochs
        recipe = _recipe(config, epochs, epochs, config.retraining.batch_size)
        progress.phase(f"surrogate for {name}")
        state = train(spec, recipe, data, np.arange(len(data)), seed=plan.seed, phase="surrogate", mesh=mesh,
                      progress=progress)  # fmt: skip
        of_target = train_set.images[train_set.labels == plan.target]
        perturbation = optimise_perturbation(
            network_of(spec, state), of_target, plan.target, settings.epsilon, settings.steps, plan.seed
        )
        manifest = manifest.with_perturbation(name, perturbation)
    return manifest


def _keep_manifest(
    path: Path, planned: Manifest, config: ConfigDict, dataset: Dataset, mesh: Mesh, progress: Progress
) -> tuple[Manifest, float]:
    """Returns the manifest with its perturbations, and the seconds these took; writes it, or takes what is there."""
    if path.is_file():
        stored = read_manifest(path)
        bare = stored
        for name in planned.unoptimised:
            bare = bare.with_perturbation(name, np.zeros(0, int)) if name in bare.attacks else bare
        if bare != planned:
            raise UsageError(
                f"{path} was drawn for other data or taken from another attacks.manifest: choose another --workdir"
            )
        return stored, _surrogate_seconds(path)
    started = time.monotonic()
    manifest = optimise_triggers(planned, config, dataset, mesh, progress)
    if planned.unoptimised:
        write_text(path.with_name("surrogate.json"), json.dumps({"seconds": time.monotonic() - started}))
    write_text(path, manifest.to_json())
    return manifest, _surrogate_seconds(path)


def _surrogate_seconds(manifest: Path) -> float:
    """Returns what the surrogates of the manifest took, 0 if none was trained in its folder."""
    try:
        return float(read_json(manifest.with_name("surrogate.json"))["seconds"])
    except (FileNotFoundError, KeyError):
        return 0.0


def _spec(config: ConfigDict, dataset: Dataset, name: str) -> ModelSpec:
    model = config.model
    return ModelSpec(
        name, dataset.image_shape, dataset.num_classes, tuple(model.stages), model.stem_stride, model.dtype
    )


def _recipe(config: ConfigDict, epochs: int, schedule_epochs: int, batch_size: int, augment: str = "none") -> Recipe:
    settings = config.optimizer
    adamw = AdamW(settings.weight_decay, settings.b1, settings.b2)
    return Recipe(epochs, schedule_epochs, batch_size, settings.learning_rate, adamw, settings.loss_clamp, augment)


def _class_names(workdir: Path, manifest: Manifest) -> list[str]:
    """Returns what the run called its classes; numbers, if it did not come to its end."""
    try:
        names = read_json(workdir / "results.json")["class_names"]
    except (FileNotFoundError, KeyError):
        names = []
    numbers = [str(label) for label in range(manifest.num_classes)]
    return [str(name) for name in names] if len(names) == manifest.num_classes else numbers
