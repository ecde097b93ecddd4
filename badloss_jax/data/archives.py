"""What lies in the official archives of data sets, found without unpacking them or running what they hold.

A new data set is one function, folder -> `Collection`, and one line in `COLLECTIONS`. Archives are read in place: a
member is a range of bytes of the file, so no member's name ever becomes a path.
"""

import gzip
import io
import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import write_atomically
from badloss_jax.data.image_folder import list_images

IMAGENETTE = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
}  # fmt: skip
_IMAGENET_SIZES = {"train": 1_281_167, "validation": 50_000}
_CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: a label, then planes of red, green and blue
_MAX_IMAGE = 2**28  # bytes of one image file
_MAX_TABLE = 2**22  # bytes of one table
_Place = tuple[str, Path, int, int]  # file name in its class, archive, offset, bytes
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error)


@dataclass(frozen=True, slots=True)
class Example:
    """Where the bytes of one image lie; `name` is its class and file, as in a folder of images."""

    name: str
    label: int
    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Reads the bytes.

        Raises:
          DataError: the file is not there any more, or is shorter than it was.
        """
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.file} cannot be read: {error}") from error
        if len(content) != self.size:
            raise DataError(f"{self.file} has become shorter: {self.name} has {len(content)} bytes, not {self.size}")
        return content


@dataclass(frozen=True)
class Collection:
    """The images of a data set, by split, in the order of their classes and, inside a class, of their file names.

    Attributes:
      class_names: in the order of the labels.
      splits: by the names that TFDS gives them.
      planes: (C, H, W) if images are bare pixels in this order, None if they are image files.
    """

    class_names: tuple[str, ...]
    splits: dict[str, list[Example]]
    planes: tuple[int, int, int] | None = None


def imagenet2012(source: Path, unpacked: Path) -> Collection:
    """Finds ILSVRC2012_img_train.tar, _img_val.tar and _devkit_t12.tar.gz, or a folder of images."""
    train_tar, val_tar = source / "ILSVRC2012_img_train.tar", source / "ILSVRC2012_img_val.tar"
    devkit = source / "ILSVRC2012_devkit_t12.tar.gz"
    if not train_tar.exists():
        return _folder_or_usage(source, [train_tar.name, val_tar.name, devkit.name])
    for path in (val_tar, devkit):
        if not path.is_file():
            raise UsageError(f"{path} is missing: https://image-net.org has it beside {train_tar.name}")
    train: dict[str, list[_Place]] = {}
    for name, offset, size in _members(train_tar, 2**40):
        wnid = _matched(train_tar, name, r"(n\d{8})\.tar")[0]
        images = [(file, train_tar, start, length)
                  for file, start, length in _members(train_tar, _MAX_IMAGE, offset, size)]  # fmt: skip
        for file, *_ in images:
            _matched(train_tar, file, rf"{wnid}_[\w-]+\.JPEG")
        if wnid in train or not images:
            raise DataError(f"{train_tar}: {name} is there twice, or empty")
        train[wnid] = images
    wnids = _validation_wnids(devkit, unpacked)
    validation: dict[str, list[_Place]] = {wnid: [] for wnid in train}
    for name, offset, size in _members(val_tar, _MAX_IMAGE):
        number = int(_matched(val_tar, name, r"ILSVRC2012_val_(\d{8})\.JPEG")[0])
        if not 1 <= number <= len(wnids) or wnids[number - 1] not in validation:
            raise DataError(f"{val_tar}: {name} has no class in {devkit.name} that {train_tar.name} has")
        validation[wnids[number - 1]].append((name, val_tar, offset, size))
    collection = _by_class(tuple(sorted(train)), {"train": train, "validation": validation})
    for split, official in _IMAGENET_SIZES.items():
        if len(collection.splits[split]) != official:
            warnings.warn(f"{source} has {len(collection.splits[split]):,} of ImageNet's {official:,} {split} images",
                          stacklevel=2)  # fmt: skip
    return collection


def imagenette(source: Path, unpacked: Path) -> Collection:
    """Finds imagenette2.tgz, imagenette2-320.tgz or imagenette2-160.tgz, or the folder that they unpack to."""
    official = [f"imagenette2{size}.tgz" for size in ("", "-320", "-160")]
    archives = [source / name for name in official if (source / name).is_file()]
    if len(archives) > 1:
        raise UsageError(f"{source} has {' and '.join(path.name for path in archives)}: leave one there")
    if archives:
        (archive,) = archives
        splits: dict[str, dict[str, list[_Place]]] = {}
        tar = _inflated(archive, unpacked)
        for name, offset, size in _members(tar, _MAX_IMAGE, shown=archive):
            parts = name.split("/")
            if len(parts) != 4 or parts[-1].startswith("."):
                continue  # its table of noisy labels
            split, wnid = _matched(archive, name, r"[^/]+/(train|val)/(n\d{8})/[^/]+")
            split = {"val": "validation"}.get(split, split)
            splits.setdefault(split, {}).setdefault(wnid, []).append((parts[-1], tar, offset, size))
        if set(splits) != {"train", "validation"}:
            raise DataError(f"{archive} has no images in train/<class> and val/<class>")
        collection = _by_class(tuple(sorted(splits["train"])), splits)
    else:
        collection = _folder_or_usage(source, official)
    if collection.class_names != tuple(IMAGENETTE):
        raise DataError(
            f"{source} has the classes {', '.join(collection.class_names[:3])}, ...: not those of Imagenette"
        )
    return Collection(tuple(IMAGENETTE.values()), collection.splits)


def cifar10(source: Path, unpacked: Path) -> Collection:
    """Finds cifar-10-binary.tar.gz, or a folder of images."""
    archive = source / "cifar-10-binary.tar.gz"
    if not archive.is_file():
        if (source / "cifar-10-python.tar.gz").is_file() or (source / "cifar-10-batches-py").is_dir():
            raise UsageError(f"{source} has the Python version of CIFAR-10, whose pickles could run anything:"
                             f" https://www.cs.toronto.edu/~kriz/cifar.html has {archive.name} as well")  # fmt: skip
        return _folder_or_usage(source, [archive.name])
    tar = _inflated(archive, unpacked)
    found = {name.rpartition("/")[2]: (offset, size) for name, offset, size in _members(tar, 2**30, shown=archive)}
    batches = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    missing = [name for name in ("batches.meta.txt", *batches["train"], *batches["test"]) if name not in found]
    if missing:
        raise DataError(f"{archive} lacks {', '.join(missing)}")
    table = _read(tar, *found["batches.meta.txt"], archive).decode("utf-8", "replace")
    class_names = tuple(line.strip() for line in table.splitlines() if line.strip())
    splits: dict[str, list[Example]] = {}
    for split, names in batches.items():
        examples = []
        for name in names:
            offset, size = found[name]
            if size % _CIFAR_RECORD or not size:
                raise DataError(f"{archive}: {name} has {size:,} bytes, not a multiple of {_CIFAR_RECORD:,}")
            records = np.memmap(tar, np.uint8, "r", offset, (size // _CIFAR_RECORD, _CIFAR_RECORD))
            for i, label in enumerate(records[:, 0].tolist()):
                if label >= len(class_names):
                    raise DataError(f"{archive}: {name} has the label {label}, expected 0 to {len(class_names) - 1}")
                place = offset + i * _CIFAR_RECORD + 1
                examples.append(Example(f"{class_names[label]}/{name}-{i:04}", label, tar, place, _CIFAR_RECORD - 1))
        splits[split] = sorted(examples, key=lambda example: example.label)
    return Collection(class_names, splits, (3, 32, 32))


def image_folder(source: Path, unpacked: Path) -> Collection:
    """Finds the images of a folder `{train,test}/<class>/*`, or with val instead of test."""
    class_names, listed = list_images(source)
    splits = {}
    for split, (folder, files, labels) in listed.items():
        name = {"val": "validation"}.get(folder.name, split)
        splits[name] = [Example(f"{path.parent.name}/{path.name}", label, path, 0, path.stat().st_size)
                        for path, label in zip(files, labels, strict=True)]  # fmt: skip
    return Collection(class_names, splits)


COLLECTIONS: dict[str, Callable[[Path, Path], Collection]] = {
    "imagenet2012": imagenet2012,
    "imagenette": imagenette,
    "cifar10": cifar10,
    "image_folder": image_folder,
}


def _folder_or_usage(source: Path, archives: list[str]) -> Collection:
    if not (source / "train").is_dir():
        raise UsageError(f"--from {source} has neither {', '.join(archives)} nor a folder train/<class>/<image>")
    return image_folder(source, source)


def _by_class(class_names: tuple[str, ...], splits: dict[str, dict[str, list[_Place]]]) -> Collection:
    """Sorts the images of every class by file name."""
    ordered = {}
    for split, images in splits.items():
        unknown = sorted(set(images) - set(class_names))
        if unknown:
            raise DataError(f"the {split} images have the class {unknown[0]!r}, which the training images have not")
        ordered[split] = [
            Example(f"{name}/{file}", label, path, offset, size)
            for label, name in enumerate(class_names)
            for file, path, offset, size in sorted(images.get(name, []))
        ]
    return Collection(class_names, ordered)


def _members(
    archive: Path, largest: int, start: int = 0, length: int | None = None, shown: Path | None = None
) -> Iterator[tuple[str, int, int]]:
    """Yields (name, offset in the file, size) of the plain files in a tar archive, or in one inside it.

    Args:
      archive: the file.
      largest: bytes that a member may have.
      start, length: of the inner archive.
      shown: what to call the file in messages.

    Raises:
      DataError: it is no tar archive, or ends too early, or has links, devices, names with "..", or too large members.
    """
    shown = shown or archive
    try:
        with open(archive, "rb") as file:
            window = file if length is None else _Window(file, start, length)
            with tarfile.open(fileobj=window, mode="r:") as tar:  # type: ignore[call-overload]
                for member in tar:
                    name = member.name.removeprefix("./")
                    plain = member.isfile() and not member.issparse()
                    if not (plain or member.isdir()) or name.startswith("/") or ".." in name.split("/"):
                        raise DataError(f"{shown} holds {name!r}, a link, device or outside name: not the official one")
                    if member.size > largest:
                        raise DataError(f"{shown} holds {name!r} of {member.size:,} bytes, expected up to {largest:,}")
                    if plain:
                        yield name, start + member.offset_data, member.size
                    tar.members = []  # keeps the memory of 1.3 million members free
    except DataError:
        raise
    except _TAR_ERRORS as error:
        raise DataError(f"{shown} is damaged, or no tar archive: {error}") from error


def _inflated(archive: Path, unpacked: Path) -> Path:
    """Returns the tar file that a gzipped one holds, kept in the folder `unpacked` to be read in place."""
    about = archive.stat()
    tar = unpacked / f"{archive.stem}-{about.st_size}-{about.st_mtime_ns}.tar"
    limit = max(2**26, 20 * about.st_size)

    def inflate(aside: Path) -> None:
        try:
            with gzip.open(archive) as compressed, open(aside, "wb") as file:
                while piece := compressed.read(2**20):
                    file.write(piece)
                    if file.tell() > limit:
                        raise DataError(f"{archive} unpacks to more than {limit:,} bytes: a decompression bomb")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{archive} is damaged, or not gzipped: {error}") from error

    if not tar.is_file():
        write_atomically(tar, inflate)
    return tar


def _matched(archive: Path, name: str, pattern: str) -> tuple[str, ...]:
    """Returns the groups of a member's name, which must have this form."""
    match = re.fullmatch(pattern, name)
    if match is None:
        raise DataError(f"{archive} holds {name!r}, which the official archive does not")
    return match.groups()


def _read(tar: Path, offset: int, size: int, archive: Path) -> bytes:
    if size > _MAX_TABLE:
        raise DataError(f"{archive} holds a table of {size:,} bytes, expected up to {_MAX_TABLE:,}")
    return Example(archive.name, 0, tar, offset, size).read()


def _validation_wnids(devkit: Path, unpacked: Path) -> list[str]:
    """Returns the class of every validation image, in the order of their numbers."""
    from scipy.io import loadmat

    tar = _inflated(devkit, unpacked)
    found = {name.rpartition("/")[2]: (offset, size) for name, offset, size in _members(tar, 2**26, shown=devkit)}
    truth, meta = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
    for name in (truth, meta):
        if name not in found:
            raise DataError(f"{devkit} lacks {name}")
    try:
        synsets = loadmat(io.BytesIO(_read(tar, *found[meta], devkit)))["synsets"].ravel()
        numbers = [int(number.item()) for number in synsets["ILSVRC2012_ID"]]
        wnid_of = dict(zip(numbers, (str(wnid.item()) for wnid in synsets["WNID"]), strict=True))
        return [wnid_of[int(line)] for line in _read(tar, *found[truth], devkit).split()]
    except DataError:
        raise
    except Exception as error:  # SciPy raises nearly anything on damaged files
        raise DataError(f"{devkit}: {meta} and {truth} do not say the classes: {error!r}") from error


class _Window:
    """A part of an open file, as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, length: int):
        self._file, self._start, self._length, self._place = file, start, length, 0

    def read(self, count: int = -1) -> bytes:
        left = max(self._length - self._place, 0)
        self._file.seek(self._start + self._place)
        content = self._file.read(left if count < 0 else min(count, left))
        self._place += len(content)
        return content

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        self._place = place + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        return self._place

    def tell(self) -> int:
        return self._place
