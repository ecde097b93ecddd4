"""A training set alone, as somebody has it: a folder of images, arrays in a file, or a folder of TensorFlow Datasets.

What cannot be read is left out and named, with the reason: one bad file among a million must not stop a scan.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import printable
from badloss_jax.core.seeding import generator
from badloss_jax.data import arrays, is_streamed, tfds
from badloss_jax.data.dataset import Split
from badloss_jax.data.decoding import decode_files
from badloss_jax.data.pixels import FORMATS, decode_pixels
from badloss_jax.data.records import check_memory

_LARGEST = 64  # pixels a side that images are brought to, unless told otherwise
_LOOKED_AT = 200  # headers, to choose a size by
_EXPLAINED = 1000  # files that do not decode, for which the reason is looked up
_FEWEST_PROBES = 10


@dataclass(frozen=True)
class TrainingSet:
    """Images, labels, and what each example is called.

    Attributes:
      split: the images and their labels.
      class_names: K.
      names: of each example: its path, relative to `root` and with "/" between; without a root its row, "0" and so on.
      root: the folder that the paths are relative to.
      own: how many examples, from the first, are the training set's own; the rest are trusted images beside it.
      left_out: name -> why it could not be used.
    """

    split: Split
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    root: Path | None
    own: int
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.split.images.shape[1:]
        return height, width, channels


@dataclass(frozen=True)
class Listing:
    """The files below `root`/<class>, or `root`/train/<class>, none of them opened.

    Attributes:
      root: the folder, resolved.
      class_names: in sorted order.
      names: of each file, relative to `root`, in sorted order.
      labels: of each file.
      left_out: as in `TrainingSet`.
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

    Raises:
      UsageError: there is no such folder, or fewer than two class folders, or one that is not among `class_names`.
      DataError: no class folder has a file in it.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; expected one with <class>/<image>, or train/<class>/<image>")
    root = root.resolve()
    base, inner = root / "train", root / "train"
    if _outside(inner, root) and not follow_links:
        raise UsageError(f"{inner} is a link that leads out of the folder: --follow_links reads such files")
    if not (inner.is_dir() and any(path.is_dir() for path in _visible(inner))):
        base = root
    left_out: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for folder in _visible(base):
        if folder.is_dir():
            found[folder.name] = sorted(_walk(folder, root, follow_links, left_out))
    names = class_names or tuple(found)
    strangers = sorted(found.keys() - set(names))
    if strangers:
        raise UsageError(f"{base / strangers[0]} is a class folder that the training set does not have; it has"
                         f" {', '.join(names[:10])}{', ...' * (len(names) > 10)}")  # fmt: skip
    if len(names) < 2:
        raise UsageError(f"{base} has {len(names)} class folders, expected two or more: <class>/<image>")
    for name, files in found.items():
        if not files:
            left_out.setdefault((base / name).relative_to(root).as_posix(), "a class folder without images")
    if not any(found.values()):
        raise DataError(f"{base} has class folders, and no file in any of them")
    if not class_names:  # an empty folder is no class
        names = tuple(name for name in names if found[name])
    listed = [(file, label) for label, name in enumerate(names) for file in found.get(name, ())]
    labels = np.array([label for _, label in listed], np.int32)
    return Listing(root, names, tuple(file for file, _ in listed), labels, left_out)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _walk(folder: Path, root: Path, follow_links: bool, left_out: dict[str, str]) -> Iterator[str]:
    """Yields the names of a class's files, and notes those that may not be opened."""
    if _outside(folder, root) and not follow_links:
        left_out[folder.relative_to(root).as_posix()] = "a link that leads out of the folder"
        return
    seen: set[Path] = set()  # links may lead in a circle

    def unreadable(error: OSError) -> None:
        left_out[Path(error.filename).relative_to(root).as_posix()] = f"a folder that cannot be read: {error.strerror}"

    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=follow_links):
        real = Path(place).resolve() if follow_links else Path(place)
        if real in seen:
            left_out[Path(place).relative_to(root).as_posix()] = "a link to a folder that was read already"
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [] if follow_links else folders:
            if (Path(place) / name).is_symlink():
                left_out[(Path(place) / name).relative_to(root).as_posix()] = "a link to a folder"
        for file in files:
            path = Path(place) / file
            name = path.relative_to(root).as_posix()
            if file.startswith("."):
                continue
            if "\n" in name or "\r" in name:
                left_out[name] = "a line break in its name, which a list with one path a line cannot hold"
            elif _outside(path, root) and not follow_links:
                left_out[name] = "a link that leads out of the folder"
            elif not path.is_file():
                left_out[name] = "not a file, or a link to nothing"
            else:
                yield name


def _outside(path: Path, root: Path) -> bool:
    return path.is_symlink() and not path.resolve().is_relative_to(root)


def suggested_size(listing: Listing) -> tuple[int, int]:
    """Looks at the headers of some files, and chooses pixels a side (at most 64) and channels (1 if all are grey)."""
    sides, grey = [], True
    for number in np.unique(np.linspace(0, len(listing.names) - 1, _LOOKED_AT).astype(int)):
        try:
            with Image.open(listing.root / listing.names[number], formats=FORMATS) as image:
                sides.append(min(image.size))
                grey &= image.mode in ("1", "L", "I;16", "LA")
        except Exception:  # Pillow raises nearly anything; such files are named when they are decoded
            continue
    if not sides:
        raise DataError(f"{listing.root}: of {min(len(listing.names), _LOOKED_AT)} files looked at none is an image"
                        f" ({', '.join(FORMATS)})")  # fmt: skip
    return min(int(np.median(sides)), _LARGEST), 1 if grey else 3


def read_folder(listing: Listing, settings: Mapping[str, Any], trusted: Listing | None = None) -> TrainingSet:
    """Decodes a folder's images; those of `trusted` follow them.

    Args:
      listing: of the training set.
      settings: `config.data`; image_size is above 0.
      trusted: of images that are known to be clean, with the same classes.

    Raises:
      DataError: the decoded images do not fit the memory, or none decodes.
      PreemptedError: it was told to stop.
    """
    size, channels = settings["image_size"], settings["channels"]
    total = len(listing.names) + (len(trusted.names) if trusted else 0)
    check_memory(2 * total * size * size * channels, f"{total:,} images of {size} x {size} pixels")
    left_out = dict(listing.left_out)
    images, names, labels = _read(listing, settings, left_out, "")
    own = len(names)
    if trusted:
        more, more_names, more_labels = _read(trusted, settings, left_out, f"{trusted.root.as_posix()}/")
        images, labels = np.concatenate([images, more]), np.concatenate([labels, more_labels])
        names += more_names
    return TrainingSet(Split(images, labels), listing.class_names, tuple(names), listing.root, own, left_out)


def _read(
    listing: Listing, settings: Mapping[str, Any], left_out: dict[str, str], before: str
) -> tuple[np.ndarray, list[str], np.ndarray]:
    images, kept = decode_files(listing.root, listing.files, dict(settings) | {"skip_corrupt": True})
    missing = np.setdiff1d(np.arange(len(listing.names)), kept)
    for place, number in enumerate(missing.tolist()):
        reason = _reason(listing.root / listing.names[number], settings) if place < _EXPLAINED else "does not decode"
        left_out[before + listing.names[number]] = reason
    return images, [before + listing.names[number] for number in kept.tolist()], listing.labels[kept]


def _reason(path: Path, settings: Mapping[str, Any]) -> str:
    try:
        decode_pixels(path, settings["image_size"], settings["channels"])
    except Exception as error:  # Pillow raises nearly anything
        return " ".join(str(error).split()).replace(str(path), "it") or type(error).__name__
    return "it did not decode, and now does: it was changed meanwhile"


def read_arrays(settings: Mapping[str, Any]) -> TrainingSet:
    """Reads x_train and y_train of an .npz file; see `badloss_jax.data.arrays`."""
    split, class_names = arrays.load_training(settings)
    return _numbered(split, class_names, settings)


def read_tfds(settings: Mapping[str, Any]) -> TrainingSet:
    """Reads the split train of a TFDS folder; see `badloss_jax.data.tfds`."""
    split, class_names = tfds.load_training(settings)
    return _numbered(split, class_names, settings)


def _numbered(split: Split, class_names: tuple[str, ...], settings: Mapping[str, Any]) -> TrainingSet:
    wrong = np.flatnonzero((split.labels < 0) | (split.labels >= len(class_names)))
    if len(wrong):
        raise DataError(f"{settings['dir']}: {len(wrong)} labels are no classes, the first in row {wrong[0]}:"
                        f" {split.labels[wrong[0]]}; expected 0 to {len(class_names) - 1}")  # fmt: skip
    if not is_streamed(split, settings["input"]):
        split = split.materialised()
    count = len(split.labels)
    return TrainingSet(split, class_names, tuple(map(str, range(count))), None, count)


def trusted_ids(probes: str, examples: TrainingSet, seed: int) -> Int[np.ndarray, "P"]:
    """Returns the ids of the probes, ascending; see `badloss_jax.scan` for how they are given.

    Raises:
      UsageError: there is no such file, it names something twice or what the training set does not have, or the probes
        are fewer than 10 or more than half of all.
    """
    count, path = len(examples.names), Path(probes).expanduser()
    if examples.own < count:  # images of a folder beside the training set
        ids = np.arange(examples.own, count)
    elif path.is_dir() and not examples.root:
        raise UsageError(f"--probes {path} is a folder, and the training set has no paths: give a text file of row"
                         " numbers, or how many to draw and to trust")  # fmt: skip
    elif path.is_dir():
        inside = path.resolve().relative_to(examples.root.resolve()).as_posix() + "/"  # type: ignore[union-attr]
        ids = np.array([number for number, name in enumerate(examples.names) if name.startswith(inside)], np.int64)
    elif probes.isascii() and probes.isdigit():
        if not int(probes) <= count / 2:
            raise UsageError(f"--probes {probes} of {count:,} images: expected half of them at most")
        ids = np.sort(generator(seed, "probes").choice(count, int(probes), replace=False))
    else:
        ids = _named_probes(path, examples)
    if not _FEWEST_PROBES <= len(ids) <= count / 2:
        raise UsageError(f"--probes {probes}: {len(ids)} of {count:,} images are probes, expected"
                         f" {_FEWEST_PROBES} or more, and half of them at most; 250 are usual")  # fmt: skip
    return ids


def _named_probes(path: Path, examples: TrainingSet) -> Int[np.ndarray, "P"]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"--probes {path} cannot be read ({error}): give a text file of trusted paths, a folder, or"
                         " how many images to draw and to trust") from error  # fmt: skip
    place = {name: number for number, name in enumerate(examples.names)}
    ids: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        name = os.fsdecode(line).strip("\r\n").removeprefix("./")
        if not name.strip():
            continue
        if name not in place:
            why = f", which was left out: {examples.left_out[name]}" if name in examples.left_out else ""
            what = "a path relative to the data's folder" if examples.root else "a row number"
            raise UsageError(f"--probes {path}, line {number}: {printable(name)!r} is no image of the training set"
                             f"{why}; expected {what}")  # fmt: skip
        if place[name] in ids:
            raise UsageError(
                f"--probes {path}, line {number}: {printable(name)!r} stands in line {ids[place[name]]} too"
            )
        ids[place[name]] = number
    return np.array(sorted(ids), np.int64)
