"""A data set: images of one size as uint8, in memory or read when asked for; integer labels; class names."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int, UInt8

from badloss_jax.core.errors import DataError
from badloss_jax.data.records import RecordImages


@dataclass(frozen=True)
class Split:
    """Images and their classes; an example's id is its row.

    Attributes:
      images: uint8 [N, H, W, C] in 0..255; an array, or `RecordImages`, which answer to the same.
      labels: int32 [N].
      identity: the fingerprint, if it is known better than from the pixels.
    """

    images: UInt8[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, "N"]
    identity: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits: the hash of every pixel and label, or of what they are decoded from."""
        if self.identity:
            return self.identity

        content = hashlib.sha256()
        arrays = [self.labels]
        if isinstance(self.images, RecordImages):
            content.update(self.images.identity.encode())
        else:
            arrays.insert(0, self.images)

        # The shape and type, too: the same bytes may be other images.
        for array in arrays:
            content.update(repr((array.shape, array.dtype.str)).encode())
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()[:16]

    def view(self, rows: Int[np.ndarray, "M"] | slice, pad: int) -> "Split":
        """Returns some rows alone, their images padded with zeros.

        Args:
          rows: ids, int [M], or a slice of them.
          pad: pixels to add on each side, 0 or more.

        Returns:
          M examples. Of `RecordImages` nothing is decoded.
        """
        if isinstance(self.images, RecordImages):
            return Split(self.images.view(rows, pad), self.labels[rows])

        images = self.images[rows]
        if pad:
            images = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        return Split(images, self.labels[rows])

    def materialised(self) -> "Split":
        """Returns the same with its images in an array, and with the same fingerprint.

        Raises:
          DataError: an image does not decode, or they do not fit the memory.
        """
        # The fingerprint stays, so that a run is the same run whether its images are streamed or not.
        if isinstance(self.images, RecordImages):
            return Split(self.images.materialised(), self.labels, self.fingerprint)
        return self


@dataclass(frozen=True)
class Dataset:
    """A training set and a test set over the same K classes."""

    train: Split
    test: Split
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.class_names)) != len(self.class_names):
            raise DataError(f"two classes have the same name: {', '.join(self.class_names)}")

        _check_split("train", self.train, self.num_classes)
        _check_split("test", self.test, self.num_classes)

        train_shape = self.train.images.shape[1:]
        test_shape = self.test.images.shape[1:]
        if train_shape != test_shape:
            raise DataError(
                f"training images are {train_shape}, test images {test_shape} (height, width, channels): they must"
                " agree"
            )

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels


def _check_split(name: str, split: Split, num_classes: int) -> None:
    images = split.images
    labels = split.labels
    if images.ndim != 4 or images.dtype != np.uint8:
        raise DataError(f"{name} images are {images.dtype} {images.shape}, expected uint8 [N, H, W, C]")
    if labels.shape != images.shape[:1] or not len(labels):
        raise DataError(f"{name} set has {len(images)} images and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"{name} labels go from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}")
