"""Which epochs count, and what becomes of a distance (BaDLoss, section 4)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from badloss_jax.errors import UsageError


def filter_epochs(losses: Float[np.ndarray, "N T"]) -> Int[np.ndarray, "E"]:
    """Chooses the epochs to score: those at which the network had not just jumped away.

    Keeps epochs 0, 1, 2, and a later one if its mean loss over all examples is below twice the mean of the last three
    kept epochs' mean losses. Always computed on the losses, whatever kind of trajectory is scored.

    Raises:
      UsageError: fewer than three epochs, or losses that are not finite.
    """
    losses = np.asarray(losses)
    if losses.ndim != 2 or losses.shape[1] < 3 or not len(losses):
        raise UsageError(f"losses are {losses.shape}: expected [N, T] with at least 3 epochs")
    means = losses.mean(axis=0, dtype=np.float64)
    if not np.isfinite(means).all():
        raise UsageError(f"the losses of epoch {np.flatnonzero(~np.isfinite(means))[0]} are not all finite")
    kept = [0, 1, 2]
    for epoch in range(3, len(means)):
        if means[epoch] < 2 * means[kept[-3:]].mean():
            kept.append(epoch)
    return np.array(kept)


def anomaly_scores(
    distances: Float[np.ndarray, "N"], eps: float = 0.01, transform: str = "log"
) -> Float[np.ndarray, "N"]:
    """Turns distances into scores in [0, 1] for display: log(eps + distance), shifted and scaled ("linear": no log).

    Ranks are those of the distances. Thresholds are made from distances, never from scores that were scaled set by set.
    """
    if transform not in ("log", "linear"):
        raise UsageError(f"unknown transform {transform!r}: expected log or linear")
    values = np.asarray(distances, np.float64)
    if transform == "log":
        if values.min() + eps <= 0:
            raise UsageError(f"distances go down to {values.min()}: expected more than -eps = {-eps}")
        values = np.log(eps + values)
    span = np.ptp(values)
    return (values - values.min()) / (span or 1.0)


def mean_standardised(
    distances: Sequence[Float[np.ndarray, "N"]], probe_distances: Sequence[Float[np.ndarray, "P"]]
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "P"]]:
    """Combines kinds of trajectory: the mean of z = (log distance - median) / spread.

    Median and spread (half the distance from the 16th to the 84th percentile) are those of the probes' leave-one-out
    log distances of the same kind. Returns z of the examples, float64 [N], and of the probes, [P].
    """
    totals: tuple[list, list] = ([], [])
    for ours, probes in zip(distances, probe_distances, strict=True):
        log_probes = _log(probes)
        low, median, high = np.percentile(log_probes, [16, 50, 84])
        spread = max((high - low) / 2, 1e-6)  # 0 only if most probes lie equally far
        for total, values in zip(totals, (_log(ours), log_probes), strict=True):
            total.append((values - median) / spread)
    return np.mean(totals[0], axis=0), np.mean(totals[1], axis=0)


def _log(distances: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(distances, np.float64), 1e-12))
