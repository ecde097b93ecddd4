"""How large a network a scan has the time for, by the rate at which this machine trains it.

A network that generalises early tells what is learnt as its class from what is memorised, so a scan takes the largest
that it can record with in the time that it is given (scoring/README.md has what that is worth).
"""

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

from badloss_jax.core.order import epoch_batches
from badloss_jax.core.progress import Progress
from badloss_jax.runs.trainer import recipe_of, spec_of
from badloss_jax.training.batch import Batch, Examples
from badloss_jax.training.state import create_state
from badloss_jax.training.step import make_train_step
from badloss_jax.trajectories.buffer import padding_id

# Of resnet_small its channels, what its stem's stride is divided by, and the share of the epochs that it needs.
_SMALL = [((16, 32, 64), 1, 1), ((32, 64, 128), 1, 2 / 3), ((16, 32, 64), 2, 8 / 15), ((32, 64, 128), 2, 8 / 15)]
_FEWEST_EPOCHS = 8
_FEW = 5_000  # images
_SHARE = 0.85  # of the time that is for the recording; the rest is for reading, compiling and scoring
_SWEEP = 4 / 3  # an epoch with its sweep, which is a forward pass, in epochs of training
_GROWTH = 1.2  # a larger network takes at least so many times as long
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
        small = f" {tuple(self.stages)}, stem of stride {self.stem_stride}"
        return self.name + small * (self.name == "resnet_small")


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


def candidates(num_examples: int, mesh: Mesh, stages: Sequence[int], stem_stride: int) -> list[Network]:
    """Returns networks in the order of their cost; an accelerator does not begin with the small ones.

    A stem that keeps the resolution sees what is slight and small, and is worth more than width (scoring/README.md).

    Few images have narrow ones: a wide network may remember each by itself, and among so few none was tried.
    """
    small = [
        Network("resnet_small", channels, stem_stride // finer, share)
        for channels, finer, share in _SMALL
        if stem_stride >= finer
    ]
    if num_examples < _FEW:
        return [network for network in small if network.stages == small[0].stages]
    if mesh.devices.flat[0].platform != "cpu":
        return [Network(name, tuple(stages), stem_stride) for name in ("resnet18", "resnet34")]
    return small


def choose(
    networks: Sequence[Network], rate_of: Callable[[Network], float], num_examples: int, epochs: int, seconds: float
) -> Choice:  # fmt: skip
    """Chooses the largest network that is recorded with in the time.

    Args:
      networks: in the order of their cost.
      rate_of: measures the images a second that one is trained with; it is asked of no more than are needed.
      num_examples: N.
      epochs: T.
      seconds: for all.
    """

    def plan(network: Network) -> Choice:
        rate, needed = rate_of(network), min(epochs, max(_FEWEST_EPOCHS, round(network.share * epochs)))
        return Choice(network, needed, rate, _SWEEP * needed * num_examples / rate)

    best = plan(networks[0])
    if best.seconds > seconds:
        fewer = min(best.epochs, max(_FEWEST_EPOCHS, math.floor(best.epochs * seconds / best.seconds)))
        return Choice(best.network, fewer, best.rate, best.seconds * fewer / best.epochs)
    for network in networks[1:]:
        if _GROWTH * best.seconds > seconds:
            break
        larger = plan(network)
        if larger.seconds > seconds:
            break
        best = larger
    return best


def choose_network(
    config: ConfigDict, data: Examples, image_shape: tuple[int, int, int], num_classes: int, minutes: float, mesh: Mesh,
    progress: Progress,
) -> None:  # fmt: skip
    """Sets `config.model` and the number of epochs by what this machine does in so many minutes, and says so.

    What is timed is training on the data itself, wherever it is read from.
    """
    progress.note("network  trying out which fits the time ...")

    def rate_of(network: Network) -> float:
        _set(config, network)
        return _rate(config, data, image_shape, num_classes, mesh)

    networks = candidates(len(data), mesh, config.model.stages, config.model.stem_stride)
    choice = choose(networks, rate_of, len(data), config.recording.epochs, 60 * _SHARE * minutes)
    _set(config, choice.network)
    config.recording.epochs = choice.epochs
    told = f"{choice.rate:,.0f} images/s here, so about {_minutes(choice.seconds)} to record (--minutes {minutes:g})"
    progress.note(f"network  {choice.network}, {choice.epochs} epochs: {told}")


def _set(config: ConfigDict, network: Network) -> None:
    config.model.update(name=network.name, stages=network.stages, stem_stride=network.stem_stride)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"


def _rate(config: ConfigDict, data: Examples, image_shape: tuple[int, int, int], num_classes: int, mesh: Mesh) -> float:
    """Measures how many images a second a network is trained with, once it is compiled."""
    spec = spec_of(config, image_shape, num_classes, config.model.name)
    recipe = recipe_of(config, config.recording.epochs, config.recording.schedule_epochs, config.recording.batch_size)
    step = make_train_step(spec, recipe.optimizer, recipe.objective, recipe.augment, None, mesh)
    state: Any = create_state(spec, recipe.optimizer, 0, mesh)
    rest = np.int32(0), np.float32(recipe.learning_rate_at(0)), np.uint32(0), None

    done, started = -2, 0.0
    with closing(_endless(data, recipe.batch_size, mesh)) as batches:
        while done < 3 or time.perf_counter() - started < _SECONDS:
            state, _, loss = step(state, {}, next(batches), *rest)
            jax.block_until_ready(loss)
            done += 1
            if not done:  # the first steps compile, and fill what is read ahead
                started = time.perf_counter()
        return done * recipe.batch_size / (time.perf_counter() - started)


def _endless(data: Examples, batch_size: int, mesh: Mesh) -> Generator[Batch, None, None]:
    ids, padding = np.arange(len(data)), padding_id(len(data), mesh)
    epoch = 0
    while True:
        yield from data.batches(epoch_batches(ids, batch_size, padding, seed=0, phase="sizing", epoch=epoch))
        epoch += 1
