"""BaDLoss over trajectories of any number: read, scored and written part by part, in memory that does not grow with N.

What lies in the folder it writes to:

    OUT/scoring.json                             settings, thresholds, counts, seconds, versions
    OUT/scores/part-00000-of-00010.parquet       one row an example, the columns of a run's scores.parquet
    OUT/distances/                               of a scoring that is not finished: what it goes on with
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from badloss_jax.config import default_config, override, to_dict
from badloss_jax.core.environment import environment
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import check_free, locked, read_json, write_atomically, write_text
from badloss_jax.core.hashing import digest, sha256_of
from badloss_jax.core.progress import Progress
from badloss_jax.runs.stored import PartFiles, Source, open_source, read_probes
from badloss_jax.runs.thresholds import PartedScores, ScoredKind, find_thresholds, survey
from badloss_jax.scoring import (
    COMBINED,
    KindScores,
    Probes,
    Trajectories,
    available_kinds,
    epochs_to_score,
    find_attacks,
    in_attacks,
    knn_distances,
    score_trajectories,
)
from badloss_jax.scoring.rows import RowRange, Rows
from badloss_jax.settings import KINDS

_PART = 2**20  # examples
_FORMAT = "badloss_jax.scoring/1"
_SCORING_GROUPS = ("scoring", "rejection")  # what can be changed


def score_stored(
    trajectories: Path,
    probes: Path | None,
    workdir: Path,
    overrides: Sequence[str],
    progress: Progress,
    mesh: Mesh,
    *,
    exclude_non_finite: bool = False,
) -> dict[str, Any]:
    """Scores stored trajectories and applies every rejection rule, or goes on with what a killed process left.

    Args:
      trajectories: a trajectory store, or a .npy file: floats [N, T], taken for losses, or [N, T, width], taken for
        features.
      probes: a .npy or .txt file of the probes' ids, or a .npy file of their trajectories [P, T] or [P, T, width]; None
        takes the probes that the store marks.
      workdir: the folder to write to.
      overrides: `--config.scoring.*` and `--config.rejection.*`; by default all kinds that there are.
      progress: tells how far it is.
      mesh: the devices that share the rows, where they are no CPUs.
      exclude_non_finite: leave out trajectories with NaN or infinity, and count them, in place of the error.

    Returns:
      What scoring.json holds.

    Raises:
      UsageError: wrong settings, probes that fit neither store nor file, or a folder that holds something else.
      DataError: a file is damaged, the disk is full, or trajectories are not finite (ids are named).
    """
    source = open_source(trajectories)
    trusted = read_probes(probes, source)
    config = _settings(source, trusted, overrides)
    if exclude_non_finite and "clusters" in config.rejection.rules:
        raise UsageError(
            "the rule clusters needs every example's trajectories, so nothing can be left out: use it without"
            " --exclude_non_finite"
        )

    # Ids say which probes they are; of trajectories of their own, only the file does.
    probes_file = ""
    if probes and trusted.own is not None:
        probes_file = sha256_of(probes)
    question = {
        "format": _FORMAT,
        "trajectories": source.identity,
        "probes": digest(sorted(trusted.ids.tolist()), probes_file),
        "settings": {name: to_dict(config)[name] for name in _SCORING_GROUPS},
        "exclude_non_finite": exclude_non_finite,
    }

    with locked(workdir):
        finished = _claim(workdir, question)
        if finished:
            progress.note(f"{workdir} holds these scores already")
            return finished

        scoring = _Scoring(source, trusted, workdir, config, progress, mesh, exclude_non_finite)
        results = question | scoring.run()

        # First the results, then what they were made of: a process that is killed in between has both.
        write_text(workdir / "scoring.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
        shutil.rmtree(workdir / "distances", ignore_errors=True)
    return results


@dataclass
class _Scoring:
    """One scoring on its way; files of distances are what it goes on with.

    Attributes:
      source: of the trajectories.
      probes: known to be clean.
      workdir: the folder that is written.
      config: whose scoring and rejection count.
      progress: is told how far it is.
      mesh: the devices.
      exclude: leave out trajectories that are not finite, in place of an error.
      seconds: that each phase took.
    """

    source: Source
    probes: Probes
    workdir: Path
    config: ConfigDict
    progress: Progress
    mesh: Mesh
    exclude: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Where each part begins and ends."""
        count = self.source.trajectories.num_examples
        return [(start, min(count, start + _PART)) for start in range(0, count, _PART)]

    def run(self) -> dict[str, Any]:
        """Scores, finds every rule's threshold, writes; returns what scoring.json says of it."""
        trajectories = self.source.trajectories
        settings = self.config.scoring
        with self._timed("filter"):
            epochs = epochs_to_score(trajectories, settings, exclude_non_finite=self.exclude)
        with self._timed("distances"):
            scores = self._score(settings.kinds, settings, epochs)
        members = None
        if "clusters" in self.config.rejection.rules:
            with self._timed("clusters"):
                members = self._members(epochs)
        with self._timed("thresholds"):
            kinds = [self._with_thresholds(of_kind, members) for of_kind in scores.values()]
        with self._timed("writing"):
            self._write(kinds)

        # Without losses there is no filter, and all epochs are scored.
        epochs_kept = None
        if "loss" in trajectories.kinds or settings.epochs:
            epochs_kept = epochs.tolist()
        return {
            "num_examples": trajectories.num_examples,
            "probe_count": len(self.probes),
            "epochs_kept": epochs_kept,
            "kinds": {of_kind.parted.scores.kind: of_kind.summary() for of_kind in kinds},
            "parts": len(self.parts),
            "seconds": self.seconds,
            "environment": environment(),
        }

    def _score(
        self, kinds: Sequence[str], settings: Mapping[str, Any], epochs: Int[np.ndarray, "E"]
    ) -> dict[str, KindScores]:
        """Scores by each of the kinds, with distances that are kept on disk."""
        scores, _ = score_trajectories(
            self.source.trajectories,
            self.probes,
            settings,
            kinds,
            self.mesh,
            epochs=epochs,
            measure=self._measure,
        )
        return scores

    def _measure(self, kind: str, k: int, rows: Rows, probes: np.ndarray) -> PartFiles:
        """Measures the distances of every part that is not on disk yet."""
        distances = PartFiles(self.workdir / "distances" / f"{kind}-{k}", self.parts)
        missing = distances.missing()
        total = self.source.trajectories.num_examples
        to_do = sum(self.parts[number][1] - self.parts[number][0] for number in missing)
        self.progress.phase(f"{kind}, k = {k}")
        self.progress.begin(total, total - to_do)

        # Written part by part: a killed process goes on with the first that is missing.
        for number in missing:
            start, stop = self.parts[number]
            values = knn_distances(RowRange(rows, start, stop), probes, k, self.mesh, exclude_non_finite=True)
            bad = start + np.flatnonzero(~np.isfinite(values))
            if len(bad) and not self.exclude:
                raise DataError(
                    f"{len(bad)} trajectories of kind {kind} among the examples {start} to {stop - 1} are NaN or"
                    f" infinite, ids {', '.join(map(str, bad[:10]))}: mend them, or leave them out, counted, by"
                    " --exclude_non_finite"
                )
            values[~np.isfinite(values)] = np.nan
            distances.write(number, values)

            part = f"part {number + 1}/{len(self.parts)}"
            self.progress.advance(stop - start, part)
            self.progress.say(part)
        self.progress.end()
        return distances

    def _members(self, epochs: Int[np.ndarray, "E"]) -> Bool[np.ndarray, "N"]:
        """Says which examples are in attacks; one class after the other is read."""
        self.progress.note("looking for attacks, class by class ...")
        trajectories = self.source.trajectories
        settings = to_dict(self.config)["scoring"] | {"by_class": True}
        kind = available_kinds([kind for kind in trajectories.kinds if kind in COMBINED])[-1]
        far = self._score((kind,), settings, epochs)[kind].values()
        clusters, _ = find_attacks(trajectories, self.probes.ids, settings, self.config.seed, self.mesh, far)
        return in_attacks(clusters, trajectories.num_examples)

    def _with_thresholds(self, scores: KindScores, members: Bool[np.ndarray, "N"] | None) -> ScoredKind:
        """Walks over the scores of a kind, and finds every rule's threshold."""
        parted = PartedScores(scores, self.parts)
        counted = survey(parted)
        return ScoredKind(parted, counted, find_thresholds(parted, counted, self.config.rejection, members))

    def _write(self, kinds: Sequence[ScoredKind]) -> None:
        """Writes a file a part."""
        for number, (start, stop) in enumerate(self.parts):
            ids = np.arange(start, stop, dtype=np.int64)
            is_probe = np.isin(ids, self.probes.ids)
            columns: dict[str, Any] = {"example_id": ids}
            if self.source.labels is not None:
                columns["label"] = self.source.labels[start:stop]
            columns["probe"] = is_probe
            for of_kind in kinds:
                columns |= of_kind.columns(start, stop, is_probe, self.config.scoring.transform)

            path = self.workdir / "scores" / f"part-{number:05d}-of-{len(self.parts):05d}.parquet"
            write_atomically(path, partial(pq.write_table, pa.table(columns)))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[phase] = time.monotonic() - started


def _settings(source: Source, probes: Probes, overrides: Sequence[str]) -> ConfigDict:
    """Returns the default settings for the kinds that there are, with overrides of scoring and rejection."""
    trajectories = source.trajectories
    plain = _settings_without_overrides(trajectories, len(probes))
    config = override(plain, overrides)
    before = to_dict(plain)
    others = [
        group for group, value in to_dict(config).items() if value != before[group] and group not in _SCORING_GROUPS
    ]
    if config.scoring.epochs > trajectories.num_epochs:
        raise UsageError(f"scoring.epochs = {config.scoring.epochs}, and {trajectories.num_epochs} were recorded")

    by_class = []
    if "clusters" in config.rejection.rules:
        by_class.append("the rule clusters")
    if config.scoring.by_class:
        by_class.append("scoring.by_class = True")
    for setting in by_class:
        if trajectories.labels is None:
            raise UsageError(
                f"{setting} compares examples with their class, and these trajectories have no labels: save a store"
                " with them, by TrajectoryRecorder.save(folder, labels=...)"
            )
        if probes.own is not None:
            raise UsageError(f"{setting} needs the probes' ids in place of their trajectories")

    if others:
        raise UsageError(f"badloss score changes scoring.* and rejection.* only, not {', '.join(others)}")
    return config


def _settings_without_overrides(trajectories: Trajectories, num_probes: int) -> ConfigDict:
    """Returns the default settings for the kinds that there are."""
    # Made to look like a recording of these trajectories, which the checks of a config compare settings with.
    config = default_config()
    config.unlock()
    config.recording.kinds = tuple(kind for kind in trajectories.kinds if kind != "loss")
    config.recording.epochs = max(3, trajectories.num_epochs)
    config.recording.schedule_epochs = max(config.recording.schedule_epochs, config.recording.epochs)
    available = available_kinds(trajectories.kinds)
    config.scoring.kinds = tuple(kind for kind in KINDS if kind in available)
    config.probes.count = num_probes
    config.retraining.variants = ()
    return config


def _claim(workdir: Path, question: dict[str, Any]) -> dict[str, Any] | None:
    """Begins in a new folder, or goes on in that of the same scoring; returns its results if it is finished."""
    path = workdir / "scoring.json"
    if not path.is_file():
        check_free(workdir)
        write_text(path, json.dumps(question, indent=2) + "\n")
        return None

    stored = read_json(path)
    plain = json.loads(json.dumps(question))
    other = [name for name, value in plain.items() if stored.get(name) != value]
    finished = "kinds" in stored
    begun = (workdir / "distances").is_dir()
    # What was computed when no example was to be left out, holds none that would be.
    mended = other == ["exclude_non_finite"] and plain["exclude_non_finite"]

    if other and not finished and (mended or not begun):
        write_text(path, json.dumps(question, indent=2) + "\n")
    elif other:
        raise UsageError(f"--workdir {workdir} holds scores with other {', '.join(other)}: choose another folder")
    return stored if finished else None
