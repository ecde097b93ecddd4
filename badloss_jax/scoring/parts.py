"""How many attacks a class holds: two that are learnt alike are found as one cluster, and one may be found in parts."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from badloss_jax.scoring.growth import gap_between, halves_of

_TWO = 4.5  # gap from which on two parts are two attacks; the best cut of one, or of a Gaussian, had at most 4.2
_MANY = 0.2  # sources of what can be cut: what comes from fewer may lie in several places and be one
_SMALLEST = 200  # examples that can be: of 100 points of a Gaussian the best cut had a gap of 4.6
_gap_between = jax.jit(gap_between)
_halves_of = jax.jit(halves_of, static_argnames="num_classes")

Points = Callable[[np.ndarray], Float[np.ndarray, "n D"]]
Ids = Int[np.ndarray, "M"]


def attacks_among(
    clusters: Sequence[Ids],
    points: Points,
    first: Int[np.ndarray, "N"],
    num_classes: int,
    seed: int,
) -> list[Ids]:
    """Divides what was found in one class anew, by attacks.

    What a classifier cannot tell apart is joined. What comes from many classes is cut in two, again and again, where
    the parts are well apart; of what comes from few, parts may be classes that one attacker took images from.

    Args:
      clusters: ids, ascending; no example is in two of them.
      points: reads standardised trajectories.
      first: int [N], the other class that an example looked like at first, or K if it looked like its own.
      num_classes: K.
      seed: of the search for a cut.

    Returns:
      Ids of each attack, ascending; all that were given.
    """
    # A cluster may join several that were taken for two before.
    waiting: list[Ids] = []
    for ids in clusters:
        same = [_gap(ids, other, points) < _TWO for other in waiting]
        joined = [other for other, is_same in zip(waiting, same, strict=True) if is_same]
        waiting = [other for other, is_same in zip(waiting, same, strict=True) if not is_same]
        waiting.append(np.sort(np.concatenate([ids, *joined])))

    # What is cut may hold a third attack, so both parts are looked at again.
    attacks = []
    while waiting:
        ids = waiting.pop()
        part, gap, sources = _cut(ids, points, first, num_classes, seed)
        if sources >= _MANY and gap >= _TWO:
            waiting += [ids[part], ids[~part]]
        else:
            attacks.append(ids)
    return attacks


def _gap(one: Ids, other: Ids, points: Points) -> float:
    """Returns the gap between two clusters."""
    values, real = _padded(np.concatenate([one, other]), points)
    members = (np.arange(len(real)) < len(one)).astype(np.float32)

    with jax.default_matmul_precision("highest"):
        return float(_gap_between(values, real, members))


def _cut(
    ids: Ids, points: Points, first: Int[np.ndarray, "N"], num_classes: int, seed: int
) -> tuple[Bool[np.ndarray, "M"], float, float]:
    """Returns which of the examples are in the one part, the gap to the other, and the sources of all."""
    if len(ids) < _SMALLEST:
        return np.ones(len(ids), bool), 0.0, 0.0

    values, real = _padded(ids, points)
    looks = np.zeros(len(real), np.int32)
    looks[: len(ids)] = first[ids]
    with jax.default_matmul_precision("highest"):
        halves = _halves_of(values, real, looks, np.array([seed], np.uint32), num_classes)

    scores, (gap, sources) = (np.asarray(array) for array in halves)
    return scores[: len(ids)] > 0, float(gap), float(sources)


def _padded(ids: Ids, points: Points) -> tuple[Float[np.ndarray, "n D"], Bool[np.ndarray, "n"]]:
    """Reads points, padded to a power of two, so that programs are few; returns which of them are real."""
    values = points(ids)
    size = 2 ** (len(ids) - 1).bit_length()
    return np.pad(values, ((0, size - len(ids)), (0, 0))), np.arange(size) < len(ids)
