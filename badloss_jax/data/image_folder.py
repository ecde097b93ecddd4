"""A folder of images, `<split>/<class>/*`, in the formats of `pixels.FORMATS`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.data.dataset import Dataset
from badloss_jax.data.decoding import decode_split

_SPLITS = {"train": ("train",), "test": ("test", "val")}


class ListedSplit(NamedTuple):
    """The images of a split, none of them opened: their folder, the files, and the label of each."""

    folder: Path
    files: list[Path]
    labels: list[int]


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
        raise UsageError(
            f"data.dir: {settings['dir']!r} is not a folder; --config.data.dir=DIR names the one with"
            " train/<class>/* and test/<class>/*"
        )

    class_names, listed = list_images(root)
    train = decode_split(*listed["train"], settings)
    test = decode_split(*listed["test"], settings)
    return Dataset(train, test, class_names)


def list_images(root: Path) -> tuple[tuple[str, ...], dict[str, ListedSplit]]:
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

    return class_names, {split: _list_split(folder, class_names) for split, folder in folders.items()}


def _split_folder(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UsageError(f"{root} has no folder {' or '.join(names)}; expected <split>/<class>/<image>")


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders")
    return tuple(names)


def _list_split(folder: Path, class_names: tuple[str, ...]) -> ListedSplit:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        class_folder = folder / name
        # A small test set may lack a class.
        if folder.name != "train" and not class_folder.is_dir():
            continue

        images = sorted(path for path in class_folder.iterdir() if path.is_file() and not path.name.startswith("."))
        if not images:
            raise DataError(f"class folder {class_folder} has no images")
        files += images
        labels += [label] * len(images)
    return ListedSplit(folder, files, labels)
