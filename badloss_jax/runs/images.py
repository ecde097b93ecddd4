"""What a run trains on, as far as a plan has to know: how many images, of how many classes, and how large they are."""

import math
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from badloss_jax.core.errors import UsageError, listed
from badloss_jax.data import is_streamed_size, load_dataset

_MOST = 2**31 - 1  # ids are 32 bits


@dataclass(frozen=True)
class Images:
    """The training images of a plan.

    Attributes:
      examples: N.
      classes: K.
      shape: (H, W, C).
    """

    examples: int
    classes: int
    shape: tuple[int, int, int]

    @property
    def size(self) -> int:
        """Bytes of an image, as uint8."""
        return math.prod(self.shape)

    def is_streamed(self, config: ConfigDict) -> bool:
        """Whether they travel to the devices batch by batch; see `badloss_jax.data.is_streamed`."""
        return is_streamed_size(self.examples * self.size, config.data.input)


# What the configs that are shipped train on, by the name of their file.
DATA_SETS = {
    "cifar10": Images(50_000, 10, (32, 32, 3)),
    "digits": Images(1_347, 10, (8, 8, 1)),
    "fashion_mnist": Images(60_000, 10, (28, 28, 1)),
    "gtsrb": Images(39_209, 43, (224, 224, 3)),
    "imagenet": Images(1_281_167, 1_000, (224, 224, 3)),
    "imagenette": Images(9_469, 10, (224, 224, 3)),
}


@dataclass(frozen=True)
class Sizes:
    """What is said of the images; None is not said.

    Attributes:
      examples: N.
      classes: K.
      image_size: pixels a side.
    """

    examples: int | None = None
    classes: int | None = None
    image_size: int | None = None


def images_of(config: ConfigDict, name: str, sizes: Sizes) -> Images:
    """Returns what a config trains on: what is said of it, or what its folder holds, or what a shipped config is for.

    Args:
      config: of the run.
      name: of the config file, without folder and ending.
      sizes: what is said.

    Returns:
      The images, as the network gets them.

    Raises:
      UsageError: something is neither said nor known.
      DataError: the folder is damaged.
    """
    data = config.data
    known = DATA_SETS.get(name)
    if data.dir and Path(data.dir).expanduser().exists() and None in (sizes.examples, sizes.classes):
        dataset = load_dataset(data, config.seed)
        return Images(
            sizes.examples or len(dataset.train.labels), sizes.classes or dataset.num_classes, dataset.image_shape
        )

    examples = sizes.examples or data.train_examples or (known.examples if known else None)
    classes = sizes.classes or (known.classes if known else None)
    side = sizes.image_size or data.image_size or (known.shape[0] if known else None)
    if examples is None or classes is None or side is None:
        raise UsageError(
            f"what {name} trains on is not known: expected --examples N, --classes K and --image_size PX, or a data set"
            f" in --config.data.dir; known are the configs {listed(tuple(DATA_SETS))}"
        )
    if examples > _MOST:
        raise UsageError(f"--examples {examples}: expected at most {_MOST:,}, as ids are 32 bits")
    channels = known.shape[2] if known else data.channels
    side += 2 * data.pad
    return Images(examples, classes, (side, side, channels))
