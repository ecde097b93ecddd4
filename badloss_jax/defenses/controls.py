"""Controls: what removing the same share at random, or exactly the poison, would do."""

import math

import numpy as np
from jaxtyping import Bool, Int

from badloss_jax.core.seeding import generator


def random_removal(
    num_examples: int, probe_ids: Int[np.ndarray, "P"], fraction: float, seed: int
) -> Bool[np.ndarray, "N"]:
    """Removes floor(fraction N) examples at random, probes excepted: what `fraction` removes, without looking."""
    others = np.setdiff1d(np.arange(num_examples), probe_ids)
    removed = np.zeros(num_examples, bool)
    removed[generator(seed, "random removal").permutation(others)[: math.floor(fraction * num_examples)]] = True
    return removed


def oracle_removal(num_examples: int, poisoned_ids: Int[np.ndarray, "M"]) -> Bool[np.ndarray, "N"]:
    """Removes exactly the poison; what attack success is left is the trigger's own doing."""
    removed = np.zeros(num_examples, bool)
    removed[poisoned_ids] = True
    return removed
