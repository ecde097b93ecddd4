"""A folder of images, `<split>/<class>/*`, in any format that Pillow reads."""

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from badloss_jax.data.dataset import Dataset, Split
from badloss_jax.errors import DataError, UsageError

_MAX_PIXELS = 2**26  # of one image: more is taken for a decompression bomb
_SPLITS = {"train": ("train",), "test": ("test", "val")}


def load(settings: Mapping[str, Any]) -> Dataset:
    """Reads `data.dir`/train/<class>/* and /test/<class>/* (or /val), classes and files in sorted order.

    `data.channels` converts to RGB or grey, `data.image_size` resizes (else all images must have one size). Decoded
    images are kept in `data.cache_dir`, keyed by the names and bytes of the files and by these settings.

    Raises:
      UsageError: a split's folder is missing.
      DataError: a class folder without images, a file that does not decode (named; `data.skip_corrupt` leaves such
        files out and counts them), images of different sizes (two are named).
    """
    root = Path(settings["dir"]).expanduser()
    if not settings["dir"] or not root.is_dir():
        raise UsageError(f"data.dir: {settings['dir']!r} is not a folder; --config.data.dir=DIR names the one with"
                         " train/<class>/* and test/<class>/*")  # fmt: skip
    folders = {split: _split_folder(root, names) for split, names in _SPLITS.items()}
    class_names = _class_names(folders["train"])
    unknown = sorted(set(_class_names(folders["test"])) - set(class_names))
    if unknown:
        raise DataError(f"{folders['test']} has the class folder {unknown[0]!r}, which {folders['train']} has not")
    splits = {split: _load_split(folder, class_names, settings) for split, folder in folders.items()}
    return Dataset(splits["train"], splits["test"], class_names)


def _split_folder(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UsageError(f"data.dir: {root} has no folder {' or '.join(names)}; expected <split>/<class>/<image>")


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders")
    return tuple(names)


def _load_split(folder: Path, class_names: tuple[str, ...], settings: Mapping[str, Any]) -> Split:
    files, labels = [], []
    for label, name in enumerate(class_names):
        if folder.name != "train" and not (folder / name).is_dir():
            continue  # a small test set may lack a class
        found = sorted(p for p in (folder / name).iterdir() if p.is_file() and not p.name.startswith("."))
        if not found:
            raise DataError(f"class folder {folder / name} has no images")
        files += found
        labels += [label] * len(found)
    if settings["cache_dir"]:
        entry = Path(settings["cache_dir"]).expanduser() / "images" / _content_key(folder, files, settings)
        images, kept = _read_cache(entry) or _write_cache(entry, *_decode(files, settings))
    else:
        images, kept = _decode(files, settings)
    if len(kept) < len(files):
        first = files[np.setdiff1d(np.arange(len(files)), kept)[0]]
        warnings.warn(f"left out {len(files) - len(kept)} of {len(files)} files that do not decode, first {first}",
                      stacklevel=2)  # fmt: skip
    return Split(images, np.array(labels, np.int32)[kept])


def _decode(files: list[Path], settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [N, H, W, C], and which of the files they are, int64 [N]."""
    size, mode = settings["image_size"], {1: "L", 3: "RGB"}[settings["channels"]]

    def decode(path: Path) -> np.ndarray | None:
        try:
            with Image.open(path) as image:
                pixels = _to_8_bit(image).convert(mode)
                if size:
                    pixels = pixels.resize((size, size), Image.Resampling.BILINEAR)
                return np.asarray(pixels)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            if settings["skip_corrupt"]:
                return None
            raise DataError(
                f"{path} does not decode: {error}; --config.data.skip_corrupt=True leaves such files out"
            ) from error

    with ThreadPoolExecutor() as pool:
        decoded = list(tqdm(pool.map(decode, files), "decoding", len(files), unit=" images", leave=False, disable=None))
    kept = [i for i, pixels in enumerate(decoded) if pixels is not None]
    if not kept:
        raise DataError(f"no file under {files[0].parent.parent} decodes")
    first = kept[0]
    for i in kept:
        if decoded[i].shape != decoded[first].shape:
            raise DataError(
                f"{files[first]} is {decoded[first].shape[:2]} and {files[i]} is {decoded[i].shape[:2]}"
                " (height, width): --config.data.image_size=PIXELS resizes all images to one size"
            )
    images = np.stack([decoded[i] for i in kept])
    return images.reshape(*images.shape[:3], -1), np.array(kept)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Refuses what is too large or has no known range, and scales 16 bits to 8, which Pillow would clip."""
    if image.format == "EPS":
        raise ValueError("EPS files are programs, and are not run")
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {_MAX_PIXELS}")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} (32 bits) have no known range")
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image).astype(np.float64) / 257).astype(np.uint8))
    return image


def _content_key(folder: Path, files: list[Path], settings: Mapping[str, Any]) -> str:
    """Hashes the names and the bytes of all files, and what else changes the decoded pixels."""
    content = hashlib.sha256(repr([settings[key] for key in ("image_size", "channels", "skip_corrupt")]).encode())
    for path in files:
        name, data = os.fsencode(path.relative_to(folder)), path.read_bytes()
        content.update(b"%d %d " % (len(name), len(data)) + name + data)
    return content.hexdigest()[:32]


def _read_cache(entry: Path) -> tuple[np.ndarray, np.ndarray] | None:
    if not entry.is_dir():
        return None
    try:
        images, kept = (
            np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("images", "kept")
        )
        if images.dtype != np.uint8 or images.ndim != 4 or kept.shape != images.shape[:1]:
            raise ValueError(f"images are {images.dtype} {images.shape}")
        return np.asarray(images), np.asarray(kept)
    except (OSError, ValueError) as error:
        warnings.warn(f"the cached images in {entry} are damaged ({error}): decoding again", stacklevel=2)
        return None


def _write_cache(entry: Path, images: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    aside = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=entry.name, dir=entry.parent))
        np.save(aside / "images.npy", images, allow_pickle=False)
        np.save(aside / "kept.npy", kept, allow_pickle=False)
        shutil.rmtree(entry, ignore_errors=True)
        aside.rename(entry)
    except OSError as error:
        warnings.warn(f"decoded images are not cached: {error}; --config.data.cache_dir names another folder",
                      stacklevel=2)  # fmt: skip
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return images, kept
