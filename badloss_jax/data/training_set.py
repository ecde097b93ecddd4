"""A training set alone, as somebody has it: a folder of images, arrays in a file, or a folder of TensorFlow Datasets.

What cannot be read is left out and named, with the reason: one bad file among a million must not stop a scan.
"""

import os
from collections.abc import Mapping
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
from badloss_jax.data.listing import Listing, list_folder
from badloss_jax.data.pixels import FORMATS, decode_pixels

__all__ = [
    "Listing",
    "TrainingSet",
    "list_folder",
    "read_arrays",
    "read_folder",
    "read_tfds",
    "suggested_size",
    "trusted_ids",
]

_LARGEST = 64  # pixels a side that images are brought to, unless told otherwise
_SAMPLE = 200  # headers, to choose a size by
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


# --- a folder of images


def suggested_size(listing: Listing) -> tuple[int, int]:
    """Looks at the headers of some files, and chooses pixels a side (at most 64) and channels (1 if all are grey)."""
    sides = []
    channels = 1
    # Spread over the whole listing, as the files of one class may be alike.
    for number in np.unique(np.linspace(0, len(listing.names) - 1, _SAMPLE).astype(int)):
        try:
            with Image.open(listing.root / listing.names[number], formats=FORMATS) as image:
                sides.append(min(image.size))
                if image.mode not in ("1", "L", "I;16", "LA"):
                    channels = 3
        except Exception:  # Pillow raises nearly anything; such files are named when they are decoded
            continue

    if not sides:
        raise DataError(
            f"{listing.root}: of {min(len(listing.names), _SAMPLE)} files looked at none is an image"
            f" ({', '.join(FORMATS)})"
        )
    return min(int(np.median(sides)), _LARGEST), channels


def read_folder(listing: Listing, settings: Mapping[str, Any], trusted: Listing | None = None) -> TrainingSet:
    """Decodes a folder's images; those of `trusted` follow them.

    Args:
      listing: of the training set.
      settings: `config.data`; image_size is above 0.
      trusted: of images that are known to be clean, with the same classes.

    Returns:
      The images that decode, in the order of the listings.

    Raises:
      DataError: the decoded images do not fit the memory, or none decodes.
      PreemptedError: it was told to stop.
    """
    left_out = dict(listing.left_out)
    images, names, labels = _read(listing, settings, left_out, "")
    own = len(names)

    if trusted:
        trusted_images, trusted_names, trusted_labels = _read(
            trusted, settings, left_out, f"{trusted.root.as_posix()}/"
        )
        images = np.concatenate([images, trusted_images])
        labels = np.concatenate([labels, trusted_labels])
        names += trusted_names
    return TrainingSet(Split(images, labels), listing.class_names, tuple(names), listing.root, own, left_out)


def _read(
    listing: Listing,
    settings: Mapping[str, Any],
    left_out: dict[str, str],
    prefix: str,
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Returns images, names (with the prefix) and labels of what decodes; notes in `left_out` what does not."""
    images, kept = decode_files(listing.root, listing.files, dict(settings) | {"skip_corrupt": True})

    missing = np.setdiff1d(np.arange(len(listing.names)), kept).tolist()
    for count, number in enumerate(missing):
        name = listing.names[number]
        # To find the reason, a file is read again, which takes its time.
        reason = "does not decode"
        if count < _EXPLAINED:
            reason = _reason(listing.root / name, settings)
        left_out[prefix + name] = reason

    names = [prefix + listing.names[number] for number in kept.tolist()]
    return images, names, listing.labels[kept]


def _reason(path: Path, settings: Mapping[str, Any]) -> str:
    """Says why a file does not decode, in one line."""
    try:
        decode_pixels(path, settings["image_size"], settings["channels"])
    except Exception as error:  # Pillow raises nearly anything
        # In one line, and without the path, which stands beside it.
        return " ".join(str(error).split()).replace(str(path), "it") or type(error).__name__
    return "it did not decode, and now does: it was changed meanwhile"


# --- arrays and TFDS, whose examples are called by their rows


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
        raise DataError(
            f"{settings['dir']}: {len(wrong)} labels are no classes, the first in row {wrong[0]}:"
            f" {split.labels[wrong[0]]}; expected 0 to {len(class_names) - 1}"
        )

    if not is_streamed(split, settings["input"]):
        split = split.materialised()
    count = len(split.labels)
    return TrainingSet(split, class_names, tuple(map(str, range(count))), None, count)


# --- probes


def trusted_ids(probes: str, examples: TrainingSet, seed: int) -> Int[np.ndarray, "P"]:
    """Returns the ids of the probes, ascending; see `badloss_jax.scan` for how they are given.

    Args:
      probes: a text file of names, a folder inside the training set's, or how many to draw and to trust.
      examples: the training set; where it has trusted images beside its own, these are the probes.
      seed: of the draw.

    Returns:
      int64 [P].

    Raises:
      UsageError: there is no such file, it names something twice or what the training set does not have, or the probes
        are fewer than 10 or more than half of all.
    """
    count = len(examples.names)
    path = Path(probes).expanduser()
    # The images of a folder beside the training set follow its own.
    if examples.own < count:
        ids = np.arange(examples.own, count)
    elif path.is_dir():
        ids = _probes_inside(path, examples)
    elif probes.isascii() and probes.isdigit():
        if not int(probes) <= count / 2:
            raise UsageError(f"--probes {probes} of {count:,} images: expected half of them at most")
        ids = np.sort(generator(seed, "probes").choice(count, int(probes), replace=False))
    else:
        ids = _named_probes(path, examples)

    if not _FEWEST_PROBES <= len(ids) <= count / 2:
        raise UsageError(
            f"--probes {probes}: {len(ids)} of {count:,} images are probes, expected {_FEWEST_PROBES} or more, and half"
            " of them at most; 250 are usual"
        )
    return ids


def _probes_inside(folder: Path, examples: TrainingSet) -> Int[np.ndarray, "P"]:
    """Returns the ids of the images below a folder of the training set."""
    if not examples.root:
        raise UsageError(
            f"--probes {folder} is a folder, and the training set has no paths: give a text file of row numbers, or how"
            " many to draw and to trust"
        )
    prefix = folder.resolve().relative_to(examples.root.resolve()).as_posix() + "/"
    return np.array([number for number, name in enumerate(examples.names) if name.startswith(prefix)], np.int64)


def _named_probes(path: Path, examples: TrainingSet) -> Int[np.ndarray, "P"]:
    """Returns the ids of the examples that a text file names, one a line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(
            f"--probes {path} cannot be read ({error}): give a text file of trusted paths, a folder, or how many images"
            " to draw and to trust"
        ) from error

    id_of = {name: number for number, name in enumerate(examples.names)}
    line_of: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        name = os.fsdecode(line).strip("\r\n").removeprefix("./")
        if not name.strip():
            continue
        if name not in id_of:
            raise _unknown_probe(f"--probes {path}, line {number}", name, examples)

        example_id = id_of[name]
        if example_id in line_of:
            raise UsageError(
                f"--probes {path}, line {number}: {printable(name)!r} stands in line {line_of[example_id]} too"
            )
        line_of[example_id] = number
    return np.array(sorted(line_of), np.int64)


def _unknown_probe(line: str, name: str, examples: TrainingSet) -> UsageError:
    reason = ""
    if name in examples.left_out:
        reason = f", which was left out: {examples.left_out[name]}"

    expected = "a row number"
    if examples.root:
        expected = "a path relative to the data's folder"
    return UsageError(f"{line}: {printable(name)!r} is no image of the training set{reason}; expected {expected}")
