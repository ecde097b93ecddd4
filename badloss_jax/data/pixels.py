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

    Returns:
      uint8 [H, W, C] in 0..255.

    Raises:
      Exception: nearly anything, as Pillow's decoders do on damaged files; ValueError if the image is too large.
    """
    if isinstance(file, Path):
        num_bytes = file.stat().st_size
        if num_bytes > MAX_BYTES:
            raise ValueError(f"{num_bytes:,} bytes are more than {MAX_BYTES:,}")

    with Image.open(file, formats=FORMATS) as image:
        return resize_pixels(_to_8_bit(image), size, channels)


def resize_pixels(image: Image.Image, size: int, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Converts an 8-bit image to grey or RGB and resizes it (bilinear) to a square.

    Args:
      image: of Pillow, with 8 bits a channel.
      size: pixels a side, or 0 to leave the height and width as they are.
      channels: 3 (RGB) or 1 (grey).

    Returns:
      uint8 [H, W, C] in 0..255.
    """
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
    if not image.mode.startswith("I;16"):
        return image

    wide = np.asarray(image)
    narrow = np.empty(wide.shape, np.uint8)
    # Rounded division by 257, which maps 65,535 to 255; a few rows at a time, for the wider numbers in between.
    for start in range(0, len(wide), _ROWS):
        rows = slice(start, start + _ROWS)
        narrow[rows] = (wide[rows].astype(np.uint32) + 128) // 257
    return Image.fromarray(narrow)


def _check_range(image: Image.Image) -> None:
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {_MAX_PIXELS}")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} (32 bits) have no known range")
