"""German traffic signs, in the layout and with the CSV files of their authors (Stallkamp et al. 2012)."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.data.dataset import Dataset
from badloss_jax.data.decoding import decode_split

CLASS_NAMES = (
    "speed limit 20",
    "speed limit 30",
    "speed limit 50",
    "speed limit 60",
    "speed limit 70",
    "speed limit 80",
    "end of speed limit 80",
    "speed limit 100",
    "speed limit 120",
    "no passing",
    "no passing for trucks",
    "right of way at crossing",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no trucks",
    "no entry",
    "danger",
    "bend left",
    "bend right",
    "double bend",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic signals",
    "pedestrians",
    "children",
    "bicycles",
    "ice or snow",
    "wild animals",
    "end of all limits",
    "turn right ahead",
    "turn left ahead",
    "ahead only",
    "straight or right",
    "straight or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no passing",
    "end of no passing for trucks",
)
_TEST_TABLES = ("Final_Test/GT-final_test.csv", "Final_Test/Images/GT-final_test.csv", "GT-final_test.csv")


def load(settings: Mapping[str, Any]) -> Dataset:
    """Reads `data.dir`/Final_Training/Images/<class>/GT-<class>.csv and the images that it lists, likewise Final_Test.

    Images are whole frames, not cut to the sign; `data.image_size` resizes, `data.channels` converts to RGB or grey.

    Raises:
      UsageError: this is not the folder, or a table is missing.
      DataError: a table lacks a column, names a file outside its folder, or a class that is none; an image is missing
        or does not decode. The file is named.
    """
    root = Path(settings["dir"]).expanduser()
    training = root / "Final_Training" / "Images"
    if not settings["dir"] or not training.is_dir():
        raise UsageError(
            f"data.dir: {settings['dir']!r} has no Final_Training/Images; --config.data.dir=DIR names the folder"
            " GTSRB that the official archives unpack to"
        )

    files: list[Path] = []
    labels: list[int] = []
    for folder in sorted(path for path in training.iterdir() if path.is_dir()):
        class_files, class_labels = _read_table(folder / f"GT-{folder.name}.csv", folder)
        files += class_files
        labels += class_labels
    if not files:
        raise DataError(f"{training} has no class folders with images")
    train = decode_split(training, files, labels, settings)

    # The test images and their classes are two archives, which people unpack in different ways.
    tables = [root / name for name in _TEST_TABLES]
    table = next((path for path in tables if path.is_file()), tables[0])
    test = decode_split(root, *_read_table(table, root / "Final_Test" / "Images"), settings)
    return Dataset(train, test, CLASS_NAMES)


def _read_table(table: Path, folder: Path) -> tuple[list[Path], list[int]]:
    """Returns the files that a table lists, in its order, and their classes."""
    files = []
    labels = []
    # Line 1 names the columns.
    for number, row in enumerate(_read_rows(table), start=2):
        path, label = _read_row(f"{table}, line {number}", row, folder)
        files.append(path)
        labels.append(label)

    if len(set(files)) < len(files):
        raise DataError(f"{table} lists an image twice")
    return files, labels


def _read_rows(table: Path) -> list[dict[str, Any]]:
    try:
        with open(table, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter=";"))
    except FileNotFoundError as error:
        raise UsageError(f"{table} does not exist: it says which class each image shows") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} cannot be read: {error}") from error

    if not rows:
        raise DataError(f"{table} lists no images")
    return rows


def _read_row(line: str, row: Mapping[str, Any], folder: Path) -> tuple[Path, int]:
    """Returns the file and the class of one row, which may hold anything; `line` names it in messages."""
    name = row.get("Filename")
    label = row.get("ClassId")
    if not name or not label or Path(name).name != name or name.startswith("."):
        raise DataError(f"{line}: expected Filename, a name without folders, and ClassId, between ;")
    if not label.isascii() or not label.isdigit() or len(label) > 9 or int(label) >= len(CLASS_NAMES):
        raise DataError(f"{line}: ClassId {label[:20]!r} is not 0 to {len(CLASS_NAMES) - 1}")

    path = folder / name
    if not path.is_file():
        raise DataError(f"{line}: {path} does not exist")
    return path, int(label)
