"""Arrays in one .npz file: x_train, y_train, x_test, y_test, the names that Keras made usual."""

import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import NPZ_ERRORS, write_atomically
from badloss_jax.core.memory import check_host_memory
from badloss_jax.data.dataset import Dataset, Split
from badloss_jax.data.records import TOO_LARGE

_MAX_CLASSES = 10**6


def load(settings: Mapping[str, Any]) -> Dataset:
    """Reads the .npz file `data.dir`: images uint8 [N, H, W] or [N, H, W, C], integer labels [N] or [N, 1].

    `class_names`, an array of strings, is optional; without it classes are called by their numbers.

    Raises:
      UsageError: no such file.
      DataError: it is no .npz file, is damaged or larger than the memory, lacks an array, or has one of another kind.
    """
    splits, class_names = _load(settings, ("train", "test"))
    return Dataset(splits["train"], splits["test"], class_names)


def load_training(settings: Mapping[str, Any]) -> tuple[Split, tuple[str, ...]]:
    """Reads x_train and y_train alone, and the names of the classes; raises as `load` does."""
    splits, class_names = _load(settings, ("train",))
    return splits["train"], class_names


def write_arrays_without(source: Path, target: Path, rows: Int[np.ndarray, "M"]) -> None:
    """Writes an .npz file that is the same but for some rows of x_train and y_train.

    Args:
      source: the .npz file to read.
      target: the .npz file to write; one that exists is replaced.
      rows: to leave out, int [M].

    Raises:
      DataError: a file cannot be read or written, or has no such rows.
    """
    try:
        with np.load(source, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        for key in ("x_train", "y_train"):
            arrays[key] = np.delete(arrays[key], rows, axis=0)
    except NPZ_ERRORS as error:
        raise DataError(f"{source} cannot be used: {error}") from error

    write_atomically(target, partial(_write_members, arrays))


def _write_members(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes an .npz file; np.savez would not take an array of the name "file"."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def _load(settings: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Returns the splits of these names, and the names of the classes."""
    path = Path(settings["dir"]).expanduser()
    keys = [f"{letter}_{name}" for name in names for letter in "xy"]
    if not settings["dir"] or not path.is_file():
        raise UsageError(
            f"data.dir: {settings['dir']!r} is not a file; --config.data.dir=FILE.npz names one with {', '.join(keys)}"
        )

    arrays = _read_members(path, keys)
    splits = {name: _split(path, name, arrays[f"x_{name}"], arrays[f"y_{name}"]) for name in names}

    if "class_names" not in arrays:
        largest = max(int(split.labels.max()) for split in splits.values())
        return splits, tuple(str(label) for label in range(1 + largest))

    class_names = arrays["class_names"]
    if class_names.ndim != 1 or class_names.dtype.kind != "U":
        raise DataError(f"{path}: class_names is {class_names.dtype}, expected a list of strings")
    return splits, tuple(str(name) for name in class_names)


def _read_members(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads these arrays of an .npz file, and class_names if it has them; nothing in it is run."""
    try:
        # The members' headers say how much they unpack to, before anything is unpacked.
        with zipfile.ZipFile(path) as archive:
            needed = sum(member.file_size for member in archive.infolist())
        check_host_memory(needed, f"the arrays in {path}", TOO_LARGE)

        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in keys if key not in file]
            if missing:
                raise DataError(f"{path} lacks {', '.join(missing)}; it has {', '.join(file) or 'nothing'}")
            arrays = {key: file[key] for key in (*keys, "class_names") if key in file}

        # NumPy hands over a member that does not begin as an array does as bare bytes.
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("a member is not an array")
    except DataError:  # is a ValueError, too
        raise
    except NPZ_ERRORS as error:
        raise DataError(f"{path} is damaged, or no .npz file of plain arrays: {error}") from error
    return arrays


def _split(path: Path, name: str, images: np.ndarray, labels: np.ndarray) -> Split:
    """Checks the images and labels of a split, and brings them to [N, H, W, C] and [N]."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise DataError(f"{path}: x_{name} is {images.dtype} {images.shape}, expected uint8 [N, H, W] or [N, H, W, C]")
    if images.ndim == 4 and images.shape[-1] not in (1, 3):
        raise DataError(f"{path}: x_{name} has {images.shape[-1]} channels, expected 1 (grey) or 3 (RGB)")

    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(f"{path}: y_{name} is {labels.dtype} {labels.shape}, expected integers [{len(images)}]")
    if labels.min() < 0 or labels.max() >= _MAX_CLASSES:
        raise DataError(
            f"{path}: y_{name} goes from {labels.min()} to {labels.max()}, expected classes from 0 to 999,999"
        )

    return Split(images.reshape(*images.shape[:3], -1), labels.astype(np.int32))
