"""The files of a folder of images, by class, found without opening one; whatever may not be read is named, and why."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from badloss_jax.core.errors import DataError, UsageError


@dataclass(frozen=True)
class Listing:
    """The files below `root`/<class>, or `root`/train/<class>, none of them opened.

    Attributes:
      root: the folder, resolved.
      class_names: in sorted order.
      names: of each file, relative to `root`, in sorted order.
      labels: of each file.
      left_out: name -> why it could not be used.
    """

    root: Path
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    labels: Int[np.ndarray, "N"]
    left_out: dict[str, str]

    @property
    def files(self) -> list[Path]:
        """The paths."""
        return [self.root / name for name in self.names]


def list_folder(root: Path, follow_links: bool = False, class_names: tuple[str, ...] = ()) -> Listing:
    """Lists a folder of images by class, with what lies deeper in a class folder; hidden files are passed over.

    Args:
      root: with <class>/*, or with train/<class>/*.
      follow_links: also take files that links lead to outside of `root`.
      class_names: of another folder that the classes have to be among; by default they are what is found.

    Returns:
      The files, sorted by class and name.

    Raises:
      UsageError: there is no such folder, or fewer than two class folders, or one that is not among `class_names`.
      DataError: no class folder has a file in it.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; expected one with <class>/<image>, or train/<class>/<image>")
    root = root.resolve()
    base = _base_folder(root, follow_links)

    walk = _Walk(root, follow_links, {})
    files = {folder.name: sorted(walk.files(folder)) for folder in _visible(base) if folder.is_dir()}

    names = class_names or tuple(files)
    _check_classes(base, files, names)
    for name in files:
        if not files[name]:
            walk.left_out.setdefault((base / name).relative_to(root).as_posix(), "a class folder without images")
    if not any(files.values()):
        raise DataError(f"{base} has class folders, and no file in any of them")

    # An empty folder is no class, unless the training set has that class.
    if not class_names:
        names = tuple(name for name in names if files[name])
    listed = [(file, label) for label, name in enumerate(names) for file in files.get(name, ())]
    labels = np.array([label for _, label in listed], np.int32)
    return Listing(root, names, tuple(file for file, _ in listed), labels, walk.left_out)


def _base_folder(root: Path, follow_links: bool) -> Path:
    """Returns the folder that the class folders lie in: train, if it has folders, else the root."""
    train = root / "train"
    if _leads_outside(train, root) and not follow_links:
        raise UsageError(f"{train} is a link that leads out of the folder: --follow_links reads such files")
    if train.is_dir() and any(path.is_dir() for path in _visible(train)):
        return train
    return root


def _check_classes(base: Path, files: Mapping[str, list[str]], class_names: tuple[str, ...]) -> None:
    strangers = sorted(files.keys() - set(class_names))
    if strangers:
        known = ", ".join(class_names[:10])
        if len(class_names) > 10:
            known += ", ..."
        raise UsageError(f"{base / strangers[0]} is a class folder that the training set does not have; it has {known}")
    if len(class_names) < 2:
        raise UsageError(f"{base} has {len(class_names)} class folders, expected two or more: <class>/<image>")


@dataclass(frozen=True)
class _Walk:
    """A walk through class folders, which notes in `left_out` what may not be opened."""

    root: Path
    follow_links: bool
    left_out: dict[str, str]

    def files(self, class_folder: Path) -> Iterator[str]:
        """Yields the names of a class's files."""
        if _leads_outside(class_folder, self.root) and not self.follow_links:
            self._leave_out(class_folder, "a link that leads out of the folder")
            return

        # Links may lead in a circle.
        visited: set[Path] = set()
        for path, folders, files in os.walk(class_folder, onerror=self._unreadable, followlinks=self.follow_links):
            folder = Path(path)
            real = folder.resolve() if self.follow_links else folder
            if real in visited:
                self._leave_out(folder, "a link to a folder that was read already")
                folders.clear()
                continue
            visited.add(real)

            # What stays in this list is where os.walk goes next, in this order.
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if not self.follow_links:
                self._note_linked(folder, folders)
            for file in files:
                if not file.startswith(".") and self._is_usable(folder / file):
                    yield self._name(folder / file)

    def _note_linked(self, folder: Path, subfolders: list[str]) -> None:
        for name in subfolders:
            if (folder / name).is_symlink():
                self._leave_out(folder / name, "a link to a folder")

    def _is_usable(self, path: Path) -> bool:
        name = self._name(path)
        if "\n" in name or "\r" in name:
            self._leave_out(path, "a line break in its name, which a list with one path a line cannot hold")
            return False
        if _leads_outside(path, self.root) and not self.follow_links:
            self._leave_out(path, "a link that leads out of the folder")
            return False
        if not path.is_file():
            self._leave_out(path, "not a file, or a link to nothing")
            return False
        return True

    def _unreadable(self, error: OSError) -> None:
        self._leave_out(Path(error.filename), f"a folder that cannot be read: {error.strerror}")

    def _leave_out(self, path: Path, reason: str) -> None:
        self.left_out[self._name(path)] = reason

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _leads_outside(path: Path, root: Path) -> bool:
    return path.is_symlink() and not path.resolve().is_relative_to(root)
