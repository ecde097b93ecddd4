"""The order of examples: a pure function of (seed, phase, epoch), so any run can be replayed or moved."""

import numpy as np
from jaxtyping import Int

from badloss_jax.core.seeding import generator


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
