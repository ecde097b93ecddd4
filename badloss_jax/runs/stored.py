"""What `badloss score --trajectories` reads: a store or a .npy file, and the probes; and distances on their way."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import map_array, write_atomically
from badloss_jax.core.hashing import digest
from badloss_jax.scoring import Probes, Trajectories
from badloss_jax.trajectories.store import TrajectoryStore


@dataclass(frozen=True)
class Source:
    """Trajectories, and where they come from.

    Attributes:
      trajectories: nothing of them is read before it is indexed.
      identity: hash of the files, to see that they are those that a scoring began with.
      marked: int64 [P], the probes that a store marks; None of a .npy file.
      labels: int32 [N], as stored, -1 where they are not known; None of a .npy file.
    """

    trajectories: Trajectories
    identity: str
    marked: Int[np.ndarray, "P"] | None = None
    labels: Int[np.ndarray, "N"] | None = None


def open_source(path: Path) -> Source:
    """Maps trajectories of any origin.

    Args:
      path: a trajectory store, or a .npy file: floats [N, T], taken for losses, or [N, T, width], for features.

    Returns:
      The trajectories, of which nothing is read yet.

    Raises:
      UsageError: it is neither.
      DataError: it is damaged, or not complete.
    """
    if path.is_dir():
        return _open_store(path)
    if path.suffix != ".npy":
        raise UsageError(f"--trajectories {path}: expected a folder of recorded trajectories, or a .npy file")

    array = map_array(path)
    if array.dtype.kind != "f" or array.ndim not in (2, 3) or not array.size:
        raise DataError(
            f"--trajectories {path} is {array.dtype} {array.shape}: expected floats [N, T] or [N, T, width]"
        )

    kind = "loss" if array.ndim == 2 else "features"
    trajectories = Trajectories(len(array), array.shape[1], (kind,), lambda _, epochs: _Columns(array, epochs))
    identity = digest(list(array.shape), str(array.dtype), _stamps([path]))
    return Source(trajectories, identity)


def _open_store(path: Path) -> Source:
    store = TrajectoryStore.open(path)
    if not store.complete:
        raise DataError(f"{path} is not complete: what records it is still at work, or did not come to the end")
    stamps = _stamps(sorted(path.rglob("*.npy")))
    identity = digest(store.recording_hash, store.num_examples, store.num_epochs, dict(store.layout), stamps)

    # -1 stands for a label that nobody gave: then nothing can be compared by class.
    labels = store.labels()
    known_labels = None if (labels < 0).any() else labels
    trajectories = Trajectories(
        store.num_examples,
        store.num_epochs,
        tuple(store.layout),
        lambda kind, epochs: store.rows(kind, epochs, check=False),
        known_labels,
    )
    return Source(trajectories, identity, store.probe_ids(), labels)


def _stamps(files: list[Path]) -> list[Any]:
    """Returns name, size and time of files, which are read faster than all that they hold."""
    stamps = []
    for file in files:
        stat = file.stat()
        stamps.append([file.name, stat.st_size, stat.st_mtime_ns])
    return stamps


@dataclass(frozen=True)
class _Columns:
    """Some columns of an array on disk."""

    array: np.ndarray
    epochs: Int[np.ndarray, "E"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[0], len(self.epochs), *self.array.shape[2:]

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def __getitem__(self, rows: Any) -> np.ndarray:
        chosen = self.array[rows]
        if len(self.epochs) == self.array.shape[1]:
            return chosen
        return chosen[:, self.epochs]


def read_probes(path: Path | None, source: Source) -> Probes:
    """Reads the probes.

    Args:
      path: a .npy or .txt file of ids, or a .npy file of their own trajectories [P, T] or [P, T, width]; None takes
        those that the store marks.
      source: of the trajectories.

    Returns:
      The probes, by their ids if they have some.

    Raises:
      UsageError: they do not fit the trajectories, or are not given.
      DataError: the file is missing or damaged.
    """
    if path is None:
        if source.marked is None:
            raise UsageError("--probes FILE is needed: a .npy file of trajectories does not say which are clean")
        return Probes(source.marked)

    values = _integers_of(path) if path.suffix == ".txt" else map_array(path)
    if values.dtype.kind == "f":
        return _own_trajectories(path, values, source.trajectories)
    if values.dtype.kind not in "iu" or values.ndim != 1 or not len(values):
        raise UsageError(f"--probes {path} is {values.dtype} {values.shape}: expected ids, or trajectories")

    # Ascending: scores must not depend on the order of a list.
    ids, counts = np.unique(values, return_counts=True)
    if len(ids) < len(values):
        raise UsageError(f"--probes {path} names {ids[counts > 1][0]} twice")

    num_examples = source.trajectories.num_examples
    outside = ids[(ids < 0) | (ids >= num_examples)]
    if len(outside):
        raise UsageError(f"--probes {path} names {outside[0]}: expected ids from 0 to {num_examples - 1}")
    return Probes(ids.astype(np.int64))


def _integers_of(path: Path) -> Int[np.ndarray, "P"]:
    try:
        return np.array([int(word) for word in path.read_text("utf-8").split()], np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(f"--probes {path} is missing or damaged: {error}") from error


def _own_trajectories(path: Path, values: np.ndarray, trajectories: Trajectories) -> Probes:
    """Returns probes that are no examples of the set, but come with trajectories of their own."""
    kinds = trajectories.kinds
    if len(kinds) > 1:
        raise UsageError(
            f"--probes {path} has trajectories of one kind, and {len(kinds)} kinds are stored: give the probes' ids"
        )
    expected = trajectories.rows(kinds[0], np.arange(trajectories.num_epochs)).shape
    if values.shape[1:] != expected[1:]:
        raise UsageError(f"--probes {path} is {values.shape}, and the trajectories are {expected}")
    return Probes(np.zeros(0, np.int64), values)


@dataclass(frozen=True)
class PartFiles:
    """Distances [N] in files, one a part; NaN where they are left out.

    Attributes:
      folder: of the files.
      parts: (start, stop) of each, in order.
    """

    folder: Path
    parts: Sequence[tuple[int, int]]

    def __len__(self) -> int:
        return self.parts[-1][1]

    def __getitem__(self, rows: slice) -> Float[np.ndarray, "M"]:
        begin, end, _ = rows.indices(len(self))
        pieces = []
        for number, (start, stop) in enumerate(self.parts):
            if start >= end or stop <= begin:
                continue

            values = self._read(number)
            if values is None:
                raise DataError(f"{self.folder.parent} lacks a part that was there: run the same again")
            pieces.append(values[max(begin - start, 0) : end - start])

        # A range within a part, as most are, is not copied.
        if len(pieces) == 1:
            return np.asarray(pieces[0])
        return np.concatenate(pieces)

    def missing(self) -> list[int]:
        """Returns the numbers of the parts that are not there."""
        return [number for number in range(len(self.parts)) if self._read(number) is None]

    def write(self, number: int, values: Float[np.ndarray, "M"]) -> None:
        """Writes a part.

        Args:
          number: of the part.
          values: its distances [M].
        """
        write_atomically(self._path(number), partial(np.save, arr=values, allow_pickle=False))

    def _read(self, number: int) -> np.ndarray | None:
        start, stop = self.parts[number]
        try:
            values = map_array(self._path(number))
        except DataError:
            return None

        # What does not fit is measured again.
        if values.shape != (stop - start,) or values.dtype.kind != "f":
            return None
        return values

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.npy"
