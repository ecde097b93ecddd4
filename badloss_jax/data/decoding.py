"""Image files decoded to arrays of one size, kept in a cache that is keyed by their content.

Many files are decoded and kept in parts, so that a reading that was interrupted goes on after the last of them.
"""

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from badloss_jax.core.errors import DataError
from badloss_jax.core.preemption import Preemption
from badloss_jax.data.dataset import Split
from badloss_jax.data.pixels import MAX_BYTES, decode_pixels

_PART = 5_000  # files


def decode_split(folder: Path, files: list[Path], labels: Sequence[int], settings: Mapping[str, Any]) -> Split:
    """Decodes the files of a split, or takes them from the cache.

    Args:
      folder: that the files lie in.
      files: in the order of the examples.
      labels: of the files.
      settings: `config.data`, for cache_dir, image_size, channels, skip_corrupt.

    Raises:
      DataError: a file does not decode (with `skip_corrupt` it is left out, with a warning), or two differ in size.
      PreemptedError: it was told to stop.
    """
    images, kept = decode_files(folder, files, settings)
    if len(kept) < len(files):
        first = files[np.setdiff1d(np.arange(len(files)), kept)[0]]
        warnings.warn(f"left out {len(files) - len(kept)} of {len(files)} files that do not decode, first {first}",
                      stacklevel=2)  # fmt: skip
    return Split(images, np.array(labels, np.int32)[kept])


def decode_files(
    folder: Path, files: list[Path], settings: Mapping[str, Any]
) -> tuple[UInt8[np.ndarray, "M H W C"], Int[np.ndarray, "M"]]:
    """Decodes files, or takes them from the cache; see `decode_split`.

    A KeyboardInterrupt would be lost where it comes while Python collects garbage, which is all the time here. So
    notices to stop are listened for, and heeded between parts; of several processes they reach the training instead.

    Returns:
      The images, and which of the files they are: all, unless `skip_corrupt` leaves some out.
    """
    kept = "the images that were read are kept, and " if settings["cache_dir"] else ""
    with Preemption() as preemption:

        def stop() -> None:
            if jax.process_count() == 1:
                preemption.stop_if_reached(f"; {kept}the same command goes on")

        decoded = _cached(folder, files, settings, stop) if settings["cache_dir"] else _decode(files, settings, stop)
        stop()
    return decoded


def _cached(
    folder: Path, files: list[Path], settings: Mapping[str, Any], stop: Callable[[], None]
) -> tuple[np.ndarray, np.ndarray]:
    entry = Path(settings["cache_dir"]).expanduser() / "images" / _content_key(folder, files, settings, stop)
    parts, decoded = entry.with_name(f"{entry.name}-parts"), _read_cache(entry)
    if decoded is None:
        decoded = _decode(files, settings, stop, parts if len(files) > _PART else None)
        if not _write_cache(entry, *decoded):
            return decoded
    shutil.rmtree(parts, ignore_errors=True)
    return decoded


def _decode(
    files: list[Path], settings: Mapping[str, Any], stop: Callable[[], None], parts: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [N, H, W, C], and which of the files they are, int64 [N]; keeps and takes parts."""
    images, kept = [], []
    with tqdm(total=len(files), desc="decoding", unit=" images", leave=False, disable=None) as bar:
        for start in range(0, len(files), _PART):
            some = files[start : start + _PART]
            place = parts and parts / f"{start}-{start + len(some)}"
            part = _read_cache(place) if place else None
            if part is None:
                part = _decode_part(some, settings, bar)
                if place and not _write_cache(place, *part):
                    parts = None
            if len(part[1]):
                images.append(np.array(part[0]))  # not a map of a file that another process may delete
                kept.append(start + part[1])
                _check_size(files[kept[0][0]], images[0][0], files[kept[-1][0]], images[-1][0])
            bar.update(start + len(some) - bar.n)
            if start + len(some) < len(files):  # else the whole is kept first
                stop()
    if not kept:
        raise DataError(f"no file under {files[0].parent.parent} decodes")
    return (np.concatenate(images), np.concatenate(kept)) if len(kept) > 1 else (images[0], kept[0])


def _decode_part(files: list[Path], settings: Mapping[str, Any], bar: tqdm) -> tuple[np.ndarray, np.ndarray]:
    def decode(path: Path) -> np.ndarray | None:
        try:
            return decode_pixels(path, settings["image_size"], settings["channels"])
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            if settings["skip_corrupt"]:
                return None
            raise DataError(
                f"{path} does not decode: {error}; --config.data.skip_corrupt=True leaves such files out"
            ) from error

    images, kept = [], []
    with ThreadPoolExecutor() as pool:
        for number, pixels in enumerate(pool.map(decode, files)):
            bar.update()
            if pixels is not None:
                images.append(pixels)
                kept.append(number)
                _check_size(files[kept[0]], images[0], files[number], pixels)
    return np.stack(images) if kept else np.empty((0, 1, 1, 1), np.uint8), np.array(kept, np.int64)


def _check_size(first: Path, pixels: np.ndarray, other: Path, others: np.ndarray) -> None:
    if pixels.shape != others.shape:
        raise DataError(f"{first} is {pixels.shape[:2]} and {other} is {others.shape[:2]} (height, width):"
                        " --config.data.image_size=PIXELS resizes all images to one size")  # fmt: skip


def _content_key(folder: Path, files: list[Path], settings: Mapping[str, Any], stop: Callable[[], None]) -> str:
    """Hashes the names and the bytes of all files, and what else changes the decoded pixels."""
    content = hashlib.sha256(repr([settings[key] for key in ("image_size", "channels", "skip_corrupt")]).encode())
    for path in files:
        stop()
        name, data = os.fsencode(path.relative_to(folder)), _read_bytes(path)
        content.update(b"%d %d " % (len(name), len(data)) + name + data)
    return content.hexdigest()[:32]


def _read_bytes(path: Path) -> bytes:
    """Returns a file's bytes; of one that cannot be read, or is too large, what tells it from others."""
    try:
        size = path.stat().st_size
        return path.read_bytes() if size <= MAX_BYTES else f"{size} bytes".encode()
    except OSError as error:
        return f"errno {error.errno}".encode()


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


def _write_cache(entry: Path, images: np.ndarray, kept: np.ndarray) -> bool:
    """Keeps decoded images; returns whether that could be done."""
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
        return False
    return True
