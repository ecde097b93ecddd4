"""A folder of images, `<split>/<class>/*`, in the formats of `pixels.FORMATS`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.data.dataset import Dataset
from badloss_jax.data.decoding import decode_split

_SPLITS = {"train": ("train",), "test": ("test", "val")}


def load(settings: Mapping[str, Any]) -> Dataset:
    """Reads `data.dir`/train/<class>/* and /test/<class>/* (or /val), classes and files in sorted order.

    `data.channels` converts to RGB or grey, `data.image_size` resizes (else all images must have one size). Decoded
    images are kept in `data.cache_dir`, keyed by the names and bytes of the files and by these settings.

    Raises:
      UsageError: a split's folder is missing.
      DataError: a class folder without images, a file that does not decode (named; `data.skip_corrupt` leaves such
        files out and counts them), images of different sizes (two are named).
    """
    root = Path(settings["dir"]).expanduser()
    if not settings["dir"] or not root.is_dir():
        raise UsageError(f"data.dir: {settings['dir']!r} is not a folder; --config.data.dir=DIR names the one with"
                         " train/<class>/* and test/<class>/*")  # fmt: skip
    class_names, listed = list_images(root)
    splits = {split: decode_split(*listed[split], settings) for split in _SPLITS}
    return Dataset(splits["train"], splits["test"], class_names)


def list_images(root: Path) -> tuple[tuple[str, ...], dict[str, tuple[Path, list[Path], list[int]]]]:
    """Returns the class names, and of train and test (or val) the folder, its files and their labels; opens no file.

    Raises:
      UsageError: a split's folder is missing.
      DataError: a class folder without images, or one in test that train has not.
    """
    folders = {split: _split_folder(root, names) for split, names in _SPLITS.items()}
    class_names = _class_names(folders["train"])
    unknown = sorted(set(_class_names(folders["test"])) - set(class_names))
    if unknown:
        raise DataError(f"{folders['test']} has the class folder {unknown[0]!r}, which {folders['train']} has not")
    return class_names, {split: (folder, *_list_split(folder, class_names)) for split, folder in folders.items()}


def _split_folder(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UsageError(f"{root} has no folder {' or '.join(names)}; expected <split>/<class>/<image>")


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders")
    return tuple(names)


def _list_split(folder: Path, class_names: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        if folder.name != "train" and not (folder / name).is_dir():
            continue  # a small test set may lack a class
        found = sorted(p for p in (folder / name).iterdir() if p.is_file() and not p.name.startswith("."))
        if not found:
            raise DataError(f"class folder {folder / name} has no images")
        files += found
        labels += [label] * len(found)
    return files, labels
