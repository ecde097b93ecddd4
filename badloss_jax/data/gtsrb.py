"""German traffic signs, in the layout and with the CSV files of their authors (Stallkamp et al. 2012)."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.data.dataset import Dataset
from badloss_jax.data.decoding import decode_split

CLASS_NAMES = (
    "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70", "speed limit 80",
    "end of speed limit 80", "speed limit 100", "speed limit 120", "no passing", "no passing for trucks",
    "right of way at crossing", "priority road", "yield", "stop", "no vehicles", "no trucks", "no entry", "danger",
    "bend left", "bend right", "double bend", "bumpy road", "slippery road", "road narrows on the right", "road works",
    "traffic signals", "pedestrians", "children", "bicycles", "ice or snow", "wild animals", "end of all limits",
    "turn right ahead", "turn left ahead", "ahead only", "straight or right", "straight or left", "keep right",
    "keep left", "roundabout", "end of no passing", "end of no passing for trucks",
)  # fmt: skip
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
    if not settings["dir"] or not (root / "Final_Training" / "Images").is_dir():
        raise UsageError(f"data.dir: {settings['dir']!r} has no Final_Training/Images; --config.data.dir=DIR names the"
                         " folder GTSRB that the official archives unpack to")  # fmt: skip
    training = root / "Final_Training" / "Images"
    files, labels = [], []
    for folder in sorted(path for path in training.iterdir() if path.is_dir()):
        found = _read_table(folder / f"GT-{folder.name}.csv", folder)
        files += [path for path, _ in found]
        labels += [label for _, label in found]
    if not files:
        raise DataError(f"{training} has no class folders with images")
    train = decode_split(training, files, labels, settings)
    table = next((root / name for name in _TEST_TABLES if (root / name).is_file()), root / _TEST_TABLES[0])
    tested = _read_table(table, root / "Final_Test" / "Images")
    test = decode_split(root, [path for path, _ in tested], [label for _, label in tested], settings)
    return Dataset(train, test, CLASS_NAMES)


def _read_table(table: Path, folder: Path) -> list[tuple[Path, int]]:
    """Returns the files that a table lists, in its order, and their classes."""
    try:
        with open(table, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter=";"))
    except FileNotFoundError as error:
        raise UsageError(f"{table} does not exist: it says which class each image shows") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} cannot be read: {error}") from error
    if not rows:
        raise DataError(f"{table} lists no images")
    found = []
    for number, row in enumerate(rows, start=2):
        name, label = row.get("Filename"), row.get("ClassId")
        if not name or not label or Path(name).name != name or name.startswith("."):
            raise DataError(
                f"{table}, line {number}: expected Filename, a name without folders, and ClassId, between ;"
            )
        if not label.isascii() or not label.isdigit() or len(label) > 9 or int(label) >= len(CLASS_NAMES):
            raise DataError(f"{table}, line {number}: ClassId {label[:20]!r} is not 0 to {len(CLASS_NAMES) - 1}")
        path = folder / name
        if not path.is_file():
            raise DataError(f"{table}, line {number}: {path} does not exist")
        found.append((path, int(label)))
    if len({path for path, _ in found}) < len(found):
        raise DataError(f"{table} lists an image twice")
    return found
