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
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from badloss_jax.core.errors import DataError
from badloss_jax.core.memory import check_host_memory
from badloss_jax.core.preemption import Preemption
from badloss_jax.data.dataset import Split
from badloss_jax.data.pixels import MAX_BYTES, decode_pixels
from badloss_jax.data.records import TOO_LARGE

_PART = 5_000  # files


class Decoded(NamedTuple):
    """Images, uint8 [M, H, W, C], and which of the files they are, int64 [M], ascending."""

    images: UInt8[np.ndarray, "M H W C"]
    kept: Int[np.ndarray, "M"]


def decode_split(folder: Path, files: list[Path], labels: Sequence[int], settings: Mapping[str, Any]) -> Split:
    """Decodes the files of a split, or takes them from the cache.

    Args:
      folder: that the files lie in.
      files: in the order of the examples.
      labels: of the files.
      settings: `config.data`, for cache_dir, image_size, channels, skip_corrupt.

    Returns:
      The images and labels of the files that decode.

    Raises:
      DataError: a file does not decode (with `skip_corrupt` it is left out, with a warning), two differ in size, or
        they do not fit the memory.
      PreemptedError: it was told to stop.
    """
    images, kept = decode_files(folder, files, settings)

    if len(kept) < len(files):
        first = files[np.setdiff1d(np.arange(len(files)), kept)[0]]
        warnings.warn(
            f"left out {len(files) - len(kept)} of {len(files)} files that do not decode, first {first}", stacklevel=2
        )
    return Split(images, np.array(labels, np.int32)[kept])


def decode_files(folder: Path, files: list[Path], settings: Mapping[str, Any]) -> Decoded:
    """Decodes files, or takes them from the cache; see `decode_split`.

    A KeyboardInterrupt would be lost where it comes while Python collects garbage, which is all the time here. So
    notices to stop are listened for, and heeded between parts; of several processes they reach the training instead.

    Args:
      folder: that the files lie in.
      files: to decode.
      settings: as of `decode_split`.

    Returns:
      The images, and which of the files they are: all, unless `skip_corrupt` leaves some out.

    Raises:
      DataError: as `decode_split`, but for files that `skip_corrupt` leaves out; or no file decodes.
      PreemptedError: it was told to stop.
    """
    assurance = ""
    if settings["cache_dir"]:
        assurance = "the images that were read are kept, and "

    with Preemption() as preemption:

        def stop() -> None:
            if jax.process_count() == 1:
                preemption.stop_if_reached(f"; {assurance}the same command goes on")

        decoded = _cached(folder, files, settings, stop)
        stop()
    return decoded


def _cached(folder: Path, files: list[Path], settings: Mapping[str, Any], stop: Callable[[], None]) -> Decoded:
    if not settings["cache_dir"]:
        return _decode(files, settings, stop)

    entry = Path(settings["cache_dir"]).expanduser() / "images" / _content_key(folder, files, settings, stop)
    parts = entry.with_name(f"{entry.name}-parts")

    decoded = _read_cache(entry)
    if decoded is None:
        decoded = _decode(files, settings, stop, parts if len(files) > _PART else None)
        # Then the parts stay, for the next reading.
        if not _write_cache(entry, decoded):
            return decoded

    shutil.rmtree(parts, ignore_errors=True)
    return decoded


# --- decoding


def _decode(
    files: list[Path],
    settings: Mapping[str, Any],
    stop: Callable[[], None],
    parts: Path | None = None,
) -> Decoded:
    """Decodes files part by part; those that the folder `parts` has are taken from there, the others kept there."""
    size = settings["image_size"]
    if size:
        # Twice, as what was decoded in parts is copied together in the end.
        needed = 2 * len(files) * size * size * settings["channels"]
        what = f"data.image_size = {size}: {len(files):,} images of {size} x {size} pixels"
        check_host_memory(needed, what, TOO_LARGE)

    images: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    with tqdm(total=len(files), desc="decoding", unit=" images", leave=False, disable=None) as bar:
        for start in range(0, len(files), _PART):
            part_files = files[start : start + _PART]
            end = start + len(part_files)

            part = None
            if parts is not None:
                part = _read_cache(parts / f"{start}-{end}")
            if part is None:
                part = _decode_part(part_files, settings, bar)
                # Where one cannot be kept, the next could not be, either: one warning is enough.
                if parts is not None and not _write_cache(parts / f"{start}-{end}", part):
                    parts = None

            if len(part.kept):
                # Copied, as it may be the map of a file that another process deletes.
                images.append(np.array(part.images))
                kept.append(start + part.kept)
                _check_size(files[kept[0][0]], images[0][0], files[kept[-1][0]], images[-1][0])

            bar.update(end - bar.n)
            # After the last part the whole is kept first.
            if end < len(files):
                stop()

    if not kept:
        raise DataError(f"no file under {files[0].parent.parent} decodes")
    # A small data set is one part, which needs no second copy.
    if len(kept) == 1:
        return Decoded(images[0], kept[0])
    return Decoded(np.concatenate(images), np.concatenate(kept))


def _decode_part(files: list[Path], settings: Mapping[str, Any], bar: tqdm) -> Decoded:
    def decode(path: Path) -> np.ndarray | None:
        try:
            return decode_pixels(path, settings["image_size"], settings["channels"])
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            if settings["skip_corrupt"]:
                return None
            raise DataError(
                f"{path} does not decode: {error}; --config.data.skip_corrupt=True leaves such files out"
            ) from error

    images: list[np.ndarray] = []
    kept: list[int] = []
    with ThreadPoolExecutor() as pool:
        for number, pixels in enumerate(pool.map(decode, files)):
            bar.update()
            if pixels is not None:
                images.append(pixels)
                kept.append(number)
                _check_size(files[kept[0]], images[0], files[number], pixels)

    if not kept:
        return Decoded(np.empty((0, 1, 1, 1), np.uint8), np.empty(0, np.int64))
    return Decoded(np.stack(images), np.array(kept, np.int64))


def _check_size(first: Path, pixels: np.ndarray, other: Path, other_pixels: np.ndarray) -> None:
    if pixels.shape != other_pixels.shape:
        raise DataError(
            f"{first} is {pixels.shape[:2]} and {other} is {other_pixels.shape[:2]} (height, width):"
            " --config.data.image_size=PIXELS resizes all images to one size"
        )


# --- the cache


def _content_key(folder: Path, files: list[Path], settings: Mapping[str, Any], stop: Callable[[], None]) -> str:
    """Hashes the names and the bytes of all files, and what else changes the decoded pixels."""
    options = [settings[key] for key in ("image_size", "channels", "skip_corrupt")]
    content = hashlib.sha256(repr(options).encode())
    for path in files:
        stop()
        name = os.fsencode(path.relative_to(folder))
        data = _read_bytes(path)
        # With the lengths before them, no two lists of files run together to the same bytes.
        content.update(b"%d %d " % (len(name), len(data)) + name + data)
    return content.hexdigest()[:32]


def _read_bytes(path: Path) -> bytes:
    """Returns a file's bytes; of one that cannot be read, or is too large, what tells it from others."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            return f"{size} bytes".encode()
        return path.read_bytes()
    except OSError as error:
        return f"errno {error.errno}".encode()


def _read_cache(entry: Path) -> Decoded | None:
    if not entry.is_dir():
        return None
    try:
        images = np.load(entry / "images.npy", mmap_mode="r", allow_pickle=False)
        kept = np.load(entry / "kept.npy", mmap_mode="r", allow_pickle=False)
        if images.dtype != np.uint8 or images.ndim != 4 or kept.shape != images.shape[:1]:
            raise ValueError(f"images are {images.dtype} {images.shape}")
        return Decoded(np.asarray(images), np.asarray(kept))
    except (OSError, ValueError) as error:
        warnings.warn(f"the cached images in {entry} are damaged ({error}): decoding again", stacklevel=2)
        return None


def _write_cache(entry: Path, decoded: Decoded) -> bool:
    """Keeps decoded images; returns whether that could be done."""
    aside = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=entry.name, dir=entry.parent))
        np.save(aside / "images.npy", decoded.images, allow_pickle=False)
        np.save(aside / "kept.npy", decoded.kept, allow_pickle=False)

        # A folder is renamed whole, but only to where none is.
        shutil.rmtree(entry, ignore_errors=True)
        aside.rename(entry)
    except OSError as error:
        warnings.warn(
            f"decoded images are not cached: {error}; --config.data.cache_dir names another folder", stacklevel=2
        )
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        return False
    return True
