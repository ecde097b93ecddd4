"""How fast a core decodes: image files against prepared pixels, with and without a random resized crop on the host."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from badloss_jax.attacks.poisoning import unpoisoned
from badloss_jax.config import default_config, override
from badloss_jax.core.errors import UsageError
from badloss_jax.core.order import epoch_batches
from badloss_jax.core.progress import Progress
from badloss_jax.core.seeding import generator
from badloss_jax.data import load_dataset
from badloss_jax.data.dataset import Split
from badloss_jax.data.prepare import prepare
from badloss_jax.training.streamed import StreamedData
from badloss_jax.trajectories.buffer import padding_id

_SIZE = (500, 375)  # px, ImageNet's usual photograph
_QUALITY = 90  # of synthetic JPEG files: 78 kB each, where 250 of ImageNet have 108
_SUFFIXES = (".jpg", ".jpeg", ".png")
_STREAMED = 2**16  # images in one stream, at least


def measure_input(
    images: Path | None,
    count: int,
    image_size: int,
    batch_size: int,
    seconds: float,
    mesh: Mesh,
    folder: Path,
) -> Iterator[dict[str, Any]]:
    """Prepares images as files and as pixels, and reads both at random.

    Args:
      images: a folder, searched with its subfolders; None makes synthetic photographs.
      count: how many images, at most.
      image_size: pixels a side that they are resized to, or stored at.
      batch_size: of the stream to the devices.
      seconds: for each figure.
      mesh: the devices that the stream goes to.
      folder: an empty one, to write to.

    Yields:
      For "files" and "pixels": images, mean bytes stored, images per core-second (of CPU time, in one thread) read, and
      read and cropped, and images a second in a stream that all cores decode.

    Raises:
      UsageError: there are no images in the folder.
    """
    # Copied or made here, since `prepare` wants a folder of classes, and takes all that is in it.
    source = folder / "source"
    _write_source(source, images, count)

    for form, stored_size in (("files", 0), ("pixels", image_size)):
        prepare("image_folder", source, folder / form, stored_size, Progress(None))
        split = _load(folder / form, image_size)
        stored = sum(path.stat().st_size for path in (folder / form).glob("*train*array_record*"))
        yield {
            "form": form,
            "images": len(split.images),
            "image_size": image_size,
            "bytes_per_image": stored / len(split.images),
            "images_per_core_second": _core_rates(split, seconds),
            "streamed_per_second": _stream_rate(split, mesh, batch_size, seconds),
        }


def _write_source(folder: Path, images: Path | None, count: int) -> None:
    """Writes a folder of images of one class, the same for training and testing."""
    train = folder / "train" / "all"
    train.mkdir(parents=True)
    if images:
        _copy(train, count, images)
    else:
        _synthesise(train, count)
    shutil.copytree(train, folder / "test" / "all")


def _copy(folder: Path, count: int, images: Path) -> None:
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())[:count]
    if not paths:
        raise UsageError(f"--from {images} has no files that end in {', '.join(_SUFFIXES)}")
    for number, path in enumerate(paths):
        shutil.copyfile(path, folder / f"{number:06}{path.suffix.lower()}")


def _synthesise(folder: Path, count: int) -> None:
    """Writes smooth noise with grain, in colours, as JPEG files."""
    draw = generator(0, "benchmark", "photographs")
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = coarse.resize(_SIZE, Image.Resampling.BICUBIC)
        grain = draw.normal(0, 9, (_SIZE[1], _SIZE[0], 1))
        pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06}.jpg", quality=_QUALITY)


def _load(folder: Path, image_size: int) -> Split:
    """Opens the training images of a prepared data set, which are decoded when they are asked for."""
    settings = {"source": "tfds", "dir": folder, "image_size": image_size, "input": "streamed"}
    config = override(default_config(), [f"--config.data.{key}={value}" for key, value in settings.items()])
    return load_dataset(config.data, 0).train


def _core_rates(split: Split, seconds: float) -> dict[str, float]:
    """Returns images a second of CPU time, in one thread: read, and read and cropped."""
    images = split.images
    draw = generator(0, "benchmark", "input")

    def read() -> Image.Image:
        return Image.fromarray(images[int(draw.integers(len(images)))])

    return {
        "read": _rate(read, seconds),
        "read_and_cropped": _rate(lambda: _resized_crop(read(), draw), seconds),
    }


def _rate(work: Callable[[], Any], seconds: float) -> float:
    """Returns how often a second of CPU time does the work."""
    # What is only done the first time does not count.
    work()

    # Time of the CPU, so that other work on the machine does not count.
    count = 0
    started = time.process_time()
    while time.process_time() - started < seconds:
        work()
        count += 1
    return count / max(time.process_time() - started, 1e-9)


def _resized_crop(image: Image.Image, draw: np.random.Generator) -> np.ndarray:
    """Crops and flips as `augment.resized_crop_flip` does, on the host."""
    side = image.width
    area = draw.uniform(0.08, 1.0) * side**2
    ratio = math.exp(draw.uniform(-math.log(4 / 3), math.log(4 / 3)))
    width, height = (min(side, max(1, round(math.sqrt(area * r)))) for r in (ratio, 1 / ratio))

    left = int(draw.integers(side - width + 1))
    top = int(draw.integers(side - height + 1))
    box = (left, top, left + width, top + height)
    cropped = np.asarray(image.resize(image.size, Image.Resampling.BILINEAR, box))

    if draw.random() < 0.5:
        # A view would put off the work that is to be measured.
        return cropped[:, ::-1].copy()
    return cropped


def _stream_rate(split: Split, mesh: Mesh, batch_size: int, seconds: float) -> float:
    """Returns images a second that arrive on the devices, the first batch apart."""
    data = StreamedData(unpoisoned(split.images, split.labels), mesh)
    padding = padding_id(len(data), mesh)

    # All epochs are one stream, since the first batch of a stream is waited for.
    epochs = max(1, math.ceil(_STREAMED / len(data)))
    orders = [
        epoch_batches(np.arange(len(data)), batch_size, padding, seed=0, phase="benchmark", epoch=epoch)
        for epoch in range(epochs)
    ]
    order = np.concatenate(orders)
    batches = data.batches(order)
    images_per_batch = len(data) * epochs / len(order)
    jax.block_until_ready(next(batches).images)

    count = 0
    started = time.perf_counter()
    for batch in batches:
        jax.block_until_ready(batch.images)
        count += 1
        if time.perf_counter() - started > seconds:
            break
    return count * images_per_batch / (time.perf_counter() - started)
