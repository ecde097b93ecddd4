"""Images read one by one from ArrayRecord files, and decoded when they are asked for."""

import io
import math
import os
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image
from tqdm import tqdm

from badloss_jax.core.errors import DataError
from badloss_jax.core.hashing import digest
from badloss_jax.core.memory import check_host_memory
from badloss_jax.data.pixels import decode_pixels, resize_pixels

TOO_LARGE = (
    "take fewer or smaller images (--config.data.image_size=PIXELS), or prepare them by `badloss prepare`, which are"
    " then streamed"
)
_CHUNK = 256  # images decoded between two steps of the progress bar


class Records:
    """The records of a split: tf.train.Example messages in ArrayRecord files, in the order of the examples.

    Threads may share one, and processes too: each opens the files for itself, when it first reads.
    """

    def __init__(self, name: str, shards: Sequence[tuple[Path, int]]):
        """Notes the name of the split, for messages, and its files, each with its number of records; opens none."""
        self.name = name
        self.shards = shards
        self._ends = np.cumsum([count for _, count in shards])
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened: tuple[int, Any] = (0, None)  # the process that opened the files, and its reader

    def __len__(self) -> int:
        return int(self._ends[-1])

    def features(self, row: int) -> Any:
        """Reads one record and returns its map of features, protobuf messages.

        Raises:
          DataError: its file is missing or damaged; file, split and row are named.
        """
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            return tf_example_pb2.Example.FromString(self._reader()[row]).features.feature
        except Exception as error:  # array_record and protobuf raise nearly anything on damaged files
            raise DataError(
                f"{self.describe(row)} cannot be read: {error}; if `badloss prepare` wrote it, the same command checks"
                " the folder and writes what is damaged again"
            ) from error

    def describe(self, row: int) -> str:
        """Names a record, its file and its split."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        path, count = self.shards[shard]
        row_in_shard = row - int(self._ends[shard]) + count
        return f"record {row_in_shard} of {path} ({self.name} {row})"

    def _reader(self) -> Any:
        """Returns array_record's reader; a forked process opens the files anew."""
        if self._opened[0] != os.getpid():
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            _allow_open_files(len(self.shards))
            # No lock, which a fork could copy while it is held: of two readers made at once, one is dropped.
            reader = ArrayRecordDataSource([f"{path}[0:{count}]" for path, count in self.shards])
            self._opened = (os.getpid(), reader)
        return self._opened[1]


class RecordImages:
    """Images uint8 [N, H, W, C] that look like an array, but are read and decoded when they are indexed.

    `images[3]` is [H, W, C]; `images[rows]`, with a slice, a list of rows or a mask, is [M, H, W, C]. Threads and
    worker processes may index it at once.
    """

    ndim = 4
    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        records: Records,
        identity: str,
        stored_shape: tuple[int, int, int] | None,
        size: int,
        channels: int,
    ):
        """Describes the images; if their size is not known, the first one is decoded.

        Args:
          records: they are in.
          identity: of the records' content.
          stored_shape: (H, W, C) of the images if they are stored as pixels, None if as image files.
          size: pixels a side to resize to, or 0.
          channels: 3 (RGB) or 1 (grey).

        Raises:
          DataError: the first image does not decode.
        """
        self._records = records
        self._stored_shape = stored_shape
        self._size = size
        self._channels = channels
        self._rows = np.arange(len(records))
        self._pad = 0
        self._identity = digest(identity, stored_shape, size, channels)

        self._sides: tuple[int, ...] = ()  # (H, W) without the padding
        if size:
            self._sides = (size, size)
        elif stored_shape:
            self._sides = stored_shape[:2]
        else:
            # The first image stands for all; the others are checked when they are read.
            self._sides = self._decode(0).shape[:2]

    def view(self, rows: Int[np.ndarray, "M"] | slice, pad: int) -> "RecordImages":
        """Returns some rows alone, padded with zeros; nothing is decoded.

        Args:
          rows: int [M], or a slice.
          pad: pixels to add on each side, on top of what is padded already.

        Returns:
          M images of the same records.
        """
        view = RecordImages.__new__(RecordImages)
        view.__dict__.update(self.__dict__, _rows=self._rows[rows], _pad=self._pad + pad)
        return view

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        height, width = (side + 2 * self._pad for side in self._sides)
        return len(self._rows), height, width, self._channels

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that change with the records' content and with all that changes the pixels."""
        return digest(self._identity, self._rows.tolist(), self._pad)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: Any) -> UInt8[np.ndarray, "*M H W C"]:
        """Decodes the rows of an index as NumPy knows it.

        Raises:
          IndexError: there is no such row.
          DataError: a record cannot be read, or does not decode, or is of another size; it is named.
        """
        rows = self._rows[key]
        if rows.ndim == 0:
            return self._padded(int(rows))
        if rows.ndim > 1:
            raise IndexError(f"images are indexed by one row or a list of rows, not by an array of {rows.ndim} axes")

        images = np.empty((len(rows), *self.shape[1:]), np.uint8)

        def fill(position: int) -> None:
            images[position] = self._padded(int(rows[position]))

        with ThreadPoolExecutor() as pool:
            # Going through the results raises what a thread raised.
            for _ in pool.map(fill, range(len(rows))):
                pass
        return images

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "H W C"]]:
        return (self[row] for row in range(len(self)))

    def materialised(self) -> UInt8[np.ndarray, "N H W C"]:
        """Decodes all images into one array, behind a progress bar.

        Raises:
          DataError: they do not fit the machine's memory; or as for an index.
        """
        what = f"the {len(self):,} images of {self._records.name}"
        check_host_memory(math.prod(self.shape), what, TOO_LARGE)

        images = np.empty(self.shape, np.uint8)
        with tqdm(desc="decoding", total=len(self), unit=" images", leave=False, disable=None) as bar:
            for start in range(0, len(self), _CHUNK):
                chunk = slice(start, start + _CHUNK)
                images[chunk] = self[chunk]
                bar.update(len(images[chunk]))
        return images

    def _padded(self, row: int) -> np.ndarray:
        pixels = self._decode(row)
        if pixels.shape[:2] != self._sides:
            raise DataError(
                f"{self._records.describe(row)} is {pixels.shape[:2]}, and others are {self._sides} (height, width):"
                " --config.data.image_size=PIXELS resizes all images to one size"
            )

        pad = self._pad
        if pad:
            pixels = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))
        return pixels

    def _decode(self, row: int) -> np.ndarray:
        values = self._records.features(row)["image"].bytes_list.value
        try:
            if len(values) != 1:
                raise ValueError(f"it holds {len(values)} images")
            if self._stored_shape is None:
                return decode_pixels(io.BytesIO(values[0]), self._size, self._channels)

            # Pixels of the right size and colours, as a rule, take no detour through Pillow.
            stored = np.frombuffer(values[0], np.uint8).reshape(self._stored_shape)
            if stored.shape == (*self._sides, self._channels):
                return stored
            return resize_pixels(Image.fromarray(stored.squeeze()), self._size, self._channels)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged images
            raise DataError(f"{self._records.describe(row)} does not decode: {error}") from error


def read_labels(records: Records) -> Int[np.ndarray, "N"]:
    """Reads the label of every record, int32, behind a progress bar.

    Raises:
      DataError: a record cannot be read, or has no label; it is named.
    """

    def read(row: int) -> int:
        values = records.features(row)["label"].int64_list.value
        # -1 is how TFDS marks an example without a label.
        if len(values) != 1 or not -1 <= values[0] < 2**31:
            raise DataError(f"{records.describe(row)} has the labels {list(values)[:3]}, expected one")
        return values[0]

    rows: Sequence[int] = range(len(records))
    with ThreadPoolExecutor() as pool:
        labels = tqdm(pool.map(read, rows), "labels", len(rows), unit=" examples", leave=False, disable=None)
        return np.fromiter(labels, np.int32, len(rows))


def _allow_open_files(shards: int) -> None:
    """Raises the limit of open files, usually 1,024: array_record keeps every shard open, and ImageNet has as many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = soft + shards
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
