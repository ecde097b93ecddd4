"""One run, from a config to a verdict: poison, record, score, reject, retrain, evaluate, report."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from badloss_jax.attacks.manifest import choose_probes
from badloss_jax.config import check_config
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
from badloss_jax.runs.agreement import claimed, facts_of
from badloss_jax.runs.artefacts import Artefacts
from badloss_jax.runs.defending import defend
from badloss_jax.runs.ledger import Ledger
from badloss_jax.runs.phases import Phases
from badloss_jax.runs.poison import keep_manifest, plan_poison
from badloss_jax.runs.recording import Recording
from badloss_jax.runs.trainer import Trainer, check_devices, recipe_of, spec_of
from badloss_jax.runs.workdir import read_resumes
from badloss_jax.training.footprint import check_train_step


def run_experiment(
    config: ConfigDict,
    workdir: Path,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    shared: Path | None = None,
    *,
    wait: bool = True,
) -> dict[str, Any]:
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
      PreemptedError: it was told to stop; the same call goes on.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from badloss_jax import load_config, run_experiment
      >>> small = {"data.train_examples": 400, "recording.epochs": 3, "retraining.enabled": False}
      >>> small |= {"retraining.variants": ()}
      >>> config = load_config("configs/digits.py", [f"--config.{key}={value}" for key, value in small.items()])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     results = run_experiment(config, Path(folder))
      >>> round(results["variants"]["combined/fraction"]["removed_share"], 2)
      0.4
    """
    # What is wrong is said before anything is read or written.
    check_config(config)
    mesh = mesh or make_mesh()
    check_devices(config, mesh)

    started = time.monotonic()
    progress = progress or Progress(None)
    tell_wait = progress.note if wait else None
    artefacts = Artefacts(shared or workdir, shared is not None, tell_wait)

    dataset = load_dataset(config.data, config.seed)
    planned = plan_poison(config, dataset)
    probe_ids = choose_probes(planned, config.probes.count, config.seed, config.probes.contaminated)
    agree(
        facts_of(config)
        | {
            "the training images and labels (a hash)": dataset.train.fingerprint,
            "the test images and labels (a hash)": dataset.test.fingerprint,
            "the poison (a hash)": planned.digest,
        }
    )
    # A folder that was begun would be refused with what the user then changes.
    if not (workdir / "config.json").is_file():
        _check_memory(config, dataset, mesh)

    with Preemption() as preemption, claimed(workdir, config) as writers:
        ledger = Ledger(seconds={"data": time.monotonic() - started})
        trainer = Trainer(config, workdir, artefacts, mesh, progress, writers, preemption)
        manifest, surrogate = keep_manifest(workdir, planned, dataset, trainer)
        if surrogate:
            ledger.seconds["surrogate"] = surrogate

        run = Phases(trainer, dataset, manifest, probe_ids, ledger)
        findings = _detect(run)
        variants = _retrain(run, findings)
        results = _results(run, findings, variants)

        # An item of a sweep has no report of its own.
        on_first(lambda: _write(run, findings, results, report=shared is None))
        return results


@dataclass
class _Findings:
    """What BaDLoss and the other defences say.

    Attributes:
      detections: by kind of trajectory, or by defence.
      cleansed: by defence, how good the network is that it trained itself.
      costs: by kind or defence, what took how many seconds.
      epochs: that the filter kept.
    """

    detections: dict[str, Detection]
    cleansed: dict[str, dict[str, Any]]
    costs: dict[str, dict[str, float]]
    epochs: list[int]


def _detect(run: Phases) -> _Findings:
    """Scores by every kind of the config, which are BaDLoss without a name, and lets every defence work."""
    findings = _Findings({}, {}, {}, [])
    config = run.config
    if config.scoring.kinds:
        store, _ = run.recorded
        with run.ledger("scoring"):
            detections, epochs = detect(store, run.probe_ids, config.scoring, config.rejection, run.mesh, config.seed)
        cost = {phase: run.ledger.seconds[phase] for phase in ("recording", "scoring")}
        findings.detections |= detections
        findings.costs |= {kind: dict(cost) for kind in detections}
        findings.epochs += epochs.tolist()

    for name in config.defenses.names:
        outcome, findings.costs[name] = defend(run, name)
        if isinstance(outcome, Detection):
            findings.detections[name] = outcome
        else:
            findings.cleansed[name] = outcome
    return findings


def _retrain(run: Phases, findings: _Findings) -> dict[str, dict[str, Any]]:
    """Retrains without what each kind, defence and control removes, where the config asks for it.

    Returns:
      What results.json says of each variant.
    """
    settings = run.config.retraining
    undefended = run.undefended if settings.enabled else None

    variants = {}
    for name, removed, detection in _removals(run, findings.detections):
        is_control = detection is None
        retrained = None
        if settings.enabled and (is_control or name in settings.variants):
            retrained = run.retrain(name, removed)
        variants[name] = variant_entry(removed, run.attack_of, run.is_probe, detection, retrained, undefended)
    for name, model in findings.cleansed.items():
        variants[name] = cleansed_entry(model, undefended)

    # Only now is it known what the shared trainings took.
    for name, entry in variants.items():
        kind = name.partition("/")[0]
        entry |= cost_entry(findings.costs.get(kind), run.ledger.seconds, run.config)
    return variants


def _removals(run: Phases, detections: dict[str, Detection]) -> Iterator[tuple[str, np.ndarray, Detection | None]]:
    """Yields (variant, removed bool [N], its detection) of every kind and rule, then of the controls."""
    for kind, detection in detections.items():
        for rule, removed in detection.removed.items():
            yield f"{kind}/{rule}", removed, detection

    config = run.config
    size = run.manifest.num_examples
    if "random" in config.controls:
        removed = random_removal(size, run.probe_ids, config.rejection.fraction, config.seed)
        yield "random/fraction", removed, None
    if "oracle" in config.controls:
        yield "oracle", oracle_removal(size, run.manifest.poisoned_ids), None


def _results(run: Phases, findings: _Findings, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns what results.json holds."""
    results = header(run.config, run.manifest, run.dataset.class_names) | {
        "seconds": run.ledger.seconds,
        "resumes": read_resumes(run.workdir),
        "epochs_kept": findings.epochs,
        "variants": variants,
    }
    if run.config.retraining.enabled:
        results["undefended"] = run.undefended
    if "recording" in run.ledger.seconds:
        results["recording_model"] = run.recorded[1]
    return results


def _write(run: Phases, findings: _Findings, results: dict[str, Any], *, report: bool) -> None:
    """Writes what scripts and people read of a run."""
    detections = findings.detections
    if detections:
        write_scores(
            run.workdir / "scores.parquet",
            run.labels,
            run.dataset.class_names,
            run.attack_of,
            run.is_probe,
            detections,
            run.config.scoring.transform,
        )
    if detections and report:
        run.keep_gallery({kind: detection.distances for kind, detection in detections.items()})

    # The results come last of what is kept: the report is rendered from them, and a folder that has them is done.
    write_results(run.workdir / "results.json", results)
    if report:
        write_reports(run.workdir)


def _check_memory(config: ConfigDict, dataset: Dataset, mesh: Mesh) -> None:
    """Raises UsageError if a step of the recording, or of the retraining, cannot fit the devices' memory."""
    spec = spec_of(config, dataset.image_shape, dataset.num_classes, config.model.name)
    if config.scoring.kinds:
        Recording.of(config, spec, ()).check_fits(config, mesh)

    settings = config.retraining
    if settings.enabled:
        recipe = recipe_of(config, settings.epochs, settings.epochs, settings.batch_size, settings.augment)
        check_train_step("retraining.batch_size", spec, recipe, None, mesh)
