"""Where images come from, and how they reach the devices.

A new source is one file with `load(settings) -> Dataset` and one line in `SOURCES`. An example's id is its row in the
data set that `load_dataset` returns; it is the thread through batches, buffers, scores and reports.

Imports `core` alone. Begin with `dataset`, which is what a source returns, then `digits`, the shortest source, and
`image_folder`, the usual one. `training_set` reads what a scan is given; `prepare` writes what `tfds` reads.
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

    Args:
      settings: `config.data`.
      seed: of the subsets that `train_examples` and `test_examples` ask for.

    Returns:
      The data set. The images of a split that is not streamed are in memory.

    Raises:
      UsageError: the folder is missing, or more examples are asked for than there are.
      DataError: a file is damaged or misplaced; it is named.
    """
    dataset = SOURCES[settings["source"]](settings)
    train = _chosen_examples("train", dataset.train, settings, seed)
    test = _chosen_examples("test", dataset.test, settings, seed)

    class_names = tuple(settings["class_names"]) or dataset.class_names
    if len(class_names) != dataset.num_classes:
        raise UsageError(
            f"data.class_names has {len(class_names)} names, and the source has {dataset.num_classes} classes"
        )
    return Dataset(train, test, class_names)


def _chosen_examples(name: str, split: Split, settings: Mapping[str, Any], seed: int) -> Split:
    """Returns the drawn subset of a split, padded, and read into memory unless it is streamed."""
    count = settings[f"{name}_examples"]
    available = len(split.labels)
    if count > available:
        raise UsageError(f"data.{name}_examples = {count}, and the source has {available}: 0 takes all")

    rows: np.ndarray | slice = slice(None)
    if count:
        # Sorted, so that the examples keep the source's order.
        rows = np.sort(generator(seed, "subset", name).choice(available, count, replace=False))

    split = split.view(rows, settings["pad"])
    if is_streamed(split, settings["input"]):
        return split
    return split.materialised()


def is_streamed(split: Split, choice: str) -> bool:
    """Tells whether a split's images travel to the devices batch by batch.

    Args:
      split: whose size decides for "auto": more than 2 GiB of pixels are streamed.
      choice: `data.input`, that is "resident", "streamed" or "auto".

    Returns:
      True if they do, False if they stay on the devices.
    """
    return is_streamed_size(math.prod(split.images.shape), choice)


def is_streamed_size(size: int, choice: str) -> bool:
    """Tells of so many bytes of images what `is_streamed` tells of a split."""
    if choice == "auto":
        return size > _RESIDENT
    return choice == "streamed"


__all__ = ["AUGMENTATIONS", "SOURCES", "Dataset", "Split", "is_streamed", "is_streamed_size", "load_dataset"]
