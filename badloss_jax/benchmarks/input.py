"""`badloss bench input`: decoding images on the host."""

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from badloss_jax.benchmarks.options import add_integer

ABOUT = """\
Prepare images as `badloss prepare` does, as files and as pixels, and read both at random: images per second of one
CPU core, the same with a random resized crop by Pillow, and in a stream to the devices from all cores.
"""

EXAMPLES = """\
examples:
  badloss bench input --out OUT.json
  badloss bench input --from IMAGENET/train --examples 1000
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the benchmark's own options."""
    parser.add_argument(
        "--from",
        dest="images",
        type=Path,
        metavar="DIR",
        help="a folder of images, searched with its subfolders; without, synthetic photographs of 500 x 375 px",
    )
    add_integer(parser, "examples", 250, "images, at most")
    add_integer(parser, "image_size", 224, "pixels a side to resize to")
    add_integer(parser, "batch_size", 64, "of the stream")
    parser.add_argument("--seconds", type=float, default=10, metavar="S", help="for each figure (default 10)")


def measure(arguments: Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures how fast image files are read, and prepared pixels.

    Args:
      arguments: those of `add_arguments`.
      overrides: none, there are no settings.

    Yields:
      What `measure_input` yields.

    Raises:
      UsageError: there are no images in the folder, or the devices cannot share a batch.
    """
    from badloss_jax.benchmarks.decoding import measure_input
    from badloss_jax.core.mesh import check_batch_size, make_mesh

    mesh = make_mesh()
    check_batch_size("--batch_size", arguments.batch_size, mesh)
    with tempfile.TemporaryDirectory(prefix="badloss-bench-") as folder:
        yield from measure_input(
            arguments.images,
            arguments.examples,
            arguments.image_size,
            arguments.batch_size,
            arguments.seconds,
            mesh,
            Path(folder),
        )


def table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: per form kB an image, and images a second of a core and of the stream."""
    rows = [["stored as", "images", "px", "kB/image", "per core-second", "and cropped there", "streamed/s"]]
    for figure in figures:
        rates = figure["images_per_core_second"]
        rows.append(
            [
                figure["form"],
                f"{figure['images']:,}",
                str(figure["image_size"]),
                f"{figure['bytes_per_image'] / 1000:.1f}",
                f"{rates['read']:,.0f}",
                f"{rates['read_and_cropped']:,.0f}",
                f"{figure['streamed_per_second']:,.0f}",
            ]
        )
    return rows
