"""BaDLoss over trajectories of any number: read, scored and written part by part, in memory that does not grow with N.

What lies in the folder it writes to:

    OUT/scoring.json                             settings, thresholds, counts, seconds, versions
    OUT/scores/part-00000-of-00010.parquet       one row an example, the columns of a run's scores.parquet
    OUT/distances/                               of a scoring that is not finished: what it goes on with
"""

import json
import math
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
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from badloss_jax.config import default_config, override, to_dict
from badloss_jax.core.environment import environment
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import check_free, locked, read_json, write_atomically, write_text
from badloss_jax.core.hashing import digest, sha256_of
from badloss_jax.core.progress import Progress
from badloss_jax.runs.stored import PartFiles, Source, open_source, read_probes
from badloss_jax.scoring import (
    COMBINED,
    KindScores,
    Probes,
    anomaly_scores,
    available_kinds,
    benjamini_hochberg_threshold,
    conformal_p_values,
    epochs_to_score,
    find_attacks,
    in_attacks,
    knn_distances,
    largest_threshold,
    score_trajectories,
)
from badloss_jax.scoring.distances import RowRange, Rows
from badloss_jax.settings import KINDS, parse_rule

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
    known = read_probes(probes, source)
    config = _settings(source, known, overrides)
    if exclude_non_finite and "clusters" in config.rejection.rules:
        raise UsageError(
            "the rule clusters needs every example's trajectories, so nothing can be left out: use it without"
            " --exclude_non_finite"
        )
    about = {
        "format": _FORMAT,
        "trajectories": source.identity,
        "probes": digest(sorted(known.ids.tolist()), sha256_of(probes) if probes and known.own is not None else ""),
        "settings": {name: to_dict(config)[name] for name in ("scoring", "rejection")},
        "exclude_non_finite": exclude_non_finite,
    }
    with locked(workdir):
        before = _claim(workdir, about)
        if before:
            progress.note(f"{workdir} holds these scores already")
            return before

        scoring = _Scoring(source, known, workdir, config, progress, mesh, exclude_non_finite)
        results = about | scoring.run()
        write_text(workdir / "scoring.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
        shutil.rmtree(workdir / "distances", ignore_errors=True)
    return results


@dataclass
class _Scoring:
    """One scoring on its way; files of distances are what it goes on with."""

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
        ours, scoring = self.source.trajectories, self.config.scoring
        with self._timed("filter"):
            epochs = epochs_to_score(ours, scoring, exclude_non_finite=self.exclude)
        with self._timed("distances"):
            scores, _ = score_trajectories(
                ours, self.probes, scoring, scoring.kinds, self.mesh, epochs=epochs, measure=self._measure
            )
        members = None
        if "clusters" in self.config.rejection.rules:
            with self._timed("clusters"):
                members = self._members(epochs)
        with self._timed("thresholds"):
            kinds = [self._thresholds(of_kind, members) for of_kind in scores.values()]
        with self._timed("writing"):
            self._write(kinds)

        filtered = "loss" in ours.kinds or scoring.epochs
        return {
            "num_examples": ours.num_examples,
            "probe_count": len(self.probes),
            "epochs_kept": epochs.tolist() if filtered else None,
            "kinds": {of_kind.scores.kind: of_kind.summary() for of_kind in kinds},
            "parts": len(self.parts),
            "seconds": self.seconds,
            "environment": environment(),
        }

    def _measure(self, kind: str, k: int, rows: Rows, probes: np.ndarray) -> "PartFiles":
        """Measures the distances of every part that is not on disk yet."""
        distances = PartFiles(self.workdir / "distances" / f"{kind}-{k}", self.parts)
        missing = distances.missing()
        total = self.source.trajectories.num_examples
        to_do = sum(self.parts[number][1] - self.parts[number][0] for number in missing)
        self.progress.phase(f"{kind}, k = {k}")
        self.progress.begin(total, total - to_do)
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
            self.progress.advance(stop - start, f"part {number + 1}/{len(self.parts)}")
            self.progress.say(f"part {number + 1}/{len(self.parts)}")
        self.progress.end()
        return distances

    def _members(self, epochs: Int[np.ndarray, "E"]) -> Bool[np.ndarray, "N"]:
        """Says which examples are in attacks; one class after the other is read."""
        ours, scoring = self.source.trajectories, to_dict(self.config)["scoring"] | {"by_class": True}
        self.progress.note("looking for attacks, class by class ...")
        kind = available_kinds([kind for kind in ours.kinds if kind in COMBINED])[-1]
        scores, _ = score_trajectories(
            ours, self.probes, scoring, (kind,), self.mesh, epochs=epochs, measure=self._measure
        )
        far = scores[kind].values()
        clusters, _ = find_attacks(ours, self.probes.ids, scoring, self.config.seed, self.mesh, far)
        return in_attacks(clusters, ours.num_examples)

    def _is_probe(self, start: int, stop: int) -> Bool[np.ndarray, "M"]:
        return np.isin(np.arange(start, stop), self.probes.ids)

    def _thresholds(self, scores: KindScores, members: Bool[np.ndarray, "N"] | None) -> "_OfKind":
        """Walks over the scores of a kind, and finds every rule's threshold."""
        counts = np.zeros(len(self.probes) + 1, np.int64)  # of each p-value there can be
        count = excluded = 0
        low, high = np.inf, -np.inf
        for start, stop in self.parts:
            values = scores.values(start, stop)
            there = np.isfinite(values)
            count += int(there.sum())
            excluded += int((~there).sum())
            if there.any():
                low = min(low, float(values[there].min()))
                high = max(high, float(values[there].max()))
            p_values = conformal_p_values(values[there & ~self._is_probe(start, stop)], scores.probe_scores)
            counts += np.bincount(np.rint(p_values * len(counts)).astype(int) - 1, minlength=len(counts))
        if not count:
            raise DataError(f"no trajectory of kind {scores.kind} is finite")

        def eligible() -> Iterator[np.ndarray]:
            for start, stop in self.parts:
                values = scores.values(start, stop)
                yield values[np.isfinite(values) & ~self._is_probe(start, stop)]

        cuts = {}
        for text in self.config.rejection.rules:
            rule, level = parse_rule(text, self.config.rejection)
            if rule == "clusters":
                cuts[text] = _Cut(members=members)
            elif rule == "fraction":
                wanted = min(math.floor(level * count), int(counts.sum()))
                distance, ties = largest_threshold(eligible, wanted)
                # Where nothing is removed, the threshold is the largest distance, and none that equals it goes.
                cuts[text] = _Cut(distance if wanted else high, ties)
            elif rule == "fdr":
                cuts[text] = _Cut(p_value=benjamini_hochberg_threshold(counts, level) / len(counts))
            else:
                cuts[text] = _Cut(p_value=level)
        return _OfKind(scores, excluded, (low, high), cuts)

    def _write(self, kinds: Sequence["_OfKind"]) -> None:
        """Writes a file a part."""
        for number, (start, stop) in enumerate(self.parts):
            columns: dict[str, Any] = {"example_id": np.arange(start, stop, dtype=np.int64)}
            if self.source.labels is not None:
                columns["label"] = self.source.labels[start:stop]
            columns["probe"] = is_probe = self._is_probe(start, stop)
            for of_kind in kinds:
                columns |= of_kind.columns(start, stop, is_probe, self.config.scoring.transform)
            path = self.workdir / "scores" / f"part-{number:05d}-of-{len(self.parts):05d}.parquet"
            write_atomically(path, partial(pq.write_table, pa.table(columns)))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[phase] = time.monotonic() - started


@dataclass
class _Cut:
    """Which examples a rule removes: those above a distance and the first `ties` at it, up to a p-value, or members."""

    distance: float | None = None
    ties: int = 0
    p_value: float | None = None
    members: Bool[np.ndarray, "N"] | None = None
    removed: int = 0
    ties_taken: int = 0

    def apply(
        self,
        start: int,
        values: Float[np.ndarray, "M"],
        p_values: Float[np.ndarray, "M"],
        eligible: Bool[np.ndarray, "M"],
    ) -> Bool[np.ndarray, "M"]:
        """Returns what is removed of the part that begins there, and counts it; parts come in order."""
        if self.members is not None:
            removed = eligible & self.members[start : start + len(values)]
        elif self.distance is None:
            removed = eligible & (p_values <= self.p_value)
        else:
            tied = np.flatnonzero(eligible & (values == self.distance))[: self.ties - self.ties_taken]
            self.ties_taken += len(tied)
            removed = eligible & (values > self.distance)
            removed[tied] = True
        self.removed += int(removed.sum())
        return removed


@dataclass
class _OfKind:
    """What is known of one kind of trajectory before the parts are written.

    Attributes:
      scores: of the kind.
      excluded: how many are left out.
      between: the smallest and the largest score.
      cuts: of each rule.
    """

    scores: KindScores
    excluded: int
    between: tuple[float, float]
    cuts: dict[str, _Cut]

    def summary(self) -> dict[str, Any]:
        """Returns what scoring.json says of this kind."""
        rules = {
            rule: {"removed": cut.removed, "distance": cut.distance, "p_value": cut.p_value}
            for rule, cut in self.cuts.items()
        }
        return {"k": list(self.scores.k), "excluded": self.excluded, "between": self.between, "rules": rules}

    def columns(self, start: int, stop: int, is_probe: Bool[np.ndarray, "M"], transform: str) -> Mapping[str, Any]:
        """Returns the columns of a part's file."""
        kind = self.scores.kind
        values = self.scores.values(start, stop)
        there = np.isfinite(values)
        shown = anomaly_scores(
            values, transform="linear" if self.scores.is_logarithm else transform, between=self.between
        )
        p_values = np.ones(len(values))
        p_values[there] = conformal_p_values(values[there], self.scores.probe_scores)
        columns: dict[str, Any] = {
            f"distance_{kind}": pa.array(values, mask=~there),
            f"score_{kind}": pa.array(shown, mask=~there),
            f"p_value_{kind}": pa.array(p_values, mask=~there),
        }
        for rule, cut in self.cuts.items():
            columns[f"removed_{kind}_{rule}"] = cut.apply(start, values, p_values, there & ~is_probe)
        return columns


def _settings(source: Source, probes: Probes, overrides: Sequence[str]) -> ConfigDict:
    """Returns the default settings for the kinds that there are, with overrides of scoring and rejection."""
    ours = source.trajectories
    config = default_config()
    config.unlock()
    config.recording.kinds = tuple(kind for kind in ours.kinds if kind != "loss")
    config.recording.epochs = max(3, ours.num_epochs)
    config.recording.schedule_epochs = max(config.recording.schedule_epochs, config.recording.epochs)
    there = available_kinds(ours.kinds)
    config.scoring.kinds = tuple(kind for kind in KINDS if kind in there)
    config.probes.count = len(probes)
    config.retraining.variants = ()

    plain = to_dict(config)
    config = override(config, overrides)
    others = [
        group for group, value in to_dict(config).items() if value != plain[group] and group not in _SCORING_GROUPS
    ]
    if config.scoring.epochs > ours.num_epochs:
        raise UsageError(f"scoring.epochs = {config.scoring.epochs}, and {ours.num_epochs} were recorded")
    asked = ["the rule clusters"] if "clusters" in config.rejection.rules else []
    asked += ["scoring.by_class = True"] if config.scoring.by_class else []
    for what in asked:
        if ours.labels is None:
            raise UsageError(
                f"{what} compares examples with their class, and these trajectories have no labels: save a store with"
                " them, by TrajectoryRecorder.save(folder, labels=...)"
            )
        if probes.own is not None:
            raise UsageError(f"{what} needs the probes' ids in place of their trajectories")
    if others:
        raise UsageError(f"badloss score changes scoring.* and rejection.* only, not {', '.join(others)}")
    return config


def _claim(workdir: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """Begins in a new folder, or goes on in that of the same scoring; returns its results if it is finished."""
    path = workdir / "scoring.json"
    if not path.is_file():
        check_free(workdir)
        write_text(path, json.dumps(about, indent=2) + "\n")
        return None

    before = read_json(path)
    plain = json.loads(json.dumps(about))
    other = [name for name, value in plain.items() if before.get(name) != value]
    finished = "kinds" in before
    begun = (workdir / "distances").is_dir()
    # What was computed when no example was to be left out, holds none that would be.
    mended = other == ["exclude_non_finite"] and plain["exclude_non_finite"]
    if other and not finished and (mended or not begun):
        write_text(path, json.dumps(about, indent=2) + "\n")
    elif other:
        raise UsageError(f"--workdir {workdir} holds scores with other {', '.join(other)}: choose another folder")
    return before if finished else None
