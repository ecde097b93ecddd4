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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh
from jaxtyping import Bool
from ml_collections import ConfigDict

from badloss_jax.config import KINDS, default_config, digest, override, parse_rule, to_dict
from badloss_jax.defenses.badloss import find_attacks
from badloss_jax.errors import DataError, UsageError
from badloss_jax.files import locked, map_array, read_json, sha256_of, write_atomically, write_text
from badloss_jax.progress import Progress
from badloss_jax.report.results import environment
from badloss_jax.scoring import (
    anomaly_scores,
    benjamini_hochberg_threshold,
    conformal_p_values,
    filter_epochs,
    in_attacks,
    knn_distances,
    largest_threshold,
    leave_one_out_distances,
    mean_standardised,
)
from badloss_jax.scoring.distances import RowRange, Rows
from badloss_jax.trajectories.store import TrajectoryStore

_PART = 2**20  # examples
_FORMAT = "badloss_jax.scoring/1"


def score_stored(
    trajectories: Path, probes: Path | None, workdir: Path, overrides: Sequence[str], progress: Progress, mesh: Mesh, *,
    exclude_non_finite: bool = False,
) -> dict[str, Any]:  # fmt: skip
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
    source = _open(trajectories)
    given = _Probes.read(probes, source) if probes else _Probes(source.marked_probes())
    config = _settings(source, len(given), overrides, own_probes=given.rows is None)
    if exclude_non_finite and "clusters" in config.rejection.rules:
        raise UsageError("the rule clusters needs every example's trajectories, so nothing can be left out: use it"
                         " without --exclude_non_finite")  # fmt: skip
    about = {
        "format": _FORMAT,
        "trajectories": source.identity,
        "probes": digest(sorted(given.ids.tolist()), sha256_of(probes) if probes and given.rows is not None else ""),
        "settings": {name: to_dict(config)[name] for name in ("scoring", "rejection")},
        "exclude_non_finite": exclude_non_finite,
    }
    with locked(workdir):
        before = _claim(workdir, about)
        if before:
            progress.note(f"{workdir} holds these scores already")
            return before
        scoring = _Scoring(source, given, workdir, config, progress, mesh, exclude_non_finite)
        results = about | scoring.run()
        write_text(workdir / "scoring.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
        shutil.rmtree(workdir / "distances", ignore_errors=True)
    return results


@dataclass(frozen=True)
class _Source:
    """Where trajectories come from: a store, or an array [N, T, ...] mapped from a file."""

    num_examples: int
    kinds: tuple[str, ...]
    identity: str
    store: TrajectoryStore | None = None
    array: np.ndarray | None = None

    def rows(self, kind: str, epochs: np.ndarray | None = None) -> Rows:
        if self.store:
            return self.store.rows(kind, epochs, check=False)
        assert self.array is not None
        return self.array if epochs is None or len(epochs) == self.array.shape[1] else _Columns(self.array, epochs)

    def marked_probes(self) -> np.ndarray:
        if self.store is None:
            raise UsageError("--probes FILE is needed: a .npy file of trajectories does not say which are clean")
        return self.store.probe_ids()


@dataclass(frozen=True)
class _Columns:
    """Some columns of an array on disk."""

    array: np.ndarray
    epochs: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[0], len(self.epochs), *self.array.shape[2:]

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.array[rows][:, self.epochs]


@dataclass(frozen=True)
class _Probes:
    """The probes: ids of examples, or trajectories of their own."""

    ids: np.ndarray
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids if self.rows is None else self.rows)

    @classmethod
    def read(cls, path: Path, source: _Source) -> "_Probes":
        if path.suffix == ".txt":
            try:
                values = np.array([int(word) for word in path.read_text("utf-8").split()], np.int64)
            except (OSError, ValueError, OverflowError) as error:
                raise DataError(f"--probes {path} is missing or damaged: {error}") from error
        else:
            values = map_array(path)
        if values.dtype.kind == "f":
            if len(source.kinds) > 1:
                raise UsageError(f"--probes {path} has trajectories of one kind, and {len(source.kinds)} kinds are"
                                 " stored: give the probes' ids")  # fmt: skip
            expected = source.rows(source.kinds[0]).shape
            if values.shape[1:] != expected[1:]:
                raise UsageError(f"--probes {path} is {values.shape}, and the trajectories are {expected}")
            return cls(np.zeros(0, np.int64), values)
        if values.dtype.kind not in "iu" or values.ndim != 1 or not len(values):
            raise UsageError(f"--probes {path} is {values.dtype} {values.shape}: expected ids, or trajectories")
        ids, counts = np.unique(values, return_counts=True)
        if len(ids) < len(values):
            raise UsageError(f"--probes {path} names {ids[counts > 1][0]} twice")
        outside = ids[(ids < 0) | (ids >= source.num_examples)]
        if len(outside):
            raise UsageError(f"--probes {path} names {outside[0]}: expected ids from 0 to {source.num_examples - 1}")
        return cls(ids.astype(np.int64))


@dataclass
class _Scoring:
    """One scoring on its way; files of distances are what it goes on with."""

    source: _Source
    probes: _Probes
    workdir: Path
    config: ConfigDict
    progress: Progress
    mesh: Mesh
    exclude: bool
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        scoring = self.config.scoring
        epochs: np.ndarray | None = None
        with self._timed("filter"):
            first = np.arange(scoring.epochs) if scoring.epochs else None
            if "loss" in self.source.kinds:
                epochs = filter_epochs(self.source.rows("loss", first), exclude_non_finite=self.exclude)
            else:
                epochs = first
        needed = {
            (part, scoring[kind].k or scoring[part].k): None
            for kind in scoring.kinds
            for part in (("features", "ranked") if kind == "combined" else (kind,))
        }
        of_probes = {}
        with self._timed("distances"):
            for kind, k in needed:
                rows = self.source.rows(kind, epochs)
                probes = self._probe_rows(rows, epochs)
                of_probes[kind, k] = leave_one_out_distances(probes, k)
                self._measure(kind, k, rows, probes)
        if "clusters" in self.config.rejection.rules:
            with self._timed("clusters"):
                _ = self.members
        with self._timed("thresholds"):
            kinds = {kind: _Kind.find(self, kind, of_probes) for kind in scoring.kinds}
        with self._timed("writing"):
            self._write(kinds)
        return {
            "num_examples": self.source.num_examples,
            "probe_count": len(self.probes),
            "epochs_kept": None if epochs is None else epochs.tolist(),
            "kinds": {kind: found.summary() for kind, found in kinds.items()},
            "parts": len(self.parts),
            "seconds": self.seconds,
            "environment": environment(),
        }

    @cached_property
    def members(self) -> Bool[np.ndarray, "N"]:
        """Which examples are in attacks; one class after the other is read."""
        store = self.source.store
        assert store is not None
        self.progress.note("looking for attacks, class by class ...")
        clusters, _ = find_attacks(store, self.probes.ids, self.config.scoring, self.config.seed, self.mesh)
        return in_attacks(clusters, store.num_examples)

    @property
    def parts(self) -> list[tuple[int, int]]:
        count = self.source.num_examples
        return [(start, min(count, start + _PART)) for start in range(0, count, _PART)]

    def distances(self, kind: str, k: int, number: int) -> np.ndarray | None:
        """Maps a part's distances, NaN where they are left out; None if they are not there."""
        path, (start, stop) = self._path(kind, k, number), self.parts[number]
        try:
            values = map_array(path)
        except DataError:
            return None
        return values if values.shape == (stop - start,) and values.dtype.kind == "f" else None

    def is_probe(self, number: int) -> np.ndarray:
        start, stop = self.parts[number]
        marked = np.zeros(stop - start, bool)
        marked[self.probes.ids[(self.probes.ids >= start) & (self.probes.ids < stop)] - start] = True
        return marked

    def _probe_rows(self, rows: Rows, epochs: np.ndarray | None) -> np.ndarray:
        if self.probes.rows is None:
            return np.asarray(rows[self.probes.ids])
        return self.probes.rows if epochs is None else self.probes.rows[:, epochs]

    def _measure(self, kind: str, k: int, rows: Rows, probes: np.ndarray) -> None:
        self.progress.phase(f"{kind}, k = {k}")
        missing = [number for number in range(len(self.parts)) if self.distances(kind, k, number) is None]
        total = self.source.num_examples
        self.progress.begin(total, total - sum(np.subtract(*self.parts[number][::-1]) for number in missing))
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
            write_atomically(self._path(kind, k, number), partial(np.save, arr=values, allow_pickle=False))
            self.progress.advance(stop - start, f"part {number + 1}/{len(self.parts)}")
            self.progress.say(f"part {number + 1}/{len(self.parts)}")
        self.progress.end()

    def _path(self, kind: str, k: int, number: int) -> Path:
        return self.workdir / "distances" / f"{kind}-{k}" / f"part-{number:05d}.npy"

    def _write(self, kinds: dict[str, "_Kind"]) -> None:
        labels = self.source.store.labels() if self.source.store else None
        ties = {(kind, rule): cut.ties for kind, found in kinds.items() for rule, cut in found.cuts.items()}
        for number, (start, stop) in enumerate(self.parts):
            columns: dict[str, Any] = {"example_id": np.arange(start, stop, dtype=np.int64)}
            if labels is not None:
                columns["label"] = labels[start:stop]
            columns["probe"] = is_probe = self.is_probe(number)
            for kind, found in kinds.items():
                values = found.values(number)
                there = np.isfinite(values)
                columns[f"distance_{kind}"] = pa.array(values, mask=~there)
                scores = anomaly_scores(values, transform=found.transform, between=found.between)
                columns[f"score_{kind}"] = pa.array(scores, mask=~there)
                p_values = np.ones(len(values))
                p_values[there] = conformal_p_values(values[there], found.of_probes)
                columns[f"p_value_{kind}"] = pa.array(p_values, mask=~there)
                for rule, cut in found.cuts.items():
                    removed, ties[kind, rule] = cut.apply(start, values, p_values, there & ~is_probe, ties[kind, rule])
                    cut.removed += int(removed.sum())
                    columns[f"removed_{kind}_{rule}"] = removed
            path = self.workdir / "scores" / f"part-{number:05d}-of-{len(self.parts):05d}.parquet"
            write_atomically(path, partial(pq.write_table, pa.table(columns)))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[phase] = time.monotonic() - started


@dataclass
class _Cut:
    """Which examples a rule removes: those above a distance and the first `ties` at it, up to a p-value, or [N]."""

    distance: float | None = None
    ties: int = 0
    p_value: float | None = None
    members: np.ndarray | None = None
    removed: int = 0

    def apply(
        self, start: int, values: np.ndarray, p_values: np.ndarray, eligible: np.ndarray, ties: int
    ) -> tuple[np.ndarray, int]:
        """Returns what is removed of the part that begins there, and how many ties are left for the parts after it."""
        if self.members is not None:
            return eligible & self.members[start : start + len(values)], ties
        if self.distance is None:
            return eligible & (p_values <= self.p_value), ties
        tied = np.flatnonzero(eligible & (values == self.distance))[:ties]
        removed = eligible & (values > self.distance)
        removed[tied] = True
        return removed, ties - len(tied)


@dataclass
class _Kind:
    """What is known of one kind of trajectory before the parts are written."""

    scoring: _Scoring
    name: str
    bases: list[tuple[str, int]]  # the kinds whose distances it stands on, with their k
    of_each: list[np.ndarray]
    of_probes: np.ndarray
    excluded: int = 0
    between: tuple[float, float] = (np.inf, -np.inf)
    cuts: dict[str, _Cut] = field(default_factory=dict)

    @classmethod
    def find(cls, scoring: _Scoring, name: str, of_probes: dict[tuple[str, int], np.ndarray]) -> "_Kind":
        """Walks over the distances, and finds every rule's threshold."""
        settings = scoring.config.scoring
        parts = ("features", "ranked") if name == "combined" else (name,)
        bases = [(part, settings[name].k or settings[part].k) for part in parts]
        of_each = [of_probes[key] for key in bases]
        together = mean_standardised(of_each, of_each)[1] if len(bases) > 1 else of_each[0]
        found = cls(scoring, name, bases, of_each, together)
        found._look()
        return found

    @property
    def transform(self) -> str:
        """Of scores for display; what is combined are logarithms already."""
        return "linear" if len(self.bases) > 1 else self.scoring.config.scoring.transform

    def values(self, number: int) -> np.ndarray:
        """Returns a part's distances, or what takes their place; NaN where they are left out."""
        distances = [self.scoring.distances(*key, number) for key in self.bases]
        if any(part is None for part in distances):
            raise DataError(f"{self.scoring.workdir / 'distances'} lacks a part that was there: run the same again")
        there = [part for part in distances if part is not None]
        return mean_standardised(there, self.of_each)[0] if len(there) > 1 else np.asarray(there[0])

    def summary(self) -> dict[str, Any]:
        """Returns what scoring.json says of this kind."""
        rules = {
            rule: {"removed": cut.removed, "distance": cut.distance, "p_value": cut.p_value}
            for rule, cut in self.cuts.items()
        }
        return {"k": [k for _, k in self.bases], "excluded": self.excluded, "between": self.between, "rules": rules}

    def _eligible(self) -> Iterator[np.ndarray]:
        for number in range(len(self.scoring.parts)):
            values = self.values(number)
            yield values[np.isfinite(values) & ~self.scoring.is_probe(number)]

    def _look(self) -> None:
        counts = np.zeros(len(self.of_probes) + 1, np.int64)  # of each p-value there can be
        count = 0
        for number in range(len(self.scoring.parts)):
            values = self.values(number)
            there = np.isfinite(values)
            count += int(there.sum())
            self.excluded += int((~there).sum())
            if there.any():
                low, high = self.between
                self.between = (min(low, float(values[there].min())), max(high, float(values[there].max())))
            p_values = conformal_p_values(values[there & ~self.scoring.is_probe(number)], self.of_probes)
            counts += np.bincount(np.rint(p_values * len(counts)).astype(int) - 1, minlength=len(counts))
        if not count:
            raise DataError(f"no trajectory of kind {self.name} is finite")
        rejection = self.scoring.config.rejection
        for text in rejection.rules:
            rule, given = parse_rule(text)
            if rule == "clusters":
                self.cuts[text] = _Cut(members=self.scoring.members)
                continue
            level = rejection[rule] if given is None else given
            if rule == "fraction":
                wanted = min(math.floor(level * count), int(counts.sum()))
                distance, ties = largest_threshold(self._eligible, wanted)
                # Where nothing is removed, the threshold is the largest distance, and none that equals it goes.
                self.cuts[text] = _Cut(distance if wanted else self.between[1], ties)
            else:
                smallest = benjamini_hochberg_threshold(counts, level) if rule == "fdr" else None
                self.cuts[text] = _Cut(p_value=level if smallest is None else smallest / len(counts))


def _settings(source: _Source, num_probes: int, overrides: Sequence[str], *, own_probes: bool) -> ConfigDict:
    """Returns the default settings for the kinds that there are, with overrides of scoring and rejection."""
    needs = {"combined": {"features", "ranked"}}
    kinds = tuple(kind for kind in KINDS if needs.get(kind, {kind}) <= set(source.kinds))
    config = default_config()
    config.unlock()
    config.recording.kinds = tuple(kind for kind in source.kinds if kind != "loss")
    recorded = source.rows(source.kinds[0]).shape[1]
    config.recording.epochs = max(3, recorded)
    config.recording.schedule_epochs = max(config.recording.schedule_epochs, config.recording.epochs)
    config.scoring.kinds = kinds
    config.probes.count = num_probes
    config.retraining.variants = ()
    plain = to_dict(config)
    config = override(config, overrides)
    changed = [group for group, value in to_dict(config).items() if value != plain[group]]
    others = [group for group in changed if group not in ("scoring", "rejection")]
    if config.scoring.epochs > recorded:
        raise UsageError(f"scoring.epochs = {config.scoring.epochs}, and {recorded} were recorded")
    if config.scoring.by_class:
        raise UsageError("scoring.by_class = True needs all labels at once, and stored trajectories are scored part by"
                         " part: score them by `badloss score --workdir OUT` of their run")  # fmt: skip
    if "clusters" in config.rejection.rules and (source.store is None or (source.store.labels() < 0).any()):
        raise UsageError("the rule clusters compares examples with their class, and these trajectories have no labels:"
                         " save a store with them, by TrajectoryRecorder.save(folder, labels=...)")  # fmt: skip
    if "clusters" in config.rejection.rules and not own_probes:
        raise UsageError("the rule clusters needs the probes' ids in place of their trajectories")
    if others:
        raise UsageError(f"badloss score changes scoring.* and rejection.* only, not {', '.join(others)}")
    return config


def _open(path: Path) -> _Source:
    if path.is_dir():
        store = TrajectoryStore.open(path)
        if not store.complete:
            raise DataError(f"{path} is not complete: what records it is still at work, or did not come to the end")
        identity = digest(store.recording_hash, store.num_examples, store.num_epochs, dict(store.layout), _stamps(path))
        return _Source(store.num_examples, tuple(store.layout), identity, store=store)
    if path.suffix != ".npy":
        raise UsageError(f"--trajectories {path}: expected a folder of recorded trajectories, or a .npy file")
    array = map_array(path)
    if array.dtype.kind != "f" or array.ndim not in (2, 3) or not array.size:
        raise DataError(
            f"--trajectories {path} is {array.dtype} {array.shape}: expected floats [N, T] or [N, T, width]"
        )
    kind = "loss" if array.ndim == 2 else "features"
    return _Source(len(array), (kind,), digest(list(array.shape), str(array.dtype), _stamps(path)), array=array)


def _stamps(path: Path) -> list[Any]:
    """Returns name, size and time of the files, to see that they are those that a scoring began with."""
    files = sorted(path.rglob("*.npy")) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _claim(workdir: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """Begins in a new folder, or goes on in that of the same scoring; returns its results if it is finished."""
    path = workdir / "scoring.json"
    if not path.is_file():
        if any(not entry.name.startswith(".") for entry in workdir.iterdir()):
            raise UsageError(f"--workdir {workdir} holds other files: choose an empty or a new folder")
        write_text(path, json.dumps(about, indent=2) + "\n")
        return None
    before = read_json(path)
    plain = json.loads(json.dumps(about))
    other = [name for name, value in plain.items() if before.get(name) != value]
    begun = (workdir / "distances").is_dir()
    # What was computed when no example was to be left out, holds none that would be.
    mended = other == ["exclude_non_finite"] and plain["exclude_non_finite"]
    if other and "kinds" not in before and (mended or not begun):
        write_text(path, json.dumps(about, indent=2) + "\n")
    elif other:
        raise UsageError(f"--workdir {workdir} holds scores with other {', '.join(other)}: choose another folder")
    return before if "kinds" in before else None
