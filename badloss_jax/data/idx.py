"""Gzipped IDX files, the format of MNIST and Fashion-MNIST (yann.lecun.com/exdb/mnist)."""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.data.dataset import Dataset, Split

_FILES = {"train": "train", "test": "t10k"}
_MAGIC = 0x0800  # of unsigned bytes; the number of dimensions is added


def load(settings: Mapping[str, Any]) -> Dataset:
    """Reads `{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz` from `data.dir`, as grey images [N, H, W, 1].

    Raises:
      UsageError: a file is missing.
      DataError: a file is cut short, is not IDX, or counts differ; it is named.
    """
    folder = Path(settings["dir"]).expanduser()
    splits = {}
    for name, prefix in _FILES.items():
        images = _read(folder / f"{prefix}-images-idx3-ubyte.gz", 3)
        labels = _read(folder / f"{prefix}-labels-idx1-ubyte.gz", 1)
        splits[name] = Split(images[..., None], labels.astype(np.int32))

    if not len(splits["train"].labels):
        raise DataError(f"{folder} has no training examples")
    num_classes = int(splits["train"].labels.max()) + 1
    class_names = tuple(str(label) for label in range(num_classes))
    return Dataset(splits["train"], splits["test"], class_names)


def _read(path: Path, dimensions: int) -> np.ndarray:
    """Returns the uint8 array that an IDX file holds."""
    if not path.is_file():
        raise UsageError(
            f"data.dir: {path} does not exist; --config.data.dir=DIR names the folder with the IDX files"
            " (Fashion-MNIST: Debian's package dataset-fashion-mnist puts them in /usr/share/datasets/fashion-mnist)"
        )

    try:
        with gzip.open(path) as file:
            header = file.read(4 + 4 * dimensions)
            magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
            if magic != _MAGIC + dimensions:
                raise DataError(f"{path} is not an IDX file of {dimensions} dimensions of bytes (magic {magic:#010x})")

            # One byte more than there should be shows a file that is too long, without unpacking all of it.
            size = math.prod(shape)
            values = file.read(size + 1)
    except (EOFError, OSError, zlib.error, struct.error, MemoryError, OverflowError) as error:
        raise DataError(f"{path} is damaged: {error or 'cut short'}") from error

    if len(values) != size:
        raise DataError(f"{path} holds {len(values)} values or more, its header says {size} ({shape})")
    return np.frombuffer(values, np.uint8).reshape(shape)
