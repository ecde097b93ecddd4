"""Archives or folders of images written once as a TFDS dataset in ArrayRecord files, for `data.source = "tfds"`.

The folder holds `NAME-SPLIT.array_record-00000-of-00300`, features.json and dataset_info.json as TensorFlow Datasets
writes them, labels-SPLIT.npy, and prepared.json with every file's size and SHA-256. Examples lie in the order of their
classes and file names, so their ids are those of `image_folder`: records are read at random, and need no shuffling.

Image files are stored as they are: their headers are checked, their pixels are not decoded. With a size they are stored
as pixels. On 250 images of ImageNet at 224 px, a second of one CPU core gave 370 random reads of JPEG files and 10,800
of pixels (`badloss bench input`). Shards are not compressed: by ArrayRecord's default pixels would take 18 % less room,
and bare reads of them four times as long. Finished shards are recognised by their size when a killed run goes on, and
by their checksums in a finished folder.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import check_free, locked, read_json, write_atomically, write_text
from badloss_jax.core.hashing import digest, sha256_of
from badloss_jax.core.progress import Progress
from badloss_jax.data.archives import COLLECTIONS, Collection, Example
from badloss_jax.data.encoding import RecordEncoder
from badloss_jax.data.tfds import PREPARED

_SHARD = 2**29  # bytes, about: 300 files for ImageNet
_AHEAD = 64  # images that are read and decoded while others are written
_LAST = "dataset_info.json"  # a folder that has it is whole
_VERSION = "1.0.0"
_MAX_SIDE = 2**12  # pixels


def prepare(name: str, source: Path, folder: Path, size: int, progress: Progress) -> None:
    """Writes a data set, goes on where a killed run stopped, or checks the checksums of what is finished.

    Args:
      name: of `archives.COLLECTIONS`.
      source: the folder with the official archives, or with a folder of images.
      folder: to write to.
      size: store pixels, resized to this many a side; 0 stores the files as they are.
      progress: tells how far it is.

    Raises:
      UsageError: an unknown name, `source` has no such data set, `folder` holds something else, or another process
        is at work in it.
      DataError: an archive or an image is damaged, or the disk is full; finished shards are kept.
    """
    if name not in COLLECTIONS:
        raise UsageError(f"NAME {name!r}: expected one of {', '.join(COLLECTIONS)}")
    if not 0 <= size <= _MAX_SIDE:
        raise UsageError(f"--size {size}: expected 1 to {_MAX_SIDE} pixels a side")
    check_free(folder, PREPARED, option="--to")

    with locked(folder):
        notes: dict[str, Any] = {}
        if (folder / PREPARED).is_file():
            notes = _read_notes(folder / PREPARED)
        if notes and (notes["name"], notes["size"]) != (name, size):
            raise UsageError(
                f"--to {folder} was begun with NAME {notes['name']} and --size {notes['size']}: choose another folder,"
                " or go on with those"
            )

        # A folder that is whole costs a look at its sums, and no image is decoded.
        damaged: list[str] = []
        if (folder / _LAST).is_file():
            damaged = _damaged(folder, notes["files"], progress)
            if not damaged:
                progress.note(f"{folder} is whole: the checksums of its {len(notes['files'])} files are right")
                return
            progress.note(f"missing or damaged, and written again: {', '.join(damaged)}")

        # Only now: what is whole needs no source.
        if not source.is_dir():
            raise UsageError(f"--from {source} is not a folder")
        _Writer(name, source, folder, size, notes, progress).write(damaged)


def _read_notes(path: Path) -> dict[str, Any]:
    """Reads prepared.json, which may hold anything."""
    notes = read_json(path)
    try:
        usable = _has_types(notes, name=str, size=int, plan=str)
        for name, note in notes["files"].items():
            well_formed = _has_types(note, bytes=int, sha256=str, records=int)
            # A file that is damaged is deleted, so its name must not lead out of the folder.
            usable = usable and well_formed and Path(name).name == name
    except (KeyError, TypeError, AttributeError):
        usable = False

    if not usable:
        raise DataError(f"{path} is damaged: delete its folder, and prepare it again")
    return notes


def _has_types(notes: Mapping[str, Any], **types: type) -> bool:
    return all(isinstance(notes[key], kind) for key, kind in types.items())


def _damaged(folder: Path, files: Mapping[str, Any], progress: Progress) -> list[str]:
    """Returns the noted files that are missing, or whose bytes are others."""
    progress.phase(f"checking {folder}")
    progress.begin(sum(note["records"] for note in files.values()))

    damaged = []
    for number, (path, note) in enumerate(files.items()):
        if not (folder / path).is_file() or sha256_of(folder / path) != note["sha256"]:
            damaged.append(path)
        progress.advance(note["records"], "")
        progress.say(f"file {number + 1}/{len(files)}")

    progress.end()
    return damaged


class _Writer:
    """Writes one data set to one folder."""

    def __init__(self, name: str, source: Path, folder: Path, size: int, notes: dict[str, Any], progress: Progress):
        self.name = name
        self.folder = folder
        self.size = size
        self.progress = progress

        for stray in folder.glob(".*-*"):  # what a killed run was writing
            stray.unlink()

        progress.note(f"looking through {source}")
        self.unpacked = folder / ".unpacked"
        self.collection = COLLECTIONS[name](source, self.unpacked)
        for split, examples in self.collection.splits.items():
            if not examples:
                raise DataError(f"{source} has no {split} images")

        plan = _digest(self.collection)
        if notes.get("plan", plan) != plan:
            raise UsageError(
                f"--to {folder} was begun from other images than --from {source} has: choose another folder"
            )
        self.notes = {"name": name, "size": size, "plan": plan, "files": notes.get("files", {})}
        self.encoder = RecordEncoder(self.collection, size)

    def write(self, damaged: Sequence[str]) -> None:
        """Writes the files that are missing or damaged, and dataset_info.json last."""
        # Without dataset_info.json nobody takes the folder for a whole one while it is written.
        for path in (_LAST, *damaged):
            (self.folder / path).unlink(missing_ok=True)
        self._write_notes()

        num_shards = self._write_shards()
        self._write_labels()
        self._write_features()

        shutil.rmtree(self.unpacked, ignore_errors=True)
        write_text(self.folder / _LAST, json.dumps(self._info(), indent=2))

        counts = ", ".join(f"{len(examples):,} {split}" for split, examples in self.collection.splits.items())
        num_classes = len(self.collection.class_names)
        self.progress.note(f"{self.folder}: {counts} images in {num_classes} classes, {num_shards} shards")

    def _write_shards(self) -> int:
        """Writes the shards that are not there; returns how many there are in all."""
        shards = list(self._shards())
        missing = [(path, examples) for path, examples in shards if not self._is_there(path)]
        if len(missing) < len(shards):
            self.progress.note(f"{len(shards) - len(missing)} of {len(shards)} shards were written before")

        self.progress.phase(f"writing {self.name}")
        self.progress.begin(sum(len(examples) for _, examples in missing))
        for path, examples in missing:
            self._write(path, partial(self._write_shard, examples), len(examples))
        self.progress.end()
        return len(shards)

    def _write_labels(self) -> None:
        for split, examples in self.collection.splits.items():
            labels = np.array([example.label for example in examples], np.int32)
            self._write(f"labels-{split}.npy", partial(np.save, arr=labels, allow_pickle=False))

    def _write_features(self) -> None:
        # TFDS writes several files, under names of its own.
        with tempfile.TemporaryDirectory() as aside:
            self.encoder.features.save_config(aside)
            for file in sorted(Path(aside).iterdir()):
                self._write(file.name, partial(shutil.copyfile, file))

    def _shards(self) -> Iterator[tuple[str, list[Example]]]:
        """Yields the file name and the examples of every shard: as many in each, give or take one."""
        for split, examples in self.collection.splits.items():
            # Pixels are all of one size; of files the mean will do.
            if self.size:
                mean_bytes: float = 3 * self.size**2
            else:
                mean_bytes = sum(example.size for example in examples) / len(examples)

            count = min(len(examples), 1 + int(mean_bytes * len(examples)) // _SHARD)
            ends = [len(examples) * i // count for i in range(count + 1)]
            for i in range(count):
                yield f"{self.name}-{split}.array_record-{i:05}-of-{count:05}", examples[ends[i] : ends[i + 1]]

    def _is_there(self, path: str) -> bool:
        note = self.notes["files"].get(path)
        file = self.folder / path
        return note is not None and file.is_file() and file.stat().st_size == note["bytes"]

    def _write(self, path: str, write: Callable[[Path], object], records: int = 0) -> None:
        """Writes a file aside, renames it, and notes its checksum; what was noted before must come out again."""
        note: dict[str, Any] = {"records": records}

        def write_and_note(aside: Path) -> None:
            write(aside)
            # Before the file gets its name, so that a wrong one never has it.
            note.update(bytes=aside.stat().st_size, sha256=sha256_of(aside))
            if self.notes["files"].get(path, note) != note:
                raise DataError(
                    f"{self.folder / path} comes out with other bytes than before: an image has changed since; delete"
                    " the folder, and prepare it again"
                )

        write_atomically(self.folder / path, write_and_note)
        self.notes["files"][path] = note
        self._write_notes()

    def _write_notes(self) -> None:
        write_text(self.folder / PREPARED, json.dumps(self.notes, indent=1))

    def _write_shard(self, examples: list[Example], aside: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        try:
            # One record a group, as the records are read one by one, at random.
            writer = ArrayRecordWriter(str(aside), "group_size:1,uncompressed")
            with ThreadPoolExecutor() as pool:
                for start in range(0, len(examples), _AHEAD):
                    for record in pool.map(self.encoder.record, examples[start : start + _AHEAD]):
                        writer.write(record)
                        self.progress.advance(1, "")
                    self.progress.say(examples[start].name)
            writer.close()
        except RuntimeError as error:  # how array_record tells of a full disk
            raise OSError(str(error)) from error

    def _info(self) -> dict[str, Any]:
        """Returns TFDS's description of the data set."""
        lengths: dict[str, list[str]] = {}
        sizes: dict[str, int] = {}
        for path, examples in self._shards():
            split = path.removeprefix(f"{self.name}-").partition(".")[0]
            lengths.setdefault(split, []).append(str(len(examples)))
            sizes[split] = sizes.get(split, 0) + self.notes["files"][path]["bytes"]

        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        splits = [
            {
                "name": split,
                "shardLengths": lengths[split],
                "numBytes": str(sizes[split]),
                "filepathTemplate": template,
            }
            for split in lengths
        ]
        return {"name": self.name, "version": _VERSION, "fileFormat": "array_record", "splits": splits}


def _digest(collection: Collection) -> str:
    """Hashes which images there are, by name, label and size; not their content, which is read only once."""
    splits = {
        split: [(example.name, example.label, example.size) for example in examples]
        for split, examples in collection.splits.items()
    }
    return digest(collection.class_names, splits)
