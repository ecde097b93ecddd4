"""Passes over a training set that do not train: a jitted function of each batch, its results gathered by example."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from badloss_jax.core.mesh import by_rows, pass_batch_size, to_host
from badloss_jax.core.order import cut_batches
from badloss_jax.core.progress import Progress
from badloss_jax.training.batch import Batch, Examples
from badloss_jax.trajectories.buffer import padding_id


def map_examples(
    function: Callable[..., Any],
    data: Examples,
    ids: Int[np.ndarray, "M"],
    batch_size: int,
    mesh: Mesh,
    *arguments: Any,
    progress: Progress | None = None,
    title: str = "",
) -> Any:
    """Applies a jitted function to batches of examples, in the order of the ids.

    Args:
      function: (batch, *arguments) -> a tree of arrays [B, ...], one row an example of the batch.
      data: the training set.
      ids: int [M], at least one.
      batch_size: of all devices together; see `pass_batch_size`.
      mesh: the devices.
      *arguments: handed on, such as a network's state.
      progress, title: tell how far it is.

    Returns:
      The tree, of NumPy arrays [M, ...], in every process.
    """
    padding = padding_id(len(data), mesh)
    order = cut_batches(ids, pass_batch_size(batch_size, mesh), padding)

    progress = progress or Progress(None)
    progress.phase(title)
    progress.begin(len(ids))

    parts: list[Any] = []
    for number, batch in enumerate(data.batches(order)):
        parts.append(function(batch, *arguments))
        if number > 0:
            # While this batch is computed, the one before it is copied.
            parts[-2] = jax.tree.map(to_host, parts[-2])

        where = f"batch {number + 1}/{len(order)}"
        progress.advance(int(np.count_nonzero(order[number] < padding)), where)
        progress.say(where)
    parts[-1] = jax.tree.map(to_host, parts[-1])
    progress.end()

    # Only the last batch has padding, and that comes behind its examples.
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(ids)], *parts)


@lru_cache(maxsize=8)
def make_look(dtype: str, mesh: Mesh) -> Callable[[Batch], jax.Array]:
    """Compiles batch -> its images as the victim sees them, [B, H, W, C] in [0, 1].

    Args:
      dtype: of the images, by name.
      mesh: the devices, which share them.

    Returns:
      The jitted function, the same one for equal arguments; `map_examples` takes it.
    """
    return jax.jit(lambda batch: batch.images.astype(dtype), out_shardings=by_rows(mesh))
