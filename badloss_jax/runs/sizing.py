"""How large a network a scan has the time for, by the rate at which this machine trains it.

A network that generalises early tells what is learnt as its class from what is memorised, so a scan takes the largest
that it can record with in the time that it is given (scoring/README.md has what that is worth).
"""

import itertools
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from badloss_jax.core.errors import UsageError
from badloss_jax.core.order import epoch_batches
from badloss_jax.core.processes import on_all, on_first
from badloss_jax.core.progress import Progress
from badloss_jax.runs.trainer import recipe_of, spec_of
from badloss_jax.training.batch import Batch, Examples
from badloss_jax.training.footprint import check_train_step
from badloss_jax.training.state import create_state
from badloss_jax.training.step import make_train_step
from badloss_jax.trajectories.buffer import padding_id

# Of resnet_small its channels, what its stem's stride is divided by, and the share of the epochs that it needs.
_SMALL = [
    ((16, 32, 64), 1, 1),
    ((32, 64, 128), 1, 2 / 3),
    ((16, 32, 64), 2, 8 / 15),
    ((32, 64, 128), 2, 8 / 15),
]
_FEWEST_EPOCHS = 8
_FEW = 5_000  # images
_SHARE = 0.85  # of the time that is for the recording; the rest is for reading, compiling and scoring
_SWEEP = 4 / 3  # an epoch with its sweep, which is a forward pass, in epochs of training
_GROWTH = 1.2  # a larger network takes at least so many times as long
_WARM_UP = 2  # steps that compile, and fill what is read ahead
_FEWEST_STEPS = 3  # that are timed
_SECONDS = 1.5  # of steps that are timed


@dataclass(frozen=True)
class Network:
    """A network to record with.

    Attributes:
      name: of `MODELS`.
      stages: of resnet_small.
      stem_stride: likewise.
      share: of the epochs that it is trained for.
    """

    name: str
    stages: tuple[int, ...]
    stem_stride: int
    share: float = 1.0

    def __str__(self) -> str:
        if self.name != "resnet_small":
            return self.name
        return f"{self.name} {tuple(self.stages)}, stem of stride {self.stem_stride}"


@dataclass(frozen=True)
class Choice:
    """What to record with.

    Attributes:
      network: the largest that fits.
      epochs: T, fewer than asked for where it needs fewer, or where not even the smallest fits.
      rate: images a second in training.
      seconds: that the recording is going to take.
    """

    network: Network
    epochs: int
    rate: float
    seconds: float


@dataclass(frozen=True)
class Sizing:
    """What networks are tried out on: the data itself, wherever it is read from.

    Attributes:
      config: of the scan; the network that is tried out is set in it.
      data: the training set.
      image_shape: (H, W, C).
      num_classes: K.
      mesh: the devices.
    """

    config: ConfigDict
    data: Examples
    image_shape: tuple[int, int, int]
    num_classes: int
    mesh: Mesh

    def rate(self, network: Network) -> float:
        """Measures how many images a second a network is trained with, once it is compiled.

        Raises:
          UsageError: it cannot fit the devices' memory.
        """
        self.use(network)
        config = self.config
        spec = spec_of(config, self.image_shape, self.num_classes, config.model.name)
        settings = config.recording
        recipe = recipe_of(config, settings.epochs, settings.schedule_epochs, settings.batch_size)
        # What one of several machines has no memory for, none of them tries.
        on_all(lambda: check_train_step("recording.batch_size", spec, recipe, None, self.mesh))
        step = make_train_step(spec, recipe.optimizer, recipe.objective, recipe.augment, None, self.mesh)
        state: Any = create_state(spec, recipe.optimizer, 0, self.mesh)
        epoch = np.int32(0)
        learning_rate = np.float32(recipe.learning_rate_at(0))
        seed = np.uint32(0)

        with closing(self._endless_batches(recipe.batch_size)) as batches:

            def seconds_of(steps: int) -> float:
                nonlocal state
                started = time.perf_counter()
                for batch in itertools.islice(batches, steps):
                    # Every step is waited for: else only its dispatch would be timed.
                    state, loss, *_ = step(state, batch, epoch, learning_rate, seed, None)
                    jax.block_until_ready(loss)
                # By the clock of the first process, so that all of them make as many steps.
                return on_first(lambda: time.perf_counter() - started)

            seconds_of(_WARM_UP)
            spent = seconds_of(_FEWEST_STEPS)
            more = math.ceil(max(0.0, _SECONDS - spent) * _FEWEST_STEPS / spent)
            spent += seconds_of(more)
            return (_FEWEST_STEPS + more) * recipe.batch_size / spent

    def use(self, network: Network) -> None:
        """Sets the network in the config."""
        self.config.model.update(name=network.name, stages=network.stages, stem_stride=network.stem_stride)

    def _endless_batches(self, batch_size: int) -> Generator[Batch, None, None]:
        ids = np.arange(len(self.data))
        padding = padding_id(len(self.data), self.mesh)
        for epoch in itertools.count():
            yield from self.data.batches(epoch_batches(ids, batch_size, padding, seed=0, phase="sizing", epoch=epoch))


def candidates(num_examples: int, mesh: Mesh, stages: Sequence[int], stem_stride: int) -> list[Network]:
    """Lists networks in the order of their cost; an accelerator does not begin with the small ones.

    A stem that keeps the resolution sees what is slight and small, and is worth more than width (scoring/README.md).

    Few images have narrow ones: a wide network may remember each by itself, and among so few none was tried.

    Args:
      num_examples: N.
      mesh: the devices.
      stages: of the config, for the large networks, which do not look at it.
      stem_stride: that suits the images' size; a network may have half of it.

    Returns:
      The networks, at least one.
    """
    small = []
    for channels, finer, share in _SMALL:
        if stem_stride >= finer:
            small.append(Network("resnet_small", channels, stem_stride // finer, share))

    if num_examples < _FEW:
        return [network for network in small if network.stages == small[0].stages]
    if mesh.devices.flat[0].platform != "cpu":
        return [Network(name, tuple(stages), stem_stride) for name in ("resnet18", "resnet34")]
    return small


def choose(
    networks: Sequence[Network],
    rate_of: Callable[[Network], float],
    num_examples: int,
    epochs: int,
    seconds: float,
) -> Choice:
    """Chooses the largest network that is recorded with in the time.

    Args:
      networks: in the order of their cost.
      rate_of: measures the images a second that one is trained with, or raises UsageError if there is not the memory
        for it; it is asked of no more than are needed.
      num_examples: N.
      epochs: T.
      seconds: for all.

    Returns:
      The network and its epochs; the smallest, with fewer epochs, if none fits.

    Raises:
      UsageError: not even the smallest fits the memory.
    """

    def plan(network: Network) -> Choice:
        rate = rate_of(network)
        needed = min(epochs, max(_FEWEST_EPOCHS, round(network.share * epochs)))
        return Choice(network, needed, rate, _SWEEP * needed * num_examples / rate)

    best = plan(networks[0])
    if best.seconds > seconds:
        fewer = min(best.epochs, max(_FEWEST_EPOCHS, math.floor(best.epochs * seconds / best.seconds)))
        return Choice(best.network, fewer, best.rate, best.seconds * fewer / best.epochs)

    for network in networks[1:]:
        # To measure one that cannot fit would be a waste of time.
        if _GROWTH * best.seconds > seconds:
            break
        try:
            larger = plan(network)
        except UsageError:  # there is not the memory for it
            break
        if larger.seconds > seconds:
            break
        best = larger
    return best


def choose_network(sizing: Sizing, minutes: float, progress: Progress) -> None:
    """Sets the network and the number of epochs by what this machine does in so many minutes, and says so.

    Args:
      sizing: the data; its config is set.
      minutes: that a scan may take.
      progress: is told.
    """
    progress.note("network  trying out which fits the time ...")
    config = sizing.config
    num_examples = len(sizing.data)
    networks = candidates(num_examples, sizing.mesh, config.model.stages, config.model.stem_stride)
    choice = choose(networks, sizing.rate, num_examples, config.recording.epochs, 60 * _SHARE * minutes)

    sizing.use(choice.network)
    config.recording.epochs = choice.epochs
    progress.note(
        f"network  {choice.network}, {choice.epochs} epochs: {choice.rate:,.0f} images/s here, so about"
        f" {_duration(choice.seconds)} to record (--minutes {minutes:g})"
    )


def _duration(seconds: float) -> str:
    if seconds > 90:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds:.0f} seconds"
