"""Which examples to remove: the paper's share of the highest ranks, or calibrated p-values from the probes."""

import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Float, Int

from badloss_jax.core.errors import UsageError


def benjamini_hochberg(p_values: Float[np.ndarray, "N"], q: float) -> Bool[np.ndarray, "N"]:
    """Rejects at false discovery rate q: all p <= the largest p_(i) <= q i / N (Benjamini and Hochberg, 1995).

    Args:
      p_values: [N], in [0, 1].
      q: the false discovery rate, in [0, 1].

    Returns:
      bool [N], which are rejected.

    Raises:
      UsageError: q or p-values that are not in [0, 1].

    Example:
      >>> import numpy as np
      >>> from badloss_jax import benjamini_hochberg
      >>> benjamini_hochberg(np.array([0.01, 0.04, 0.06, 0.9]), q=0.1).tolist()
      [True, True, True, False]
    """
    p_values = np.asarray(p_values, np.float64)
    if not 0 <= q <= 1:
        raise UsageError(f"q = {q}: expected 0 to 1")
    if np.isnan(p_values).any() or (len(p_values) and not (p_values.min() >= 0 and p_values.max() <= 1)):
        raise UsageError("p-values are not all in 0 to 1")

    ordered = np.sort(p_values)
    passing = np.flatnonzero(ordered <= q * np.arange(1, len(ordered) + 1) / max(1, len(ordered)))
    if not len(passing):
        return np.zeros(len(p_values), bool)
    return p_values <= ordered[passing[-1]]


def benjamini_hochberg_threshold(counts: Int[np.ndarray, "C"], q: float) -> int:
    """Applies Benjamini and Hochberg to p-values that are only counted, whatever their number.

    Args:
      counts: [P + 1], how many examples have the p-value (1 + c) / (P + 1), as `conformal_p_values` gives them.
      q: the false discovery rate, in 0 to 1.

    Returns:
      How many of the p-values, from the smallest, are rejected: all those below (1 + this) / (P + 1).
    """
    ranks = np.cumsum(counts)
    p_values = np.arange(1, len(counts) + 1) / len(counts)
    passing = np.flatnonzero((p_values <= q * ranks / max(1, int(ranks[-1]))) & (ranks > 0))
    if not len(passing):
        return 0
    return int(passing[-1]) + 1


def largest_threshold(chunks: Callable[[], Iterable[Float[np.ndarray, "M"]]], count: int) -> tuple[float, int]:
    """Finds the `count` largest of values that do not fit into memory, exactly and without sorting them.

    Selects by 16 bits at a time: the chunks are walked over twice in float32, four times in float64.

    Args:
      chunks: begins a new walk over all values, none of them NaN, all of one dtype.
      count: 0 to their number.

    Returns:
      threshold, ties: the values above the threshold are among the largest, and so are the first `ties` that equal it.
    """
    if not count:
        return math.inf, 0

    # The threshold's leading bits are known, and `left` of the values that begin with them are among the largest.
    prefix = 0
    done = 0
    left = count
    bits = 64  # of a value, until the first walk shows how many it has
    while done < bits:
        histogram = np.zeros(2**16, np.int64)
        for values in chunks():
            keys = _ordered(values)
            bits = 8 * keys.itemsize
            if done:
                keys = keys[keys >> keys.dtype.type(bits - done) == prefix]
            digits = keys >> keys.dtype.type(bits - done - 16) & keys.dtype.type(0xFFFF)
            histogram += np.bincount(digits.astype(np.int64), minlength=2**16)

        reached = np.cumsum(histogram[::-1])
        above = int(np.searchsorted(reached, left))  # digits that lie wholly above
        if above:
            left -= int(reached[above - 1])
        prefix = prefix << 16 | (2**16 - 1 - above)
        done += 16

    key = np.array(prefix, np.uint32 if bits == 32 else np.uint64)
    return float(_from_ordered(key)), left


def _ordered(values: np.ndarray) -> np.ndarray:
    """Returns unsigned integers in the order of the values."""
    values = np.ascontiguousarray(values + 0)  # -0.0 becomes 0.0
    bits: np.ndarray = values.view(np.uint32 if values.dtype == np.float32 else np.uint64)
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))

    # Of negative numbers all bits are turned, as the larger ones are the smaller; of others the sign alone.
    return np.where(values < 0, ~bits, bits | sign)


def _from_ordered(key: np.ndarray) -> np.ndarray:
    """Returns the value that `_ordered` makes a key of."""
    sign = key.dtype.type(1 << (8 * key.itemsize - 1))
    bits = key ^ sign if key & sign else ~key
    return np.asarray(bits, key.dtype).view(np.float32 if key.itemsize == 4 else np.float64)


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

    Returns:
      bool [N].

    Raises:
      UsageError: an unknown rule.

    Example:
      >>> import numpy as np
      >>> from badloss_jax import reject
      >>> distances = np.array([0.1, 3.0, 0.2, 2.0])
      >>> p_values = np.array([0.9, 0.01, 0.8, 0.05])
      >>> is_probe = np.array([False, False, True, False])
      >>> reject("fraction", 0.5, distances, p_values, is_probe).tolist()
      [False, True, False, True]
      >>> reject("alpha", 0.01, distances, p_values, is_probe).tolist()
      [False, True, False, False]
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
