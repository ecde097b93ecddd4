"""Which examples to remove: the paper's share of the highest ranks, or calibrated p-values from the probes."""

import math

import numpy as np
from jaxtyping import Bool, Float

from badloss_jax.errors import UsageError


def conformal_p_values(
    distances: Float[np.ndarray, "N"], probe_distances: Float[np.ndarray, "P"]
) -> Float[np.ndarray, "N"]:
    """Computes p(x) = (1 + #{probes at a distance >= that of x}) / (P + 1), float64 in [1 / (P + 1), 1].

    `probe_distances` are the probes' leave-one-out distances. They are nearly exchangeable with clean examples' (a
    probe sees P - 1 references, an example P), so a clean example has p <= alpha with probability about alpha.

    Raises:
      UsageError: no probes, or NaN.
    """
    ours, probes = np.asarray(distances, np.float64), np.sort(np.asarray(probe_distances, np.float64))
    if ours.ndim != 1 or probes.ndim != 1 or not len(probes):
        raise UsageError(f"distances are {ours.shape} and probe distances {probes.shape}: expected [N] and [P], P >= 1")
    if np.isnan(ours).any() or np.isnan(probes).any():
        raise UsageError("distances or probe distances contain NaN")
    at_least = len(probes) - np.searchsorted(probes, ours, side="left")
    return (1 + at_least) / (len(probes) + 1)


def benjamini_hochberg(p_values: Float[np.ndarray, "N"], q: float) -> Bool[np.ndarray, "N"]:
    """Rejects at false discovery rate q: all p <= the largest p_(i) <= q i / N (Benjamini and Hochberg, 1995)."""
    p_values = np.asarray(p_values, np.float64)
    if not 0 <= q <= 1:
        raise UsageError(f"q = {q}: expected 0 to 1")
    if np.isnan(p_values).any() or (len(p_values) and not (p_values.min() >= 0 and p_values.max() <= 1)):
        raise UsageError("p-values are not all in 0 to 1")
    ordered = np.sort(p_values)
    passing = np.flatnonzero(ordered <= q * np.arange(1, len(ordered) + 1) / max(1, len(ordered)))
    return p_values <= ordered[passing[-1]] if len(passing) else np.zeros(len(p_values), bool)


def reject(
    rule: str,
    level: float,
    distances: Float[np.ndarray, "N"],
    p_values: Float[np.ndarray, "N"],
    is_probe: Bool[np.ndarray, "N"],
) -> Bool[np.ndarray, "N"]:
    """Says which examples to remove; probes always stay.

    Args:
      rule: "fraction" removes floor(level N) examples of the largest distance, ties by id; "alpha" removes p <= level;
        "fdr" is Benjamini-Hochberg at `level` over the examples that are no probes.
      level: in [0, 1).
      distances: [N], any increasing function of the anomaly.
      p_values: [N].
      is_probe: [N].

    Raises:
      UsageError: an unknown rule.
    """
    removed = np.zeros(len(distances), bool)
    if rule == "fraction":
        order = np.argsort(-np.asarray(distances, np.float64), kind="stable")
        order = order[~is_probe[order]]
        removed[order[: math.floor(level * len(distances))]] = True
    elif rule == "alpha":
        removed = ~is_probe & (p_values <= level)
    elif rule == "fdr":
        removed[~is_probe] = benjamini_hochberg(p_values[~is_probe], level)
    else:
        raise UsageError(f"unknown rejection rule {rule!r}: expected fraction, alpha or fdr")
    return removed
