"""Which epochs count, and what becomes of a distance (BaDLoss, section 4)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, Int

from badloss_jax.errors import UsageError
from badloss_jax.scoring.calibration import standardised_by_class
from badloss_jax.scoring.distances import Rows, knn_distances, leave_one_out_distances, row_chunks
from badloss_jax.training.mesh import process_blocks


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


def anomaly_scores(
    distances: Float[np.ndarray, "N"],
    eps: float = 0.01,
    transform: str = "log",
    between: tuple[float, float] | None = None,
) -> Float[np.ndarray, "N"]:
    """Turns distances into scores in [0, 1] for display: log(eps + distance), shifted and scaled ("linear": no log).

    Ranks are those of the distances. Thresholds are made from distances, never from scores that were scaled set by set.
    `between` are the smallest and the largest distance, where these are but a part of all.
    """
    if transform not in ("log", "linear"):
        raise UsageError(f"unknown transform {transform!r}: expected log or linear")
    values = np.asarray(distances, np.float64)
    low, high = between or (values.min(), values.max())
    if transform == "log":
        if low + eps <= 0:
            raise UsageError(f"distances go down to {low}: expected more than -eps = {-eps}")
        values, low, high = np.log(eps + values), np.log(eps + low), np.log(eps + high)
    return (values - low) / ((high - low) or 1.0)


def mean_standardised(
    distances: Sequence[Float[np.ndarray, "N"]], probe_distances: Sequence[Float[np.ndarray, "P"]]
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "P"]]:
    """Combines kinds of trajectory: the mean of z = (log distance - median) / spread.

    Median and spread (half the distance from the 16th to the 84th percentile) are those of the probes' leave-one-out
    log distances of the same kind. Returns z of the examples, float64 [N], and of the probes, [P].
    """
    totals: tuple[list, list] = ([], [])
    for ours, probes in zip(distances, probe_distances, strict=True):
        log_probes = log_distances(probes)
        low, median, high = np.percentile(log_probes, [16, 50, 84])
        spread = max((high - low) / 2, 1e-6)  # 0 only if most probes lie equally far
        for total, values in zip(totals, (log_distances(ours), log_probes), strict=True):
            total.append((values - median) / spread)
    return np.mean(totals[0], axis=0), np.mean(totals[1], axis=0)


def distances_by_kind(
    rows_of: Callable[[str], Rows], probe_ids: Int[np.ndarray, "P"], scoring: Mapping[str, Any], kinds: Sequence[str],
    mesh: Mesh | None = None,
) -> dict[str, tuple[Float[np.ndarray, "N"], Float[np.ndarray, "P"]]]:  # fmt: skip
    """Measures by each of the kinds how far every example is from the probes, and each probe from the others.

    Args:
      rows_of: kind -> its trajectories, of the epochs that count.
      probe_ids: int [P].
      scoring: kind -> {"k": probes in the mean distance}, as `config.scoring`; 0 for "combined" takes its parts' own.
      kinds: of trajectories; "combined" is the mean standardised log distance of features and ranked.
      mesh: the devices that share the rows, by default one.

    Returns:
      kind -> distances [N], and leave-one-out distances of the probes [P]; each kind is measured once.
    """
    measured: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def distances_of(kind: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        if (kind, k) not in measured:
            trajectories = rows_of(kind)
            probes = trajectories[probe_ids]
            measured[kind, k] = knn_distances(trajectories, probes, k, mesh), leave_one_out_distances(probes, k)
        return measured[kind, k]

    found = {}
    for kind in kinds:
        k = scoring[kind]["k"]
        if kind == "combined":
            parts = [distances_of(part, k or scoring[part]["k"]) for part in ("features", "ranked")]
            found[kind] = mean_standardised([part[0] for part in parts], [part[1] for part in parts])
        else:
            found[kind] = distances_of(kind, k)
    return found


def scores_by_class(
    kind: str, distances: Float[np.ndarray, "N"], probe_distances: Float[np.ndarray, "P"], labels: Int[np.ndarray, "N"],
    probe_ids: Int[np.ndarray, "P"],
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "P"]]:  # fmt: skip
    """Puts what `distances_by_kind` measured on the scale of each class's probes (`standardised_by_class`).

    Returns scores of the examples, float64 [N], and of the probes, [P].
    """
    if kind != "combined":  # that is a logarithm already
        distances, probe_distances = log_distances(distances), log_distances(probe_distances)
    scores = np.array(distances, np.float64)
    scores[probe_ids] = probe_distances  # a probe's distance to itself would count in its class's median
    return standardised_by_class(scores, labels, probe_distances, labels[probe_ids])


def log_distances(distances: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Returns the logarithms, float64, with 1e-12 in place of less."""
    return np.log(np.maximum(np.asarray(distances, np.float64), 1e-12))
