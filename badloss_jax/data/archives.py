"""What lies in the official archives of data sets, found without unpacking them or running what they hold.

A new data set is one function, folder -> `Collection`, and one line in `COLLECTIONS`. Archives are read in place, by
`badloss_jax.data.tar`.
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.data.image_folder import list_images
from badloss_jax.data.tar import Member, inflated, matched, members, named_members, read_range, read_table

IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
_IMAGENET_SIZES = {"train": 1_281_167, "validation": 50_000}
_CIFAR_BATCHES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
_CIFAR_CLASSES = "batches.meta.txt"
_CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: a label, then planes of red, green and blue
_MAX_IMAGE = 2**28  # bytes of one image file
# TFDS's names of splits, where folders and archives have others.
_SPLIT_NAMES = {"val": "validation"}


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
        return read_range(self.file, self.offset, self.size, self.name)


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


# --- ImageNet


@dataclass(frozen=True)
class _ImageNetFiles:
    """The three files of ILSVRC 2012 in one folder, as image-net.org names them."""

    source: Path

    @property
    def train(self) -> Path:
        return self.source / "ILSVRC2012_img_train.tar"

    @property
    def validation(self) -> Path:
        return self.source / "ILSVRC2012_img_val.tar"

    @property
    def devkit(self) -> Path:
        return self.source / "ILSVRC2012_devkit_t12.tar.gz"


def imagenet2012(source: Path, unpacked: Path) -> Collection:
    """Finds ILSVRC2012_img_train.tar, _img_val.tar and _devkit_t12.tar.gz, or a folder of images.

    Args:
      source: the folder that they lie in.
      unpacked: the folder for what has to be inflated.

    Returns:
      The splits train and validation; warns if they are not as large as the official ones.

    Raises:
      UsageError: a file is missing.
      DataError: an archive is damaged, or is not the official one.
    """
    files = _ImageNetFiles(source)
    if not files.train.exists():
        return _folder_or_usage(source, [files.train.name, files.validation.name, files.devkit.name])
    for path in (files.validation, files.devkit):
        if not path.is_file():
            raise UsageError(f"{path} is missing: https://image-net.org has it beside {files.train.name}")

    train = _imagenet_training(files)
    validation = _imagenet_validation(files, tuple(train), _validation_wnids(files.devkit, unpacked))
    collection = _by_class(tuple(sorted(train)), {"train": train, "validation": validation})

    for split, official in _IMAGENET_SIZES.items():
        count = len(collection.splits[split])
        if count != official:
            warnings.warn(f"{source} has {count:,} of ImageNet's {official:,} {split} images", stacklevel=2)
    return collection


def _imagenet_training(files: _ImageNetFiles) -> dict[str, list[Member]]:
    """Finds the training images of every class, each class an archive inside the archive."""
    train: dict[str, list[Member]] = {}
    for inner in members(files.train, 2**40):
        (wnid,) = matched(files.train, inner.name, r"(n\d{8})\.tar")
        images = list(members(files.train, _MAX_IMAGE, inside=inner))
        # A file of another name is none of the official archive.
        for image in images:
            matched(files.train, image.name, rf"{wnid}_[\w-]+\.JPEG")

        if wnid in train or not images:
            raise DataError(f"{files.train}: {inner.name} is there twice, or empty")
        train[wnid] = images
    return train


def _imagenet_validation(
    files: _ImageNetFiles,
    classes: Sequence[str],
    wnids: Sequence[str],
) -> dict[str, list[Member]]:
    """Finds the validation images of the classes; `wnids` has the class of every image, in the order of numbers."""
    validation: dict[str, list[Member]] = {wnid: [] for wnid in classes}
    for image in members(files.validation, _MAX_IMAGE):
        (digits,) = matched(files.validation, image.name, r"ILSVRC2012_val_(\d{8})\.JPEG")
        number = int(digits)
        if not 1 <= number <= len(wnids) or wnids[number - 1] not in validation:
            raise DataError(
                f"{files.validation}: {image.name} has no class in {files.devkit.name} that {files.train.name} has"
            )
        validation[wnids[number - 1]].append(image)
    return validation


def _validation_wnids(devkit: Path, unpacked: Path) -> list[str]:
    """Returns the class of every validation image, in the order of their numbers."""
    from scipy.io import loadmat

    # The archive of validation images is not sorted by class: two tables of the devkit say what they show.
    truth = "ILSVRC2012_validation_ground_truth.txt"
    meta = "meta.mat"
    tables = named_members(inflated(devkit, unpacked), 2**26, shown=devkit)
    for name in (truth, meta):
        if name not in tables:
            raise DataError(f"{devkit} lacks {name}")

    try:
        synsets = loadmat(io.BytesIO(read_table(tables[meta], devkit)))["synsets"].ravel()
        numbers = [int(number.item()) for number in synsets["ILSVRC2012_ID"]]
        wnids = [str(wnid.item()) for wnid in synsets["WNID"]]
        wnid_of = dict(zip(numbers, wnids, strict=True))
        return [wnid_of[int(line)] for line in read_table(tables[truth], devkit).split()]
    except DataError:  # says more than the next message could
        raise
    except Exception as error:  # SciPy raises nearly anything on damaged files
        raise DataError(f"{devkit}: {meta} and {truth} do not say the classes: {error!r}") from error


# --- Imagenette


def imagenette(source: Path, unpacked: Path) -> Collection:
    """Finds imagenette2.tgz, imagenette2-320.tgz or imagenette2-160.tgz, or the folder that they unpack to.

    Args:
      source: the folder that one of them lies in.
      unpacked: the folder for the inflated archive.

    Returns:
      The splits train and validation.

    Raises:
      UsageError: none of them is there, or several are.
      DataError: the archive is damaged, or has other classes than Imagenette.
    """
    official = [f"imagenette2{size}.tgz" for size in ("", "-320", "-160")]
    archives = [source / name for name in official if (source / name).is_file()]
    if len(archives) > 1:
        raise UsageError(f"{source} has {' and '.join(path.name for path in archives)}: leave one there")

    collection = _imagenette_archive(archives[0], unpacked) if archives else _folder_or_usage(source, official)
    if collection.class_names != tuple(IMAGENETTE):
        raise DataError(
            f"{source} has the classes {', '.join(collection.class_names[:3])}, ...: not those of Imagenette"
        )

    # Folders and archives call the classes by their numbers in WordNet.
    return Collection(tuple(IMAGENETTE.values()), collection.splits)


def _imagenette_archive(archive: Path, unpacked: Path) -> Collection:
    splits: dict[str, dict[str, list[Member]]] = {}
    for member in members(inflated(archive, unpacked), _MAX_IMAGE, shown=archive):
        parts = member.name.split("/")
        # Its table of noisy labels lies elsewhere.
        if len(parts) != 4 or parts[-1].startswith("."):
            continue

        split, wnid = matched(archive, member.name, r"[^/]+/(train|val)/(n\d{8})/[^/]+")
        images = splits.setdefault(_SPLIT_NAMES.get(split, split), {})
        images.setdefault(wnid, []).append(member._replace(name=parts[-1]))

    if set(splits) != {"train", "validation"}:
        raise DataError(f"{archive} has no images in train/<class> and val/<class>")
    return _by_class(tuple(sorted(splits["train"])), splits)


# --- CIFAR-10


def cifar10(source: Path, unpacked: Path) -> Collection:
    """Finds cifar-10-binary.tar.gz, or a folder of images.

    Args:
      source: the folder that it lies in.
      unpacked: the folder for the inflated archive.

    Returns:
      The splits train and test, as bare pixels, or of a folder as image files.

    Raises:
      UsageError: it is not there, or is the Python version.
      DataError: it is damaged, lacks a file, or has a label without a class.
    """
    archive = source / "cifar-10-binary.tar.gz"
    if not archive.is_file():
        if (source / "cifar-10-python.tar.gz").is_file() or (source / "cifar-10-batches-py").is_dir():
            raise UsageError(
                f"{source} has the Python version of CIFAR-10, whose pickles could run anything:"
                f" https://www.cs.toronto.edu/~kriz/cifar.html has {archive.name} as well"
            )
        return _folder_or_usage(source, [archive.name])

    tables = named_members(inflated(archive, unpacked), 2**30, shown=archive)
    needed = [_CIFAR_CLASSES, *_CIFAR_BATCHES["train"], *_CIFAR_BATCHES["test"]]
    missing = [name for name in needed if name not in tables]
    if missing:
        raise DataError(f"{archive} lacks {', '.join(missing)}")

    lines = read_table(tables[_CIFAR_CLASSES], archive).decode("utf-8", "replace").splitlines()
    class_names = tuple(line.strip() for line in lines if line.strip())

    splits: dict[str, list[Example]] = {}
    for split, batches in _CIFAR_BATCHES.items():
        examples = [example for name in batches for example in _cifar_batch(archive, name, tables[name], class_names)]
        # The batches mix the classes; inside a class their order stays.
        splits[split] = sorted(examples, key=lambda example: example.label)
    return Collection(class_names, splits, (3, 32, 32))


def _cifar_batch(archive: Path, name: str, batch: Member, class_names: Sequence[str]) -> list[Example]:
    """Returns the examples of one file, in its order; only their labels are read."""
    if batch.size % _CIFAR_RECORD or not batch.size:
        raise DataError(f"{archive}: {name} has {batch.size:,} bytes, not a multiple of {_CIFAR_RECORD:,}")

    shape = (batch.size // _CIFAR_RECORD, _CIFAR_RECORD)
    # Mapped, not read: the pixels are read when they are written.
    records = np.memmap(batch.archive, np.uint8, "r", batch.offset, shape)
    examples = []
    for i, label in enumerate(records[:, 0].tolist()):
        if label >= len(class_names):
            raise DataError(f"{archive}: {name} has the label {label}, expected 0 to {len(class_names) - 1}")
        pixels = batch.offset + i * _CIFAR_RECORD + 1
        examples.append(Example(f"{class_names[label]}/{name}-{i:04}", label, batch.archive, pixels, _CIFAR_RECORD - 1))
    return examples


# --- folders of images


def image_folder(source: Path, unpacked: Path) -> Collection:
    """Finds the images of a folder `{train,test}/<class>/*`, or with val instead of test.

    Args:
      source: the folder.
      unpacked: not used.

    Returns:
      The splits train and test, or train and validation.

    Raises:
      UsageError: a split's folder is missing.
      DataError: a class folder without images, or one in test that train has not.
    """
    class_names, listed = list_images(source)
    splits = {}
    for split, (folder, files, labels) in listed.items():
        examples = []
        for path, label in zip(files, labels, strict=True):
            examples.append(Example(f"{path.parent.name}/{path.name}", label, path, 0, path.stat().st_size))
        splits[_SPLIT_NAMES.get(folder.name, split)] = examples
    return Collection(class_names, splits)


COLLECTIONS: dict[str, Callable[[Path, Path], Collection]] = {
    "imagenet2012": imagenet2012,
    "imagenette": imagenette,
    "cifar10": cifar10,
    "image_folder": image_folder,
}


def _folder_or_usage(source: Path, archives: list[str]) -> Collection:
    """Finds the images of a folder; without one, names the archives that could be there instead."""
    if not (source / "train").is_dir():
        raise UsageError(f"--from {source} has neither {', '.join(archives)} nor a folder train/<class>/<image>")
    return image_folder(source, source)


def _by_class(class_names: tuple[str, ...], splits: Mapping[str, Mapping[str, list[Member]]]) -> Collection:
    """Sorts the images of every class by file name."""
    ordered = {}
    for split, images in splits.items():
        unknown = sorted(set(images) - set(class_names))
        if unknown:
            raise DataError(f"the {split} images have the class {unknown[0]!r}, which the training images have not")

        ordered[split] = [
            Example(f"{name}/{image.name}", label, image.archive, image.offset, image.size)
            for label, name in enumerate(class_names)
            for image in sorted(images.get(name, []))
        ]
    return Collection(class_names, ordered)
