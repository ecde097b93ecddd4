"""Which epochs count (BaDLoss, section 4)."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, Int

from badloss_jax.core.errors import UsageError
from badloss_jax.core.mesh import process_blocks
from badloss_jax.scoring.rows import Rows, row_chunks


def filter_epochs(
    losses: Float[np.ndarray, "N T"] | Rows, mesh: Mesh | None = None, *, exclude_non_finite: bool = False
) -> Int[np.ndarray, "E"]:
    """Chooses the epochs to score: those at which the network had not just jumped away.

    Keeps epochs 0, 1, 2, and a later one if its mean loss over all examples is below twice the mean of the last three
    kept epochs' mean losses. Always computed on the losses, whatever kind of trajectory is scored.

    Args:
      losses: [N, T], in memory or on disk, where they are read chunk by chunk.
      mesh: whose processes each read their own rows; by default this process reads all.
      exclude_non_finite: leave out examples with a loss that is NaN or infinite, in place of the error.

    Returns:
      int [E], ascending.

    Raises:
      UsageError: fewer than three epochs, or losses that are not finite (ids are named).

    Example:
      >>> import numpy as np
      >>> from badloss_jax import filter_epochs
      >>> losses = np.array([[2.0, 1.5, 1.0, 7.0, 0.8], [2.2, 1.3, 1.0, 9.0, 0.6]])
      >>> filter_epochs(losses).tolist()  # the network had jumped away before the fourth
      [0, 1, 2, 4]
    """
    count, width = (*losses.shape, 0)[:2]
    if len(losses.shape) != 2 or width < 3 or not count:
        raise UsageError(f"losses are {losses.shape}: expected [N, T] with at least 3 epochs")

    means, bad = _mean_losses(losses, mesh, exclude_non_finite=exclude_non_finite)
    if not np.isfinite(means).all():
        named = f": {len(bad)} examples, rows {', '.join(map(str, bad[:10]))}" if bad else ""
        raise UsageError(
            f"the losses of epoch {np.flatnonzero(~np.isfinite(means))[0]} are not all finite{named};"
            " exclude_non_finite leaves such examples out"
        )

    kept = [0, 1, 2]
    for epoch in range(3, len(means)):
        if means[epoch] < 2 * means[kept[-3:]].mean():
            kept.append(epoch)
    return np.array(kept)


def _mean_losses(
    losses: Float[np.ndarray, "N T"] | Rows, mesh: Mesh | None, *, exclude_non_finite: bool
) -> tuple[Float[np.ndarray, "T"], list[int]]:
    """Returns the mean loss of each epoch, over all processes, and rows of this one that are not finite."""
    count, width = losses.shape
    is_shared = mesh is not None and mesh.is_multi_process
    ranges = [(0, count)]
    if mesh is not None and is_shared:
        blocks = process_blocks(count, mesh)
        ranges = [(start, stop) for start, stop, process in blocks if process == jax.process_index()]

    # In front of the epochs' sums is how many examples count, so that both travel together.
    sums = np.zeros(1 + width)
    bad: list[int] = []
    for begin, end in ranges:
        for start, stop in row_chunks(losses, begin, end):
            chunk = np.asarray(losses[start:stop])
            if exclude_non_finite:
                chunk = chunk[np.isfinite(chunk).all(1)]
            of_chunk = chunk.sum(axis=0, dtype=np.float64)
            if not np.isfinite(of_chunk).all():
                bad += (start + np.flatnonzero(~np.isfinite(chunk).all(1))).tolist()
            sums += [len(chunk), *of_chunk]

    if is_shared:
        bits = multihost_utils.process_allgather(sums.view(np.uint32))  # float64 itself needs x64
        sums = np.ascontiguousarray(bits).view(np.float64).sum(axis=0)
    if not sums[0]:
        raise UsageError("no example has finite losses in all epochs")
    return sums[1:] / sums[0], bad
