"""Where images come from, and how they reach the devices.

A new source is one file with `load(settings) -> Dataset` and one line in `SOURCES`. An example's id is its row in the
data set that `load_dataset` returns; it is the thread through batches, buffers, scores and reports.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from badloss_jax.core.errors import UsageError
from badloss_jax.core.seeding import generator
from badloss_jax.data import arrays, digits, gtsrb, idx, image_folder, tfds
from badloss_jax.data.augment import AUGMENTATIONS
from badloss_jax.data.dataset import Dataset, Split

_RESIDENT = 2**31  # bytes of images that "auto" puts on every device

SOURCES: dict[str, Callable[[Mapping[str, Any]], Dataset]] = {
    "digits": digits.load,
    "idx": idx.load,
    "image_folder": image_folder.load,
    "gtsrb": gtsrb.load,
    "arrays": arrays.load,
    "tfds": tfds.load,
}


def load_dataset(settings: Mapping[str, Any], seed: int) -> Dataset:
    """Loads `config.data`: the source, the subset drawn by `seed`, the padding, the names of the classes.

    Raises:
      UsageError: the folder is missing, or more examples are asked for than there are.
      DataError: a file is damaged or misplaced; it is named.
    """
    dataset = SOURCES[settings["source"]](settings)
    splits = []
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        count, have = settings[f"{name}_examples"], len(split.labels)
        if count > have:
            raise UsageError(f"data.{name}_examples = {count}, and the source has {have}: 0 takes all")
        rows: np.ndarray | slice = slice(None)
        if count:
            rows = np.sort(generator(seed, "subset", name).choice(have, count, replace=False))
        split = split.view(rows, settings["pad"])
        splits.append(split if is_streamed(split, settings["input"]) else split.materialised())
    train, test = splits
    names = tuple(settings["class_names"]) or dataset.class_names
    if len(names) != dataset.num_classes:
        raise UsageError(f"data.class_names has {len(names)} names, and the source has {dataset.num_classes} classes")
    return Dataset(train, test, names)


def is_streamed(split: Split, choice: str) -> bool:
    """Whether a split's images travel to the devices batch by batch, by `data.input` and their size."""
    return choice == "streamed" or (choice == "auto" and math.prod(split.images.shape) > _RESIDENT)


__all__ = ["AUGMENTATIONS", "SOURCES", "Dataset", "Split", "is_streamed", "load_dataset"]
