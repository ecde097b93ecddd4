"""The order of examples: a pure function of (seed, phase, epoch), so any run can be replayed or moved."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from badloss_jax.core.seeding import generator

_KEPT = 3  # passes


def epoch_batches(
    example_ids: Int[np.ndarray, "M"], batch_size: int, padding_id: int, *, seed: int, phase: str, epoch: int
) -> Int[np.ndarray, "S B"]:
    """Shuffles the ids for one epoch and cuts them into batches, the last one padded.

    Args:
      example_ids: int [M], the examples to visit, each once.
      batch_size: B.
      padding_id: fills up the last batch; must be an id that no example has.
      seed, phase, epoch: name the permutation.

    Returns:
      int32 [S, B], S = ceil(M / B).
    """
    # Of the ids alone: neither the devices nor the processes have a say in it.
    shuffled = generator(seed, phase, "order", epoch).permutation(example_ids)
    return cut_batches(shuffled, batch_size, padding_id)


def cut_batches(example_ids: Int[np.ndarray, "M"], batch_size: int, padding_id: int) -> Int[np.ndarray, "S B"]:
    """Cuts ids into batches in the order given, the last one padded.

    Args:
      example_ids: int [M].
      batch_size: B.
      padding_id: fills up the last batch; must be an id that no example has.

    Returns:
      int32 [S, B], S = ceil(M / B).
    """
    steps = -(-len(example_ids) // batch_size)
    batches = np.full(steps * batch_size, padding_id, np.int32)
    batches[: len(example_ids)] = example_ids
    return batches.reshape(steps, batch_size)


class Passes(Protocol):
    """Passes over examples, one after the other."""

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(S, B) of each: how many batches it has, and how large they are."""

    def order(self, number: int) -> Int[np.ndarray, "S B"]:
        """Returns the ids of each batch of a pass, those of no example being padding."""


@dataclass(frozen=True)
class OnePass:
    """A single pass whose order is known."""

    batches: Int[np.ndarray, "S B"]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """See `Passes`."""
        steps, batch_size = self.batches.shape
        return [(steps, batch_size)]

    def order(self, number: int) -> Int[np.ndarray, "S B"]:
        """See `Passes`."""
        return self.batches


@dataclass
class TrainingPasses:
    """The passes of a training: each epoch a shuffled one, and behind it a sweep over all examples, if there is one.

    Orders are computed when they are asked for, in whatever thread or process that is, and a few are kept.

    Attributes:
      example_ids: int [M], that are trained on.
      batch_size: B.
      padding_id: fills up the last batch of a pass.
      seed, phase: name the permutations, with the epoch.
      epochs: that are trained for.
      swept: N, examples of a sweep; 0 for none.
      sweep_batch: the batch size of a sweep.
    """

    example_ids: Int[np.ndarray, "M"]
    batch_size: int
    padding_id: int
    seed: int
    phase: str
    epochs: int
    swept: int = 0
    sweep_batch: int = 1

    def __post_init__(self) -> None:
        self._known: dict[int, Int[np.ndarray, "S B"]] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_known": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """See `Passes`."""
        training = -(-len(self.example_ids) // self.batch_size), self.batch_size
        if not self.swept:
            return [training] * self.epochs
        return [training, (-(-self.swept // self.sweep_batch), self.sweep_batch)] * self.epochs

    def number_of(self, epoch: int) -> int:
        """Returns the number of the pass that trains in an epoch; that of the sweep comes next."""
        return epoch * (2 if self.swept else 1)

    def order(self, number: int) -> Int[np.ndarray, "S B"]:
        """See `Passes`."""
        with self._lock:
            if number not in self._known:
                # What comes next is read ahead, while what was last is still looked at.
                self._known = {known: order for known, order in self._known.items() if abs(known - number) < _KEPT}
                self._known[number] = self._order(number)
            return self._known[number]

    def _order(self, number: int) -> Int[np.ndarray, "S B"]:
        epoch, sweeps = (number, 0) if not self.swept else divmod(number, 2)
        if sweeps:
            return cut_batches(np.arange(self.swept), self.sweep_batch, self.padding_id)
        return epoch_batches(
            self.example_ids, self.batch_size, self.padding_id, seed=self.seed, phase=self.phase, epoch=epoch
        )


def batches_of(passes: Passes, number: int = 0, start: int = 0) -> Iterator[Int[np.ndarray, "B"]]:
    """Yields the ids of each batch.

    Args:
      passes: one after the other.
      number: the pass to begin with.
      start: the batch of it to begin with.
    """
    for later in range(number, len(passes.shapes)):
        yield from passes.order(later)[start:]
        start = 0
