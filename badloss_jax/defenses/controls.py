"""Controls: what removing the same share at random, or exactly the poison, would do."""

import math

import numpy as np
from jaxtyping import Bool, Int

from badloss_jax.core.seeding import generator


def random_removal(
    num_examples: int, probe_ids: Int[np.ndarray, "P"], fraction: float, seed: int
) -> Bool[np.ndarray, "N"]:
    """Removes examples at random, probes excepted: what the rule "fraction" removes, without looking.

    Args:
      num_examples: N.
      probe_ids: int [P].
      fraction: of all examples, 0 to 1; floor(fraction N) are removed.
      seed: of the drawing.
    """
    others = np.setdiff1d(np.arange(num_examples), probe_ids)
    shuffled = generator(seed, "random removal").permutation(others)

    removed = np.zeros(num_examples, bool)
    removed[shuffled[: math.floor(fraction * num_examples)]] = True
    return removed


def oracle_removal(num_examples: int, poisoned_ids: Int[np.ndarray, "M"]) -> Bool[np.ndarray, "N"]:
    """Removes exactly the poison; what attack success is left is the trigger's own doing.

    Args:
      num_examples: N.
      poisoned_ids: int [M].
    """
    removed = np.zeros(num_examples, bool)
    removed[poisoned_ids] = True
    return removed
