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
        for array in arrays:
            content.update(repr((array.shape, array.dtype.str)).encode())
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()[:16]

    def view(self, rows: Int[np.ndarray, "M"] | slice, pad: int) -> "Split":
        """Returns these rows alone, their images with `pad` zero pixels on each side."""
        if isinstance(self.images, RecordImages):
            return Split(self.images.view(rows, pad), self.labels[rows])
        images = np.pad(self.images[rows], ((0, 0), (pad, pad), (pad, pad), (0, 0))) if pad else self.images[rows]
        return Split(images, self.labels[rows])

    def materialised(self) -> "Split":
        """Returns the same with its images in an array, and with the same fingerprint.

        Raises:
          DataError: an image does not decode, or they do not fit the memory.
        """
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
        for name, split in (("train", self.train), ("test", self.test)):
            if split.images.ndim != 4 or split.images.dtype != np.uint8:
                raise DataError(
                    f"{name} images are {split.images.dtype} {split.images.shape}, expected uint8 [N, H, W, C]"
                )
            if split.labels.shape != split.images.shape[:1] or not len(split.labels):
                raise DataError(f"{name} set has {len(split.images)} images and {len(split.labels)} labels")
            if split.labels.min() < 0 or split.labels.max() >= self.num_classes:
                raise DataError(f"{name} labels go from {split.labels.min()} to {split.labels.max()},"
                                f" expected 0 to {self.num_classes - 1}")  # fmt: skip
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise DataError(f"training images are {self.train.images.shape[1:]}, test images"
                            f" {self.test.images.shape[1:]} (height, width, channels): they must agree")  # fmt: skip

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels
