"""One run, from a config to a verdict: poison, record, score, reject, retrain, evaluate, report."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from badloss_jax.attacks.manifest import Manifest, choose_probes, read_manifest
from badloss_jax.config import check_config, config_hash, differences, settled, to_dict
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import read_json
from badloss_jax.core.hashing import code_hash, digest
from badloss_jax.core.mesh import make_mesh
from badloss_jax.core.preemption import Preemption
from badloss_jax.core.processes import agree, on_first
from badloss_jax.core.progress import Progress
from badloss_jax.data import Dataset, load_dataset
from badloss_jax.defenses.badloss import detect
from badloss_jax.defenses.context import Detection
from badloss_jax.defenses.controls import oracle_removal, random_removal
from badloss_jax.report.page import write_reports
from badloss_jax.report.results import (
    cleansed_entry,
    cost_entry,
    header,
    variant_entry,
    write_results,
    write_scores,
)
from badloss_jax.runs.artefacts import Artefacts
from badloss_jax.runs.phases import Phases
from badloss_jax.runs.poison import keep_manifest, plan_poison
from badloss_jax.runs.trainer import Trainer, check_devices
from badloss_jax.runs.workdir import claim, read_config, read_resumes
from badloss_jax.runs.writers import Writer, open_writers
from badloss_jax.trajectories.store import TrajectoryStore


def run_experiment(
    config: ConfigDict, workdir: Path, progress: Progress | None = None, mesh: Mesh | None = None,
    shared: Path | None = None, *, wait: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Runs the whole experiment in a folder, going on with what finished phases left there.

    Args:
      config: see `badloss_jax.config`.
      workdir: see `badloss_jax.runs.workdir`.
      progress: tells how far it is; silent by default.
      mesh: of the devices to run on, all by default.
      shared: a folder of artefacts that many runs share (see `badloss_jax.runs.artefacts`). The run then is an item of
        a sweep, which has its own report: none is written.
      wait: for other processes that make shared artefacts; BusyError otherwise.

    Returns:
      What results.json holds.

    Raises:
      UsageError, DataError, NonFiniteLossError: see `badloss_jax.core.errors`; what was finished is kept.
    """
    check_config(config)
    mesh = mesh or make_mesh()
    check_devices(config, mesh)
    started, progress = time.monotonic(), progress or Progress(None)
    artefacts = Artefacts(shared or workdir, shared is not None, progress.note if wait else None)
    dataset = load_dataset(config.data, config.seed)
    planned = plan_poison(config, dataset)
    probe_ids = choose_probes(planned, config.probes.count, config.seed, config.probes.contaminated)
    _check_agreement(config, dataset, planned)
    with Preemption() as preemption, _claimed(workdir, config) as writers:
        seconds = {"data": time.monotonic() - started}
        trainer = Trainer(config, workdir, artefacts, mesh, progress, writers, preemption)
        manifest, spent = keep_manifest(workdir, planned, dataset, trainer)
        seconds |= {"surrogate": spent} if spent else {}
        about = header(config, manifest, dataset.class_names)
        run = Phases(config, workdir, artefacts, mesh, dataset, manifest, probe_ids, trainer, seconds)

        detections, epochs, costs = _detections(run)
        cleansed = {}
        for name in config.defenses.names:
            outcome, costs[name] = run.defend(name)
            if isinstance(outcome, Detection):
                detections[name] = outcome
            else:
                cleansed[name] = outcome

        undefended = run.undefended if config.retraining.enabled else None
        variants = {}
        for name, removed, detection in _removals(config, detections, manifest, probe_ids):
            wanted = config.retraining.enabled and (detection is None or name in config.retraining.variants)
            retrained = run.retrain(name, removed) if wanted else None
            variants[name] = variant_entry(removed, run.attack_of, run.is_probe, detection, retrained, undefended)
        for name, model in cleansed.items():
            variants[name] = cleansed_entry(model, undefended)
        for name, entry in variants.items():
            entry |= cost_entry(costs.get(name.partition("/")[0]), run.seconds, config)

        results = about | {
            "seconds": run.seconds,
            "resumes": read_resumes(workdir),
            "epochs_kept": epochs,
            "variants": variants,
        }
        results |= {"undefended": undefended} if undefended else {}
        results |= {"recording_model": run.recorded[1]} if "recording" in run.seconds else {}

        def write() -> None:
            if detections:
                write_scores(workdir / "scores.parquet", run.labels, dataset.class_names, run.attack_of, run.is_probe,
                             detections, config.scoring.transform)  # fmt: skip
            if not shared and detections:
                run.keep_gallery({kind: detection.distances for kind, detection in detections.items()})
            write_results(workdir / "results.json", results)
            if not shared:
                write_reports(workdir)

        on_first(write)
        return results


def _detections(run: Phases) -> tuple[dict[str, Detection], list[int], dict[str, dict[str, float]]]:
    """Scores the trajectories by the kinds of the config, which are BaDLoss without a name.

    Returns:
      By kind the detections; the epochs that the filter kept; and by kind what took how many seconds.
    """
    scoring, rejection = run.config.scoring, run.config.rejection
    if not scoring.kinds:
        return {}, [], {}
    store = run.recorded[0]
    with run.timed("scoring"):
        detections, epochs = detect(store, run.probe_ids, scoring, rejection, run.mesh, run.config.seed)
    cost = {phase: run.seconds[phase] for phase in ("recording", "scoring")}
    return detections, epochs.tolist(), {kind: dict(cost) for kind in detections}


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
    if not config.scoring.kinds:
        raise UsageError("scoring.kinds is empty: name the kinds of trajectory to score by")
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
    detections, epochs = detect(store, probe_ids, config.scoring, config.rejection, seed=config.seed)
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


def _class_names(workdir: Path, manifest: Manifest) -> list[str]:
    """Returns what the run called its classes; numbers, if it did not come to its end."""
    try:
        names = read_json(workdir / "results.json")["class_names"]
    except (FileNotFoundError, KeyError):
        names = []
    numbers = [str(label) for label in range(manifest.num_classes)]
    return [str(name) for name in names] if len(names) == manifest.num_classes else numbers
