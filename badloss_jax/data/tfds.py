"""A folder in the format of TensorFlow Datasets with ArrayRecord files, read without TensorFlow.

`badloss prepare` writes such folders; TensorFlow Datasets does, with `file_format="array_record"`. Images are decoded
when they are asked for.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Int

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import read_json, write_atomically
from badloss_jax.core.hashing import digest, sha256_of
from badloss_jax.data.dataset import Dataset, Split
from badloss_jax.data.records import RecordImages, Records, read_labels

PREPARED = "prepared.json"  # what `badloss prepare` notes of its work in the folder
_TEST_SPLITS = ("test", "validation", "val")


def load(settings: Mapping[str, Any]) -> Dataset:
    """Reads the splits train and test (or validation, or val) of the dataset in `data.dir`.

    That is the folder with dataset_info.json, or one in which a single such folder lies. `data.image_size` resizes
    (else all images must have one size), `data.channels` converts to RGB or grey. Labels come from the index that
    `badloss prepare` wrote; where there is none, all records are read for them once, and the labels are kept in
    `data.cache_dir`.

    Raises:
      UsageError: there is no such folder, or several, or the dataset has no images, labels, or ArrayRecord files.
      DataError: a file of the dataset is missing or damaged; it is named.
    """
    dataset = _open(settings)
    splits = dataset.info.splits
    test_splits = [name for name in _TEST_SPLITS if name in splits]
    if "train" not in splits or not test_splits:
        raise UsageError(
            f"{dataset.folder} has the splits {', '.join(splits)}; expected train, and {' or '.join(_TEST_SPLITS)}"
        )

    train = _load_split(dataset, "train", settings)
    test = _load_split(dataset, test_splits[0], settings)
    # The labels of many public test sets are secret.
    if (test.labels == -1).all() and len(test_splits) > 1:
        warnings.warn(
            f"{dataset.folder}: {test_splits[0]} has no labels, {test_splits[1]} is taken instead", stacklevel=2
        )
        test = _load_split(dataset, test_splits[1], settings)
    return Dataset(train, test, dataset.class_names)


def load_training(settings: Mapping[str, Any]) -> tuple[Split, tuple[str, ...]]:
    """Reads the split train alone, and the names of the classes; raises as `load` does."""
    dataset = _open(settings)
    if "train" not in dataset.info.splits:
        raise UsageError(f"{dataset.folder} has the splits {', '.join(dataset.info.splits)}; expected train")
    return _load_split(dataset, "train", settings), dataset.class_names


@dataclass(frozen=True)
class _OpenDataset:
    """The folder, TFDS's description of the dataset, and what `badloss prepare` noted (else nothing)."""

    folder: Path
    info: Any
    prepared: dict[str, Any]

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.info.features["label"].names)


def _open(settings: Mapping[str, Any]) -> _OpenDataset:
    if settings["skip_corrupt"]:
        raise UsageError(
            "data.skip_corrupt = True is not possible with data.source = 'tfds', which decodes an image only when it is"
            " needed: leave bad files out before `badloss prepare`"
        )

    folder = _find_folder(settings["dir"])
    prepared: dict[str, Any] = {}
    if (folder / PREPARED).is_file():
        prepared = read_json(folder / PREPARED)
    return _OpenDataset(folder, _read_info(folder), prepared)


def _find_folder(named: str) -> Path:
    """Returns the one folder with dataset_info.json at or below the one that was named."""
    root = Path(named).expanduser()
    if not named or not root.is_dir():
        raise UsageError(
            f"data.dir: {named!r} is not a folder; --config.data.dir=DIR names the one that `badloss prepare NAME"
            " --from FILES --to DIR` wrote"
        )

    # TFDS nests them as NAME/CONFIG/VERSION.
    folders = []
    for depth in ("", "*/", "*/*/", "*/*/*/"):
        folders += [path.parent for path in root.glob(f"{depth}dataset_info.json")]

    if not folders and (root / PREPARED).is_file():
        raise UsageError(f"data.dir: {root} is half prepared: run the same `badloss prepare` again, it goes on")
    if not folders:
        raise UsageError(
            f"data.dir: {root} has no dataset_info.json; `badloss prepare NAME --from FILES --to DIR` makes such a"
            " folder"
        )
    if len(folders) > 1:
        several = ", ".join(map(str, sorted(folders)[:5]))
        raise UsageError(f"data.dir: {root} has several datasets ({several}): name one")
    return folders[0]


def _read_info(folder: Path) -> Any:
    """Returns TFDS's description of the dataset, once it is known to be usable."""
    # TFDS imports whatever module features.json names, so this comes before TFDS sees it.
    for name in _python_classes(read_json(_existing(folder / "features.json"))):
        if not name.startswith("tensorflow_datasets.core.features."):
            raise DataError(f"{folder / 'features.json'} has features of the class {name!r}, which TFDS does not have")

    import tensorflow_datasets as tfds

    try:
        info = tfds.builder_from_directory(str(folder)).info
    except Exception as error:  # TFDS and protobuf raise nearly anything on damaged files
        raise DataError(f"{folder} cannot be read as a TFDS dataset: {' '.join(str(error).split())}") from error

    file_format = info.file_format.value if info.file_format else "unknown"
    if file_format != "array_record":
        raise UsageError(
            f"{folder} has files of the format {file_format}, which need TensorFlow: prepare it with"
            " file_format='array_record', or with `badloss prepare`"
        )
    if not {"image", "label"} <= set(info.features) or not isinstance(info.features["label"], tfds.features.ClassLabel):
        raise UsageError(f"{folder} has the features {', '.join(info.features)}; expected image, and label, a class")
    return info


def _python_classes(features: Any) -> list[str]:
    """Collects the Python classes that a features.json names, wherever in it."""
    if isinstance(features, list):
        return [name for value in features for name in _python_classes(value)]
    if not isinstance(features, dict):
        return []

    names = []
    if "pythonClassName" in features:
        names.append(str(features["pythonClassName"]))
    for value in features.values():
        names += _python_classes(value)
    return names


def _load_split(dataset: _OpenDataset, name: str, settings: Mapping[str, Any]) -> Split:
    folder = dataset.folder
    shards = [(Path(shard.filename), shard.take) for shard in dataset.info.splits[name].file_instructions]
    # The names come from a file, and may lead anywhere.
    for path, _ in shards:
        if path.parent != folder:
            raise DataError(f"{folder / 'dataset_info.json'} names the file {path}, which is not in its folder")
        _existing(path)
    records = Records(name, shards)

    if dataset.prepared:
        identity = digest([_note_of(folder, dataset.prepared, path)["sha256"] for path, _ in shards])
        labels = _read_index(folder / f"labels-{name}.npy", dataset.prepared, len(records))
    else:
        # Nobody noted checksums, and to hash all images would take as long as to read them.
        descriptions = [sha256_of(folder / "dataset_info.json"), sha256_of(folder / "features.json")]
        identity = digest(descriptions, [(path.name, path.stat().st_size) for path, _ in shards])
        labels = _cached_labels(records, identity, settings["cache_dir"])

    shape = _stored_shape(folder, dataset.info.features["image"])
    images = RecordImages(records, identity, shape, settings["image_size"], settings["channels"])
    return Split(cast(np.ndarray, images), labels)


def _stored_shape(folder: Path, feature: Any) -> tuple[int, int, int] | None:
    """Returns the shape of images that are stored as bare pixels, None for image files."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image) and feature.np_dtype == np.uint8:
        return None

    # What is encoded as bytes is serialised as one scalar.
    pixels = isinstance(feature, tfds.features.Tensor) and feature.np_dtype == np.uint8
    if pixels and len(feature.shape) == 3 and all(feature.shape) and feature.get_serialized_info().shape == ():
        return feature.shape
    raise UsageError(f"{folder} stores images as {feature}; expected image files, or uint8 tensors [H, W, C] in bytes")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"{path} is missing: run the same `badloss prepare` again, which writes it, or copy the folder again"
        )
    return path


# --- labels, and what `badloss prepare` noted


def _note_of(folder: Path, prepared: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Returns what `badloss prepare` noted of a file, whose size must agree; its bytes are not all read."""
    try:
        note = prepared["files"][path.name]
        size = note["bytes"]
        checksum = note["sha256"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / PREPARED} is damaged: it says nothing of {path.name}") from error

    if not isinstance(checksum, str) or path.stat().st_size != size:
        raise DataError(
            f"{path} is damaged: it has {path.stat().st_size:,} bytes, expected {size}; the same `badloss prepare`"
            " writes it again"
        )
    return note


def _read_index(path: Path, prepared: Mapping[str, Any], count: int) -> Int[np.ndarray, "N"]:
    """Reads the labels that `badloss prepare` wrote."""
    note = _note_of(path.parent, prepared, _existing(path))
    # Unlike the images, the labels are few bytes: they are checked every time.
    if sha256_of(path) != note["sha256"]:
        raise DataError(f"{path} is damaged: its checksum is wrong; the same `badloss prepare` writes it again")

    labels = np.load(path, allow_pickle=False)
    if labels.shape != (count,) or labels.dtype != np.int32:
        raise DataError(f"{path} holds {labels.dtype} {labels.shape}, expected int32 [{count}]")
    return labels


def _cached_labels(records: Records, identity: str, cache_dir: str) -> Int[np.ndarray, "N"]:
    """Reads the labels from the records, or takes them from the cache."""
    if not cache_dir:
        return read_labels(records)

    path = Path(cache_dir).expanduser() / "labels" / f"{digest(identity, records.name)}.npy"
    try:
        labels = np.load(path, allow_pickle=False)
        if labels.shape == (len(records),) and labels.dtype == np.int32:
            return labels
        warnings.warn(f"the cached labels in {path} are damaged: reading them again", stacklevel=2)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        warnings.warn(f"the cached labels in {path} are damaged ({error}): reading them again", stacklevel=2)

    labels = read_labels(records)
    try:
        write_atomically(path, lambda aside: np.save(aside, labels, allow_pickle=False))
    except DataError as error:
        warnings.warn(f"labels are not cached: {error}; --config.data.cache_dir names another folder", stacklevel=2)
    return labels
