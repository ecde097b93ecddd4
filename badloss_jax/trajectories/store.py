"""The trajectory store on disk: time-major, a sharded column a kind and epoch, written once the epoch is over.

In its folder lie:

    DIR/about.json                              format, hash of the recording, shapes and dtypes
    DIR/labels.npy                              int32 [N], as trained on
    DIR/probes.npy                              int64 [P], the probes' ids, ascending
    DIR/loss/epoch_0000-00000-of-00002.npy      float32 [N'], the first of two shards, which hold the rows in order
    DIR/logits/epoch_0000-00000-of-00002.npy    float16 [N', K]; likewise prob, ranked, features

Every process writes the rows of its own devices. Readers map the files, and take any range of rows from any sharding.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from badloss_jax.core.errors import DataError
from badloss_jax.core.files import map_array, read_json, write_atomically, write_text

_FORMAT = "badloss_jax.trajectories/2"
_SHARD = re.compile(r"epoch_(\d+)-(\d+)-of-(\d+)")  # the stem of a file: the epoch, which shard, how many there are
_BLOCK = 2**12  # rows


@dataclass(frozen=True)
class TrajectoryStore:
    """The recorded trajectories of N examples over T epochs.

    Attributes:
      folder: where they lie.
      recording_hash: of everything that could change them.
      num_examples: N.
      num_epochs: T, when complete.
      layout: kind -> (shape per example and epoch, dtype name).
    """

    folder: Path
    recording_hash: str
    num_examples: int
    num_epochs: int
    layout: Mapping[str, tuple[tuple[int, ...], str]]

    @classmethod
    def create(
        cls,
        folder: Path,
        recording_hash: str,
        labels: Int[np.ndarray, "N"],
        is_probe: Bool[np.ndarray, "N"],
        num_epochs: int,
        layout: Mapping[str, tuple[tuple[int, ...], Any]],
    ) -> "TrajectoryStore":
        """Starts an empty store; an older one in the folder is removed.

        Args:
          folder: where it will lie.
          recording_hash: of everything that could change the trajectories.
          labels: int [N], as trained on.
          is_probe: bool [N].
          num_epochs: T.
          layout: kind -> (shape per example and epoch, dtype), as `Kinds.layout` returns it.

        Returns:
          The store, with all but the columns.
        """
        # Columns of an older recording would else be taken for this one's.
        if folder.exists():
            shutil.rmtree(folder)

        plain = {kind: (tuple(shape), np.dtype(dtype).name) for kind, (shape, dtype) in layout.items()}
        store = cls(folder, recording_hash, len(labels), num_epochs, plain)
        about = {
            "format": _FORMAT,
            "recording_hash": recording_hash,
            "num_examples": store.num_examples,
            "num_epochs": num_epochs,
            "layout": plain,
        }

        _save_array(folder / "labels.npy", np.asarray(labels, np.int32))
        _save_array(folder / "probes.npy", np.flatnonzero(is_probe).astype(np.int64))
        # Last, so that a folder that has one is a store.
        write_text(folder / "about.json", json.dumps(about, indent=2))
        return store

    @classmethod
    def open(cls, folder: Path) -> "TrajectoryStore":
        """Opens a store.

        Raises:
          DataError: there is none, or `about.json` is damaged.
        """
        try:
            about = read_json(folder / "about.json")
            if about["format"] != _FORMAT:
                raise DataError(f"format {about['format']!r}, expected {_FORMAT!r}")

            layout = {
                str(kind): (tuple(int(n) for n in shape), np.dtype(dtype).name)
                for kind, (shape, dtype) in about["layout"].items()
            }
            return cls(
                folder,
                num_examples=int(about["num_examples"]),
                num_epochs=int(about["num_epochs"]),
                recording_hash=str(about["recording_hash"]),
                layout=layout,
            )
        except FileNotFoundError as error:
            raise DataError(f"{folder} holds no recorded trajectories") from error
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise DataError(f"{folder / 'about.json'} is damaged: {error}") from error

    @property
    def complete(self) -> bool:
        """Whether all shards of all epochs of all kinds are there."""
        return all(map(self._has, range(self.num_epochs)))

    def finished(self) -> "TrajectoryStore":
        """Returns the store of the epochs that are over: the first ones, where the recording is not at its end.

        Raises:
          DataError: an epoch is missing, and later ones are there.
        """
        there = [self._has(epoch) for epoch in range(self.num_epochs)]
        count = sum(there)
        if not all(there[:count]):
            raise DataError(f"{self.folder} is damaged: it has epochs later than {there.index(False)}, but not this")
        return replace(self, num_epochs=count)

    def write_epoch(self, epoch: int, columns: Mapping[str, np.ndarray], shard: int = 0, shards: int = 1) -> None:
        """Writes one epoch's column of every kind, or one shard of it.

        Args:
          epoch: that is over.
          columns: kind -> [N, ...], or the rows of the shard.
          shard: which one, from 0; the shards hold the rows in order.
          shards: how many there are.
        """
        for kind, column in columns.items():
            _save_array(self.folder / kind / f"epoch_{epoch:04d}-{shard:05d}-of-{shards:05d}.npy", column)

    def keep_first(self, count: int) -> None:
        """Removes all epochs but the first ones, such as those that a training had reached after its last checkpoint.

        Args:
          count: how many stay.

        Raises:
          DataError: one of these is missing, or a file cannot be removed.
        """
        lacking = [epoch for epoch in range(count) if not self._has(epoch)]
        if lacking:
            raise DataError(f"{self.folder} lacks epoch {lacking[0]}")

        for kind in self.layout:
            for path in (self.folder / kind).glob("epoch_*.npy"):
                name = _SHARD.fullmatch(path.stem)
                if not name or int(name[1]) < count:
                    continue
                try:
                    path.unlink()
                except OSError as error:
                    raise DataError(f"{path} cannot be removed: {error}") from error

    def rows(self, kind: str, epochs: Int[np.ndarray, "E"] | None = None, *, check: bool = True) -> "StoredRows":
        """Maps the chosen epochs of a kind, by default all; nothing is read before it is indexed.

        Args:
          kind: of `layout`.
          epochs: in the order wanted.
          check: raise DataError on reading what was not recorded (NaN), or is not finite.

        Returns:
          Rows to index, [N, E] or [N, E, width].

        Raises:
          DataError: the kind was not recorded, or a shard is missing, damaged or of another shape.
        """
        if kind not in self.layout:
            raise DataError(f"{self.folder} has no trajectories of kind {kind!r}, only {', '.join(self.layout)}")
        if epochs is None:
            epochs = np.arange(self.num_epochs)

        # All columns are looked at now: what is missing is said before hours of work, not after.
        width, dtype_name = self.layout[kind]
        columns = [self._column(kind, int(epoch)) for epoch in epochs]
        return StoredRows(self.num_examples, width, dtype_name, columns, check)

    def read(self, kind: str, epochs: Int[np.ndarray, "E"] | None = None) -> Float[np.ndarray, "N E ..."]:
        """Reads the chosen epochs of a kind, by default all.

        Args:
          kind: of `layout`.
          epochs: in the order wanted.

        Returns:
          [N, E] or [N, E, width], in the dtype that is stored.

        Raises:
          DataError: as `rows`, or a value is not finite.
        """
        return self.rows(kind, epochs)[:]

    def labels(self) -> Int[np.ndarray, "N"]:
        """Maps the labels that were trained on, int32.

        Raises:
          DataError: the file is missing or damaged.
        """
        path = self.folder / "labels.npy"
        labels = map_array(path)
        if labels.shape != (self.num_examples,) or labels.dtype != np.int32:
            raise DataError(f"{path} does not hold {self.num_examples} labels")
        return labels

    def probe_ids(self) -> Int[np.ndarray, "P"]:
        """Reads the ids of the probes, ascending.

        Raises:
          DataError: the file is missing or damaged.
        """
        path = self.folder / "probes.npy"
        ids = np.array(map_array(path))

        right = ids.ndim == 1 and ids.dtype == np.int64
        # Ascending, and so without one twice, from 0 to N - 1.
        if not right or (np.diff(ids, prepend=-1, append=self.num_examples) <= 0).any():
            raise DataError(f"{path} does not hold ids, ascending, of {self.num_examples} examples")
        return ids

    def mark_probes(self, ids: Int[np.ndarray, "P"]) -> None:
        """Notes other probes than those it was created with."""
        _save_array(self.folder / "probes.npy", np.sort(np.asarray(ids, np.int64)))

    def _column(self, kind: str, epoch: int) -> list[np.ndarray]:
        """Maps the shards of one column; raises DataError unless they fit together."""
        paths = self._shards(kind, epoch)
        if not paths:
            pattern = f"{self.folder / kind}/epoch_{epoch:04d}-*.npy"
            raise DataError(f"{pattern} is missing, or not all of its shards are there")

        width, dtype = self.layout[kind]
        shards = [map_array(path) for path in paths]
        for path, shard in zip(paths, shards, strict=True):
            if shard.shape[1:] != width or shard.ndim != 1 + len(width) or shard.dtype != dtype:
                raise DataError(f"{path} is {shard.dtype} {shard.shape}, expected {dtype} {('N', *width)}")

        rows = sum(map(len, shards))
        if rows != self.num_examples:
            raise DataError(f"{paths[0]}, with all shards, has {rows} rows, expected {self.num_examples}")
        return shards

    def _has(self, epoch: int) -> bool:
        """Whether all shards of an epoch are there, of all kinds."""
        return all(self._shards(kind, epoch) for kind in self.layout)

    def _shards(self, kind: str, epoch: int) -> list[Path]:
        """Returns the files of a column in order, or none if one is missing."""
        # By how many shards there are: a run that was stopped and went on with more processes leaves both.
        shardings: dict[int, dict[int, Path]] = {}
        for path in (self.folder / kind).glob(f"epoch_{epoch:04d}-*.npy"):
            name = _SHARD.fullmatch(path.stem)
            if name:
                number = int(name[2])
                count = int(name[3])
                shardings.setdefault(count, {})[number] = path

        for count, paths in shardings.items():
            if sorted(paths) == list(range(count)):
                return [paths[number] for number in range(count)]
        return []


def _save_array(path: Path, array: np.ndarray) -> None:
    write_atomically(path, partial(np.save, arr=array, allow_pickle=False))


@dataclass(frozen=True)
class StoredRows:
    """Trajectories [N, E] or [N, E, width] on disk that are read where they are indexed.

    `rows[3:9]` is a range of examples, `rows[ids]` takes an array of ids.

    Attributes:
      num_examples: N.
      width: of each value, () or (width,).
      dtype_name: as stored.
      columns: for each epoch its shards, mapped, which hold the rows in order.
      check: raise DataError on reading a value that is not finite.
    """

    num_examples: int
    width: tuple[int, ...]
    dtype_name: str
    columns: list[list[np.ndarray]] = field(repr=False)
    check: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, E) or (N, E, width)."""
        return self.num_examples, len(self.columns), *self.width

    @property
    def dtype(self) -> np.dtype:
        """As stored."""
        return np.dtype(self.dtype_name)

    def __getitem__(self, rows: slice | Int[np.ndarray, "M"]) -> Float[np.ndarray, "M E ..."]:
        """Reads rows.

        Raises:
          DataError: a value is not finite, if that is to be checked; the file and the first id are named.
        """
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self.num_examples))
        ids = np.asarray(rows)

        values = np.empty((len(ids), *self.shape[1:]), self.dtype)
        for start in range(0, len(ids), _BLOCK):
            block = slice(start, start + _BLOCK)
            self._read(ids[block], values[block])
        return values

    def _read(self, ids: np.ndarray, out: np.ndarray) -> None:
        """Fills a block, small enough to stay in a cache while one column after the other is put into it."""
        is_run = int(ids[-1]) - int(ids[0]) == len(ids) - 1 and (np.diff(ids) == 1).all()
        for number, shards in enumerate(self.columns):
            if is_run:
                _copy_run(shards, int(ids[0]), out[:, number])
            else:
                _copy_rows(shards, ids, out[:, number])

        if self.check:
            self._check_finite(ids, out)

    def _check_finite(self, ids: np.ndarray, values: np.ndarray) -> None:
        if np.isfinite(values).all():
            return

        # Only now, as it takes several times as long: which one it is.
        finite = np.isfinite(values.reshape(*values.shape[:2], -1)).all(2)
        column = int(np.argmin(finite.all(0)))
        first_id = ids[np.argmin(finite[:, column])]
        name = getattr(self.columns[column][0], "filename", "the trajectories")
        raise DataError(f"{name}: some examples were not recorded or are not finite, first id {first_id}")


def _copy_run(shards: list[np.ndarray], start: int, out: np.ndarray) -> None:
    """Copies len(out) rows from `start` on, a slice of each shard and not row by row."""
    stop = start + len(out)
    begin = 0
    for shard in shards:
        end = begin + len(shard)
        low = max(start, begin)
        high = min(stop, end)
        if low < high:
            out[low - start : high - start] = shard[low - begin : high - begin]
        begin = end


def _copy_rows(shards: list[np.ndarray], ids: np.ndarray, out: np.ndarray) -> None:
    """Copies the rows `ids`, in any order."""
    begin = 0
    for shard in shards:
        end = begin + len(shard)
        here = (ids >= begin) & (ids < end)
        out[here] = shard[ids[here] - begin]
        begin = end
