"""What distances and impressions say: whether anything stands out, in which classes, how much, and what to remove."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from badloss_jax.scoring.calibration import (
    LEVELS,
    PoisonedShare,
    common_excess,
    conformal_p_values,
    no_poison_p_value,
    poisoned_share,
)
from badloss_jax.scoring.impressions import stranger_p_values
from badloss_jax.scoring.rejection import benjamini_hochberg, reject

SIGNS = ("lies far out", "looks like other classes")  # what may be said of an affected class
CERTAIN = 0.005  # a verdict on clean data errs this often by each sign
_HEAVIER = 2  # times as many again of a clean class may lie far out as of all: some have heavier tails
_NAMED = 0.1  # where something stands out, of the named classes about this share is clean, were they all alike
_SURELY = 0.05  # of all classes, one is so named though clean, before the others are compared with the rest
_VOUCHING = 10  # probes of a class without which what its images look like is no alarm
_NOISE = 0.7  # clean classes differ from each other as the calibration would by this share of the probes


@dataclass(frozen=True)
class Verdict:
    """What distances and impressions say.

    Attributes:
      p_values: [N], of all examples; those of probes mean nothing.
      removed: [N]; nothing, where nothing stands out.
      stands_out: whether anything does; see `judge`.
      share: of the examples that are no probes, how many look poisoned.
      no_poison: p-value of the hypothesis that nothing is poisoned, by the distances of all images.
      classes: of each class its share, such a p-value by all signs (not corrected for the number of classes), whether
        it is affected, and the signs of it.
    """

    p_values: Float[np.ndarray, "N"]
    removed: Bool[np.ndarray, "N"]
    stands_out: bool
    share: PoisonedShare
    no_poison: float
    classes: list[dict[str, Any]]


def judge(
    scores: Float[np.ndarray, "N"], probe_scores: Float[np.ndarray, "P"], labels: Int[np.ndarray, "N"],
    is_probe: Bool[np.ndarray, "N"], num_classes: int, rule: str, level: float,
    impressions: Sequence[Int[np.ndarray, "N"]] = (),
) -> Verdict:  # fmt: skip
    """Says whether anything stands out, in which classes, how much, and what to remove.

    Something stands out if more of all images lie far out than chance explains; if three times as many of a class do as
    of others, and more than chance explains; or if all impressions agree that a class with enough probes looks like
    others. On clean data whose classes are alike, each happens in at most 0.5 % of all scans.

    Then classes are named at a false discovery rate of 10 %, by the distances of their images, or by what these look
    like. Clean classes are not quite alike, so it is higher in truth. What classes have in common is put down to the
    calibration: at first what three quarters of them have, and then, beside those that are certain, the median of the
    rest. Where only classes stand out, only images of affected ones are removed.

    Args:
      scores: [N], higher is more suspicious, on a scale that classes share.
      probe_scores: [P], of the probes, leave-one-out.
      labels: int [N].
      is_probe: [N].
      num_classes: K.
      rule, level: of `badloss_jax.scoring.reject`.
      impressions: each int [N], what the examples look like (`first_seen_as`, `pixels_seen_as`).
    """
    count, others = len(probe_scores), ~is_probe
    p_values = conformal_p_values(scores, probe_scores)
    ours, theirs = p_values[others], labels[others]
    by_class = [ours[theirs == label] for label in range(num_classes)]

    def far_out(excess: Float[np.ndarray, "L"], probes: float) -> Float[np.ndarray, "K"]:
        return np.array([no_poison_p_value(chosen, count, excess, probes) if len(chosen) else 1.0
                         for chosen in by_class])  # fmt: skip

    no_poison, excess = no_poison_p_value(ours, count), common_excess(ours, theirs, count)
    looks = [found for seen in impressions
             if (found := stranger_p_values(labels, seen, is_probe, num_classes)).min() < 1]  # fmt: skip
    # Whether anything stands out: the whole, or a class by itself.
    affected = num_classes * far_out(excess + _HEAVIER * np.array(LEVELS), count) < CERTAIN
    probes_of = np.bincount(labels[is_probe], minlength=num_classes)
    if len(looks) > 1:
        affected |= (num_classes * np.max(looks, axis=0) < CERTAIN) & (probes_of >= _VOUCHING)
    stands_out, tests = no_poison < CERTAIN or bool(affected.any()), 1 + len(looks)
    # Which classes do: those that are certain, and then others beside the rest.
    by_sign = np.array([far_out(excess, _NOISE * count), np.min([np.ones(num_classes), *looks], axis=0)])
    if stands_out:
        affected |= num_classes * tests * by_sign.min(0) < _SURELY
        rest = np.isin(theirs, np.flatnonzero(~affected))
        if rest.any():
            excess = common_excess(ours[rest], theirs[rest], count, quantile=0.5)
            by_sign[0] = np.minimum(by_sign[0], far_out(excess, _NOISE * count))
            affected |= benjamini_hochberg(np.minimum(1.0, tests * by_sign.min(0)), _NAMED)
    nothing = PoisonedShare(0.0, 0.0, 0.0)
    classes = []
    for label, chosen in enumerate(by_class):
        told = by_sign[:, label] <= max(_SURELY, by_sign[:, label].min())
        classes.append({
            "images": int((labels == label).sum()), "probes": int(probes_of[label]),
            "share": asdict(poisoned_share(chosen, count) if len(chosen) else nothing),
            "no_poison_p_value": min(1.0, tests * float(by_sign[:, label].min())), "affected": bool(affected[label]),
            "signs": [sign for sign, seen in zip(SIGNS, told, strict=True) if affected[label] and seen],
        })  # fmt: skip
    removed = np.zeros(len(scores), bool)
    if stands_out:
        removed = reject(rule, level, scores, p_values, is_probe)
    if no_poison >= CERTAIN:  # nothing is known against the other classes
        removed &= np.isin(labels, np.flatnonzero(affected))
    return Verdict(p_values, removed, stands_out, poisoned_share(ours, count), no_poison, classes)
