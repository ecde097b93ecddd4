"""Scores the recording of a run again, with other settings, without training; or as much as there is of it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from badloss_jax.attacks.manifest import Manifest, read_manifest
from badloss_jax.config import config_hash, differences, to_dict
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import read_json
from badloss_jax.core.hashing import digest
from badloss_jax.defenses.badloss import detect
from badloss_jax.report.page import write_reports
from badloss_jax.report.results import header, variant_entry, write_results, write_scores
from badloss_jax.runs.workdir import read_config
from badloss_jax.trajectories.store import TrajectoryStore

_FEWEST = 3  # epochs, which the filter always keeps


def rescore(workdir: Path, change: Callable[[ConfigDict], ConfigDict]) -> tuple[Path, dict[str, Any]]:
    """Scores the stored trajectories of a run with other `scoring` and `rejection` settings, without training.

    Of a run that was stopped while it recorded, or still does, it scores the epochs that are over: `epochs_recorded` in
    the results says how many.

    Args:
      workdir: of a run.
      change: its config -> the config to score by.

    Returns:
      The folder `rescored/<hash>` with its own results.json, scores.parquet and report, and what results.json holds.

    Raises:
      UsageError: no run is there, or another setting is changed, which would need training.
      DataError: the trajectories are damaged, or fewer than three epochs are recorded.

    Example:
      >>> from badloss_jax import rescore
      >>> from badloss_jax.config import override
      >>> folder, results = rescore(finished, lambda config: override(config, ["--config.scoring.loss.k=3"]))
      >>> results["changed"]
      {'scoring.loss.k': '5 -> 3'}
    """
    stored = read_config(workdir)
    original = config_hash(stored)
    stored.retraining.variants = ()  # nothing is retrained, so no kind must be there for it
    config = change(stored)
    _check_changes(config, stored)

    store, manifest = _read_recording(workdir)
    probe_ids = store.probe_ids()
    is_probe = np.isin(np.arange(store.num_examples), probe_ids)
    attack_of = manifest.attack_of()
    class_names = _class_names(workdir, manifest)

    started = time.monotonic()
    detections, epochs = detect(store, probe_ids, config.scoring, config.rejection, seed=config.seed)
    seconds = time.monotonic() - started

    variants = {}
    for kind, detection in detections.items():
        for rule, removed in detection.removed.items():
            variants[f"{kind}/{rule}"] = variant_entry(removed, attack_of, is_probe, detection)
    results = header(config, manifest, class_names) | {
        "rescored_from": original,
        "changed": differences(to_dict(config), to_dict(stored)),
        "seconds": {"scoring": seconds},
        "epochs_recorded": store.num_epochs,
        "epochs_kept": epochs.tolist(),
        "variants": variants,
    }

    # Named by what was changed, so that the run's own results and other rescorings stay.
    folder = workdir / "rescored" / digest(to_dict(config)["scoring"], to_dict(config)["rejection"])
    write_scores(
        folder / "scores.parquet",
        store.labels(),
        class_names,
        attack_of,
        is_probe,
        detections,
        config.scoring.transform,
    )
    write_results(folder / "results.json", results)
    write_reports(folder)
    return folder, results


def _read_recording(workdir: Path) -> tuple[TrajectoryStore, Manifest]:
    """Returns the trajectories of a run, up to the last epoch that is over, and who is poisoned with what.

    Raises:
      DataError: they are damaged, too few, or do not belong together.
    """
    planned = TrajectoryStore.open(workdir / "trajectories")
    store = planned.finished()
    if store.num_epochs < min(_FEWEST, planned.num_epochs):
        raise DataError(
            f"{store.folder} is not complete, and its {store.num_epochs} of {planned.num_epochs} epochs are too few to"
            f" score, which takes {_FEWEST}: its `badloss run` is still at work, or did not come to the end"
        )

    # The two come from different files, which somebody may have copied together.
    manifest = read_manifest(workdir / "manifest.json")
    if manifest.num_examples != store.num_examples:
        raise DataError(
            f"manifest.json speaks of {manifest.num_examples} examples, trajectories/ of {store.num_examples}"
        )
    return store, manifest


def _check_changes(config: ConfigDict, stored: ConfigDict) -> None:
    """Raises UsageError unless only what scores and removes was changed."""
    if not config.scoring.kinds:
        raise UsageError("scoring.kinds is empty: name the kinds of trajectory to score by")

    before = to_dict(stored)
    changed = [group for group, value in to_dict(config).items() if value != before[group]]
    needing_training = [group for group in changed if group not in ("scoring", "rejection")]
    if needing_training:
        raise UsageError(
            f"badloss score changes scoring.* and rejection.* only; {', '.join(needing_training)} would need training:"
            " use badloss run with another --workdir"
        )


def _class_names(workdir: Path, manifest: Manifest) -> list[str]:
    """Returns what the run called its classes; numbers, if it did not come to its end."""
    try:
        names = read_json(workdir / "results.json")["class_names"]
    except (FileNotFoundError, KeyError):
        names = []  # the run is not at its end

    if len(names) == manifest.num_classes:
        return [str(name) for name in names]
    return [str(label) for label in range(manifest.num_classes)]
