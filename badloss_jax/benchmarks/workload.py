"""What a training is measured with: a network, its recipe, what is recorded, and images of a config or of noise."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from badloss_jax.config import default_config, load_config, override
from badloss_jax.core.errors import UsageError
from badloss_jax.core.mesh import pass_batch_size
from badloss_jax.core.seeding import generator
from badloss_jax.data import is_streamed, load_dataset
from badloss_jax.models import ModelSpec
from badloss_jax.training.loop import Recipe
from badloss_jax.training.objective import MeanLoss
from badloss_jax.training.resident import ResidentData
from badloss_jax.training.state import AdamW
from badloss_jax.trajectories.kinds import Kinds

_SYNTHETIC_SIZE = 32  # px


@dataclass(frozen=True)
class Images:
    """A training set on the devices.

    Attributes:
      data: its images and labels.
      num_classes: K.
    """

    data: ResidentData
    num_classes: int


@dataclass(frozen=True)
class Workload:
    """One network's training.

    Attributes:
      spec: the network.
      recipe: how it is trained.
      kinds: what is recorded.
      data: its examples, all of which make an epoch.
      mesh: the devices.
      sweep_batch: batch size of a sweep.
    """

    spec: ModelSpec
    recipe: Recipe
    kinds: Kinds
    data: ResidentData
    mesh: Mesh
    sweep_batch: int


def choose_config(spec: str | None, overrides: Sequence[str]) -> ConfigDict:
    """Loads a config, or takes the default settings with a small network.

    Args:
      spec: FILE[:VARIANT]; None takes the defaults.
      overrides: changed settings.

    Returns:
      The settings, checked.

    Raises:
      UsageError: no such file or variant, or a wrong setting.
    """
    if spec:
        return load_config(spec, overrides)
    return override(default_config(), ["--config.model.name=resnet_small", *overrides])


def choose_images(arguments: Namespace, config: ConfigDict, mesh: Mesh) -> Images:
    """Places the images of a config on the devices, or noise where there is no config or a size is given.

    Args:
      arguments: of `badloss bench train`.
      config: its settings.
      mesh: the devices.

    Returns:
      The images, and how many classes they have.

    Raises:
      UsageError: the config's images would be streamed.
    """
    if arguments.image_size or not arguments.config:
        size = arguments.image_size or _SYNTHETIC_SIZE
        shape = (size, size, config.data.channels)
        data = synthetic_data(mesh, arguments.examples, shape, arguments.classes)
        return Images(data, arguments.classes)

    dataset = load_dataset(config.data, config.seed)
    if is_streamed(dataset.train, config.data.input):
        raise UsageError(
            "these images are streamed, and badloss bench measures the devices, not the decoding: take"
            " --image_size PX, or fewer images by --config.data.train_examples=N"
        )
    return Images(clean_data(mesh, dataset.train.images, dataset.train.labels), dataset.num_classes)


def make_workload(name: str, config: ConfigDict, images: Images, mesh: Mesh) -> Workload:
    """Makes a workload of a network and the settings of a recording.

    Args:
      name: of the network, in place of the config's.
      config: everything else.
      images: that it learns.
      mesh: the devices.

    Returns:
      The workload, of which nothing has been trained yet.
    """
    recording = config.recording
    given = config.optimizer
    recipe = Recipe(
        recording.epochs,
        recording.schedule_epochs,
        recording.batch_size,
        given.learning_rate,
        AdamW(given.weight_decay, given.b1, given.b2),
        MeanLoss(given.loss_clamp),
    )

    # The shape is that of the images, which need not be the config's.
    height, width, channels = images.data.images.shape[1:]
    model = config.model
    spec = ModelSpec(
        name,
        (height, width, channels),
        images.num_classes,
        tuple(model.stages),
        model.stem_stride,
        model.dtype,
        model.ghost_batch,
    )
    kinds = Kinds(
        tuple(recording.kinds),
        images.num_classes,
        spec.num_features,
        recording.feature_dim,
        recording.ranked_others,
    )

    # A sweep's batches may be padded, unlike those of a training step.
    sweep_batch = pass_batch_size(config.evaluation.batch_size, mesh)
    return Workload(spec, recipe, kinds, images.data, mesh, sweep_batch)


def synthetic_data(mesh: Mesh, num_examples: int, image_shape: tuple[int, int, int], num_classes: int) -> ResidentData:
    """Places uint8 noise with random labels on the devices.

    Args:
      mesh: the devices.
      num_examples: N.
      image_shape: (H, W, C).
      num_classes: K.

    Returns:
      The data, none of it poisoned.
    """
    draw = generator(0, "benchmark")
    images = draw.integers(0, 256, (num_examples, *image_shape), dtype=np.uint8)
    labels = draw.integers(0, num_classes, num_examples)
    return clean_data(mesh, images, labels)


def clean_data(mesh: Mesh, images: UInt8[np.ndarray, "N H W C"], labels: Int[np.ndarray, "N"]) -> ResidentData:
    """Places images and labels on the devices, none of them poisoned.

    Args:
      mesh: the devices.
      images: uint8 [N, H, W, C].
      labels: int [N].

    Returns:
      The data.
    """
    nobody = np.zeros(0, int)
    nothing = np.zeros((0, *images.shape[1:]), np.float32)
    return ResidentData.place(mesh, images, labels, nobody, nothing)
