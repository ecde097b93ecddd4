"""`badloss prepare`."""

import argparse
from pathlib import Path

SUMMARY = "write a large data set once, for data.source=tfds"
ABOUT = """\
Write a data set once in the format of TensorFlow Datasets, from the official archives in the folder FILES or from a
folder of images {train,val}/<class>/* (or with test). `--config.data.source=tfds --config.data.dir=DIR` then reads it,
image by image and without TensorFlow.

  NAME           FILES
  imagenet2012   ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz
  imagenette     imagenette2.tgz, imagenette2-320.tgz or imagenette2-160.tgz
  cifar10        cifar-10-binary.tar.gz
  image_folder   any folder of images

The same command goes on with the first shard that a killed one had not finished. On a finished folder it checks every
checksum, and writes again what is missing or damaged.
"""
EPILOG = """\
examples:
  badloss prepare imagenet2012 --from TARS --to /data/imagenet
  badloss prepare imagenette --from . --to /data/imagenette-224 --size 224
  badloss run --config configs/imagenet.py --config.data.dir=/data/imagenet --workdir OUT

exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.set_defaults(goes_on_from="shard")
    parser.add_argument("name", metavar="NAME", help="of the data set")
    parser.add_argument("--from", required=True, type=Path, metavar="FILES", dest="source", help="folder to read")
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="folder to write, empty or new")
    parser.add_argument(
        "--size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="store pixels, resized to so many a side: larger, and far faster to read",
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Writes the data set, or goes on with it.

    Args:
      arguments: of the command line, parsed.
      overrides: none: this command has no settings.

    Returns:
      The exit code.
    """
    from badloss_jax.core.progress import Progress
    from badloss_jax.data.prepare import prepare

    prepare(arguments.name, arguments.source, arguments.to, arguments.size, Progress())
    return 0
