"""gallery.npz: the images that a report shows, so that it can be rendered without the data set.

ids          int64 [G], the highest-ranked examples of each kind of trajectory
true_labels  int32 [G], before poisoning
originals    uint8 [G, h, w, C], before poisoning, at most 64 px a side
shown        uint8 [G, h, w, C], as the network saw them
attacks      str [A]
before       uint8 [A, H, W, C], one poisoned example of each attack, before poisoning
after        uint8 [A, H, W, C], and after
"""

import base64
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from badloss_jax.attacks.manifest import Manifest
from badloss_jax.attacks.poisoning import Poisoning
from badloss_jax.core.errors import DataError
from badloss_jax.core.files import NPZ_ERRORS, write_atomically
from badloss_jax.data import Split

_THUMBNAIL = 64  # px
_DIFFERENCE = 10  # times as strong as it is


@dataclass(frozen=True)
class Gallery:
    """See the module."""

    ids: Int[np.ndarray, "G"]
    true_labels: Int[np.ndarray, "G"]
    originals: UInt8[np.ndarray, "G h w C"]
    shown: UInt8[np.ndarray, "G h w C"]
    attacks: np.ndarray
    before: UInt8[np.ndarray, "A H W C"]
    after: UInt8[np.ndarray, "A H W C"]


def highest_ranked(
    distances: Float[np.ndarray, "N"], is_probe: Bool[np.ndarray, "N"], count: int
) -> Int[np.ndarray, "G"]:
    """Returns the ids of the largest distances, in that order, probes left out.

    Args:
      distances: [N], higher is more suspicious.
      is_probe: [N].
      count: how many, at most.

    Returns:
      int64 [G], G at most `count`; of equal distances the lower id first.
    """
    # Stable, so that of equal distances the lower id comes first on every machine.
    order = np.argsort(-distances, kind="stable")
    return order[~is_probe[order]][:count]


def choose_gallery(
    train: Split,
    manifest: Manifest,
    poisoning: Poisoning,
    distances: Mapping[str, np.ndarray],
    is_probe: Bool[np.ndarray, "N"],
    count: int,
) -> Gallery:
    """Takes the `count` highest-ranked examples of each kind, and one example of each attack's trigger.

    Args:
      train: the training set before poisoning.
      manifest: the poison plan.
      poisoning: the plan's triggers, ready to be applied to `train`.
      distances: kind -> [N], higher is more suspicious.
      is_probe: [N].
      count: examples of each kind, at most.

    Returns:
      The gallery; ids ascend.
    """
    # What several kinds rank highly is kept once. The empty array stands for no kind at all.
    ranked = [highest_ranked(values, is_probe, count) for values in distances.values()]
    ids = np.unique(np.concatenate([np.zeros(0, np.int64), *ranked]))

    originals = train.images[ids]
    poisoned = np.flatnonzero(poisoning.attack_of[ids] >= 0)
    shown = originals.copy()
    shown[poisoned] = _to_8_bit(poisoning.triggered(ids[poisoned]))

    # The example in the middle of each plan stands for its attack.
    middle = [plan.example_ids[len(plan.example_ids) // 2] for plan in manifest.attacks.values()]
    chosen = np.array(middle, np.int64)
    after = _to_8_bit(poisoning.triggered(chosen))

    return Gallery(
        ids=ids,
        true_labels=train.labels[ids],
        originals=thumbnails(originals),
        shown=thumbnails(shown),
        attacks=np.array(list(manifest.attacks), dtype="U"),
        before=train.images[chosen],
        after=after.reshape(-1, *train.images.shape[1:]),
    )


def write_gallery(path: Path, gallery: Gallery) -> None:
    """Writes gallery.npz.

    Args:
      path: of the file.
      gallery: what it will hold.

    Raises:
      DataError: the file cannot be written.
    """
    write_atomically(path, lambda aside: np.savez_compressed(aside, **asdict(gallery)))


def read_gallery(path: Path) -> Gallery:
    """Reads gallery.npz.

    Raises:
      FileNotFoundError: there is none.
      DataError: it is damaged, or its arrays do not fit together.
    """
    try:
        # The run may be somebody else's: nothing in it is unpickled.
        with np.load(path, allow_pickle=False) as arrays:
            gallery = Gallery(**{field.name: arrays[field.name] for field in fields(Gallery)})
    except FileNotFoundError:
        raise
    except NPZ_ERRORS as error:
        raise DataError(f"{path} is damaged: {error}") from error

    if not _fits_together(gallery):
        kinds = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in vars(gallery).items())
        raise DataError(f"{path} is damaged: its arrays do not fit together ({kinds})")
    return gallery


def _fits_together(gallery: Gallery) -> bool:
    """Whether the arrays have the dtypes and shapes that the module promises."""
    for numbers in (gallery.ids, gallery.true_labels):
        if numbers.dtype.kind not in "iu":
            return False
    if gallery.attacks.dtype.kind != "U" or gallery.true_labels.shape != gallery.ids.shape:
        return False

    examples_match = _are_pairs(gallery.originals, gallery.shown, gallery.ids)
    return examples_match and _are_pairs(gallery.before, gallery.after, gallery.attacks)


def _are_pairs(images: np.ndarray, others: np.ndarray, rows: np.ndarray) -> bool:
    """Whether both hold one image of the same size a row."""
    if images.dtype != np.uint8 or others.dtype != np.uint8:
        return False
    if images.ndim != 4 or images.shape != others.shape:
        return False
    return rows.shape == images.shape[:1] and 0 not in images.shape[1:]


def difference(before: UInt8[np.ndarray, "..."], after: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Returns what a trigger changed, times ten, clipped.

    Args:
      before: images, before poisoning.
      after: the same images, after it.

    Returns:
      The absolute difference, in the shape of both.
    """
    # Bytes would wrap around.
    return np.clip(np.abs(after.astype(int) - before) * _DIFFERENCE, 0, 255).astype(np.uint8)


def sheet(images: UInt8[np.ndarray, "G h w C"], columns: int) -> UInt8[np.ndarray, "R S C"]:
    """Lays images out on one, row by row.

    Args:
      images: [G, h, w, C].
      columns: images in a row.

    Returns:
      One image of columns * w pixels' width, of one row at least; what is left of the last row is black.
    """
    count, height, width, channels = images.shape
    rows = max(1, -(-count // columns))

    tiles = np.zeros((rows * columns, height, width, channels), np.uint8)
    tiles[:count] = images

    # [R, columns, h, w, C] becomes [R, h, columns, w, C]: lines of pixels across a whole row.
    tiles = tiles.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(rows * height, columns * width, channels)


def data_uri(image: UInt8[np.ndarray, "H W C"]) -> str:
    """Returns an image as a PNG in a data: address."""
    file = io.BytesIO()
    _picture(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _picture(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """Returns an image as Pillow has it; where C is neither 3 nor 4, the first channel in grey."""
    if image.shape[-1] in (3, 4):
        return Image.fromarray(image)
    return Image.fromarray(image[..., 0])


def _to_8_bit(images: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Turns values in [0, 1] into bytes."""
    return np.round(images * 255).astype(np.uint8)


def thumbnails(images: UInt8[np.ndarray, "G H W C"]) -> UInt8[np.ndarray, "G h w C"]:
    """Returns the images, or smaller ones of at most 64 px a side."""
    height, width = images.shape[1:3]
    if max(height, width) <= _THUMBNAIL:
        return images

    scale = _THUMBNAIL / max(height, width)
    small_width = max(1, round(width * scale))
    small_height = max(1, round(height * scale))
    size = (small_width, small_height)
    small = [np.asarray(_picture(image).resize(size, Image.Resampling.BOX)) for image in images]

    # Grey images lost their last axis, and `small` may be empty: the shape is said in full.
    channels = 1
    if images.shape[-1] in (3, 4):
        channels = images.shape[-1]
    return np.array(small, np.uint8).reshape(len(images), small_height, small_width, channels)
