"""One image file decoded to pixels: the same code, and so the same pixels, wherever the file comes from."""

from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import UInt8
from PIL import Image

# What image files may be; Pillow would also read formats of which it runs programs (EPS) or hardly tested decoders.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_BYTES = 2**28  # of one file
_MAX_PIXELS = 2**26  # of one image: more is taken for a decompression bomb
_ROWS = 64
_MODES = {1: "L", 3: "RGB"}


def decode_pixels(file: Path | IO[bytes], size: int, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Decodes an image file of one of the `FORMATS`, its first frame, and resizes it (bilinear) to a square.

    Args:
      file: a path, or an open file.
      size: pixels a side, or 0 for the image's own height and width.
      channels: 3 (RGB) or 1 (grey).

    Raises:
      Exception: nearly anything, as Pillow's decoders do on damaged files; ValueError if the image is too large.
    """
    if isinstance(file, Path) and (size_of_file := file.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{size_of_file:,} bytes are more than {MAX_BYTES:,}")
    with Image.open(file, formats=FORMATS) as image:
        return resize_pixels(_to_8_bit(image), size, channels)


def resize_pixels(image: Image.Image, size: int, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Converts an 8-bit image to grey or RGB and resizes it (bilinear) to a square; size 0 leaves it as it is."""
    pixels = image.convert(_MODES[channels])
    if size:
        pixels = pixels.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(pixels).reshape(pixels.height, pixels.width, channels)


def check_header(file: Path | IO[bytes]) -> None:
    """Reads an image's header, without its pixels, and refuses what `decode_pixels` would refuse for its header.

    Raises:
      Exception: as `decode_pixels`.
    """
    with Image.open(file, formats=FORMATS) as image:
        _check_range(image)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Refuses what is too large or has no known range, and scales 16 bits to 8, which Pillow would clip."""
    _check_range(image)
    if image.mode.startswith("I;16"):
        wide = np.asarray(image)
        narrow = np.empty(wide.shape, np.uint8)
        for start in range(0, len(wide), _ROWS):  # rounded division by 257, a few rows at a time
            narrow[start : start + _ROWS] = (wide[start : start + _ROWS].astype(np.uint32) + 128) // 257
        return Image.fromarray(narrow)
    return image


def _check_range(image: Image.Image) -> None:
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {_MAX_PIXELS}")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} (32 bits) have no known range")
