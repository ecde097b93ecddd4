"""Which epochs count (BaDLoss, section 4)."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, Int

from badloss_jax.core.errors import UsageError
from badloss_jax.core.mesh import process_blocks
from badloss_jax.scoring.distances import Rows, row_chunks


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

    Raises:
      UsageError: fewer than three epochs, or losses that are not finite (ids are named).
    """
    count, width = (*losses.shape, 0)[:2]
    if len(losses.shape) != 2 or width < 3 or not count:
        raise UsageError(f"losses are {losses.shape}: expected [N, T] with at least 3 epochs")
    sums, ranges = np.zeros(1 + width), [(0, count)]  # the first is how many examples count
    bad: list[int] = []
    if mesh is not None and mesh.is_multi_process:
        ranges = [run[:2] for run in process_blocks(count, mesh) if run[2] == jax.process_index()]
    for begin, end in ranges:
        for start, stop in row_chunks(losses, begin, end):
            chunk = np.asarray(losses[start:stop])
            if exclude_non_finite:
                chunk = chunk[np.isfinite(chunk).all(1)]
            seen = chunk.sum(axis=0, dtype=np.float64)
            if not np.isfinite(seen).all():
                bad += (start + np.flatnonzero(~np.isfinite(chunk).all(1))).tolist()
            sums += [len(chunk), *seen]
    if mesh is not None and mesh.is_multi_process:
        bits = multihost_utils.process_allgather(sums.view(np.uint32))  # float64 itself needs x64
        sums = np.ascontiguousarray(bits).view(np.float64).sum(axis=0)
    if not sums[0]:
        raise UsageError("no example has finite losses in all epochs")
    means = sums[1:] / sums[0]
    if not np.isfinite(means).all():
        named = f": {len(bad)} examples, rows {', '.join(map(str, bad[:10]))}" if bad else ""
        raise UsageError(f"the losses of epoch {np.flatnonzero(~np.isfinite(means))[0]} are not all finite{named};"
                         " exclude_non_finite leaves such examples out")  # fmt: skip
    kept = [0, 1, 2]
    for epoch in range(3, len(means)):
        if means[epoch] < 2 * means[kept[-3:]].mean():
            kept.append(epoch)
    return np.array(kept)
