"""What each example looks like to a network that has not learnt the trigger yet: where relabelled poison came from."""

import numpy as np
from jaxtyping import Float, Int

from badloss_jax.scoring.distances import Rows, row_chunks

_VALUES = 2**22  # held at a time


def first_seen_as(features: Float[np.ndarray, "N d"] | Rows, labels: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Returns the class whose mean each example's features are nearest to, int64, at an early epoch.

    Args:
      features: [N, d], or [N, 1, d], of one epoch; in memory, or read chunk by chunk.
      labels: int [N], as trained on; poison shifts a class's mean, but no more than its share.
    """
    count, width = len(labels), int(np.prod(features.shape[1:]))
    known, group, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.zeros((len(known), width))
    for start, stop in row_chunks(features, 0, count):
        np.add.at(means, group[start:stop], _flat(features[start:stop]))
    means /= sizes[:, None]
    squares, seen = (means**2).sum(1), np.empty(count, np.int64)
    rows = max(1, _VALUES // max(width, len(known)))
    for start in range(0, count, rows):
        chunk = _flat(features[start : start + rows])
        seen[start : start + rows] = (squares - 2 * chunk @ means.T).argmin(1)
    return known[seen].astype(np.int64)


def _flat(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows).reshape(len(rows), -1).astype(np.float64)
