"""What becomes of a distance: logarithms, kinds of trajectory put together, scores for display (BaDLoss, section 4)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from badloss_jax.core.errors import UsageError


def anomaly_scores(
    distances: Float[np.ndarray, "N"],
    eps: float = 0.01,
    transform: str = "log",
    between: tuple[float, float] | None = None,
) -> Float[np.ndarray, "N"]:
    """Turns distances into scores in [0, 1] for display: log(eps + distance), shifted and scaled ("linear": no log).

    Ranks are those of the distances. Thresholds are made from distances, never from scores that were scaled set by set.

    Args:
      distances: [N].
      eps: is added to each distance before the logarithm.
      transform: "log" or "linear".
      between: the smallest and the largest distance, where these are but a part of all.

    Returns:
      float64 [N]; all 0 where all distances are the same.

    Raises:
      UsageError: an unknown transform, or distances of -eps or less.

    Example:
      >>> import numpy as np
      >>> from badloss_jax import anomaly_scores
      >>> anomaly_scores(np.array([0.5, 1.0, 2.5]), transform="linear").tolist()
      [0.0, 0.25, 1.0]
    """
    if transform not in ("log", "linear"):
        raise UsageError(f"unknown transform {transform!r}: expected log or linear")
    values = np.asarray(distances, np.float64)
    low, high = between or (values.min(), values.max())

    if transform == "log":
        if low + eps <= 0:
            raise UsageError(f"distances go down to {low}: expected more than -eps = {-eps}")
        values = np.log(eps + values)
        low = np.log(eps + low)
        high = np.log(eps + high)
    return (values - low) / ((high - low) or 1.0)


def mean_standardised(
    distances: Sequence[Float[np.ndarray, "N"]], probe_distances: Sequence[Float[np.ndarray, "P"]]
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "P"]]:
    """Combines kinds of trajectory: the mean of z = (log distance - median) / spread.

    Median and spread (half the distance from the 16th to the 84th percentile) are those of the probes' leave-one-out
    log distances of the same kind.

    Args:
      distances: of each kind [N].
      probe_distances: of each kind [P], leave-one-out.

    Returns:
      z of the examples, float64 [N], and of the probes, [P].
    """
    of_examples = []
    of_probes = []
    for ours, probes in zip(distances, probe_distances, strict=True):
        log_probes = log_distances(probes)
        low, median, high = np.percentile(log_probes, [16, 50, 84])
        spread = max((high - low) / 2, 1e-6)  # 0 only if most probes lie equally far
        of_examples.append((log_distances(ours) - median) / spread)
        of_probes.append((log_probes - median) / spread)
    return np.mean(of_examples, axis=0), np.mean(of_probes, axis=0)


def log_distances(distances: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Returns the logarithms, float64, with 1e-12 in place of less."""
    return np.log(np.maximum(np.asarray(distances, np.float64), 1e-12))
