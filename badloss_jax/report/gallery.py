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
_DIFFERENCE = 10


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
    """Returns the ids of the largest distances, in that order, probes left out."""
    order = np.argsort(-distances, kind="stable")
    return order[~is_probe[order]][:count]


def choose_gallery(
    train: Split, manifest: Manifest, poisoning: Poisoning, distances: Mapping[str, np.ndarray],
    is_probe: Bool[np.ndarray, "N"], count: int,
) -> Gallery:  # fmt: skip
    """Takes the `count` highest-ranked examples of each kind, and one example of each attack's trigger."""
    ranked = [highest_ranked(values, is_probe, count) for values in distances.values()]
    ids = np.unique(np.concatenate([np.zeros(0, np.int64), *ranked]))
    originals = train.images[ids]
    poisoned = np.flatnonzero(poisoning.attack_of[ids] >= 0)
    shown = originals.copy()
    shown[poisoned] = _to_8_bit(poisoning.triggered(ids[poisoned]))
    chosen = np.array([plan.example_ids[len(plan.example_ids) // 2] for plan in manifest.attacks.values()], np.int64)
    after = _to_8_bit(poisoning.triggered(chosen))
    shape = train.images.shape[1:]
    return Gallery(
        ids, train.labels[ids], thumbnails(originals), thumbnails(shown),
        np.array(list(manifest.attacks), dtype="U"), train.images[chosen], after.reshape(-1, *shape),
    )  # fmt: skip


def write_gallery(path: Path, gallery: Gallery) -> None:
    """Writes gallery.npz."""
    write_atomically(path, lambda aside: np.savez_compressed(aside, **asdict(gallery)))


def read_gallery(path: Path) -> Gallery:
    """Reads gallery.npz.

    Raises:
      FileNotFoundError: there is none.
      DataError: it is damaged, or its arrays do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            gallery = Gallery(**{field.name: arrays[field.name] for field in fields(Gallery)})
    except FileNotFoundError:
        raise
    except NPZ_ERRORS as error:
        raise DataError(f"{path} is damaged: {error}") from error
    numbers = (gallery.ids, gallery.true_labels)
    whole = all(array.dtype.kind in "iu" for array in numbers) and gallery.attacks.dtype.kind == "U"
    for images, others, rows in ((gallery.originals, gallery.shown, gallery.ids),
                                 (gallery.before, gallery.after, gallery.attacks)):  # fmt: skip
        whole &= images.dtype == others.dtype == np.uint8 and images.ndim == 4 and images.shape == others.shape
        whole &= rows.shape == images.shape[:1] and 0 not in images.shape[1:]
    if not whole or gallery.true_labels.shape != gallery.ids.shape:
        kinds = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in vars(gallery).items())
        raise DataError(f"{path} is damaged: its arrays do not fit together ({kinds})")
    return gallery


def difference(before: UInt8[np.ndarray, "..."], after: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Returns what a trigger changed, times ten, clipped."""
    return np.clip(np.abs(after.astype(int) - before) * _DIFFERENCE, 0, 255).astype(np.uint8)


def sheet(images: UInt8[np.ndarray, "G h w C"], columns: int) -> UInt8[np.ndarray, "R S C"]:
    """Lays images out on one, row by row."""
    count, height, width, channels = images.shape
    rows = max(1, -(-count // columns))
    tiles = np.zeros((rows * columns, height, width, channels), np.uint8)
    tiles[:count] = images
    tiles = tiles.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(rows * height, columns * width, channels)


def data_uri(image: UInt8[np.ndarray, "H W C"]) -> str:
    """Returns an image as a PNG in a data: address."""
    file = io.BytesIO()
    _picture(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _picture(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    grey = image.shape[-1] not in (3, 4)
    return Image.fromarray(image[..., 0] if grey else image)


def _to_8_bit(images: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    return np.round(images * 255).astype(np.uint8)


def thumbnails(images: UInt8[np.ndarray, "G H W C"]) -> UInt8[np.ndarray, "G h w C"]:
    """Returns the images, or smaller ones of at most 64 px a side."""
    height, width = images.shape[1:3]
    if max(height, width) <= _THUMBNAIL:
        return images
    scale = _THUMBNAIL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = [np.asarray(_picture(image).resize(size, Image.Resampling.BOX)) for image in images]
    channels = images.shape[-1] if images.shape[-1] in (3, 4) else 1
    return np.array(small, np.uint8).reshape(len(images), size[1], size[0], channels)
