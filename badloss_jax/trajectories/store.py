"""The trajectory store on disk: time-major, one column file a kind and epoch, written once the epoch is over.

In its folder lie:

    DIR/about.json             format, hash of the recording, shapes and dtypes
    DIR/examples.npz           labels int32 [N] as trained on, is_probe bool [N]
    DIR/loss/epoch_0000.npy    float32 [N]
    DIR/logits/epoch_0000.npy  float16 [N, K]; likewise prob, ranked, features
"""

import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from badloss_jax.errors import DataError
from badloss_jax.files import read_json, write_atomically, write_text

_FORMAT = "badloss_jax.trajectories/1"


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
        cls, folder: Path, recording_hash: str, labels: Int[np.ndarray, "N"], is_probe: Bool[np.ndarray, "N"],
        num_epochs: int, layout: Mapping[str, tuple[tuple[int, ...], Any]],
    ) -> "TrajectoryStore":  # fmt: skip
        """Starts an empty store; an older one in the folder is removed."""
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
        write_atomically(folder / "examples.npz", lambda aside: np.savez(aside, labels=labels, is_probe=is_probe))
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
            sizes = int(about["num_examples"]), int(about["num_epochs"])
            return cls(folder, str(about["recording_hash"]), *sizes, layout)
        except FileNotFoundError as error:
            raise DataError(f"{folder} holds no recorded trajectories") from error
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise DataError(f"{folder / 'about.json'} is damaged: {error}") from error

    @property
    def complete(self) -> bool:
        """Whether all epochs of all kinds are there."""
        return all(self._path(kind, t).is_file() for kind in self.layout for t in range(self.num_epochs))

    def write_epoch(self, epoch: int, columns: Mapping[str, np.ndarray]) -> None:
        """Writes one epoch's column of every kind, [N, ...]."""
        for kind, column in columns.items():
            write_atomically(self._path(kind, epoch), partial(np.save, arr=column, allow_pickle=False))

    def read(self, kind: str, epochs: Int[np.ndarray, "E"] | None = None) -> Float[np.ndarray, "N E ..."]:
        """Reads the chosen epochs of a kind, by default all, as [N, E] or [N, E, width].

        Raises:
          DataError: the kind was not recorded, or a column is missing, damaged, of another shape, or not finite (a
            cell that was never recorded is NaN).
        """
        if kind not in self.layout:
            raise DataError(f"{self.folder} has no trajectories of kind {kind!r}, only {', '.join(self.layout)}")
        shape, dtype = self.layout[kind]
        epochs = np.arange(self.num_epochs) if epochs is None else epochs
        out = np.empty((self.num_examples, len(epochs), *shape), dtype)
        for position, epoch in enumerate(epochs):
            path = self._path(kind, int(epoch))
            try:
                column = np.load(path, mmap_mode="r", allow_pickle=False)  # its header may claim anything
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{path} is missing or damaged: {error}") from error
            expected = (self.num_examples, *shape)
            if column.shape != expected or column.dtype != dtype:
                raise DataError(f"{path} is {column.dtype} {column.shape}, expected {dtype} {expected}")
            bad = np.flatnonzero(~np.isfinite(column.reshape(self.num_examples, -1)).all(1))
            if len(bad):
                raise DataError(f"{path}: {len(bad)} examples were not recorded or are not finite, first id {bad[0]}")
            out[:, position] = column
        return out

    def read_examples(self) -> tuple[Int[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
        """Returns the labels that were trained on, and which examples are probes.

        Raises:
          DataError: the file is missing or damaged.
        """
        path = self.folder / "examples.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                labels, is_probe = arrays["labels"], arrays["is_probe"]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is missing or damaged: {error}") from error
        if labels.shape != (self.num_examples,) or is_probe.shape != labels.shape or is_probe.dtype != bool:
            raise DataError(f"{path} does not hold {self.num_examples} labels and probe marks")
        return labels, is_probe

    def _path(self, kind: str, epoch: int) -> Path:
        return self.folder / kind / f"epoch_{epoch:04d}.npy"
