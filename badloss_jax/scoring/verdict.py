"""What all distances together say: whether anything stands out, in which classes, how much, and what to remove."""

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
from badloss_jax.scoring.rejection import reject

CERTAIN = 0.005  # a verdict on clean data errs this often, overall, and as often by some class
_HEAVIER = 2  # times as many again of a clean class may lie far out as of all: some have heavier tails
_NAMED = 0.05  # where something stands out overall, a class is named wrongly so often


@dataclass(frozen=True)
class Verdict:
    """What the distances say.

    Attributes:
      p_values: [N], of all examples; those of probes mean nothing.
      removed: [N]; nothing, where nothing stands out.
      stands_out: whether more lies far out than in clean data.
      share: of the examples that are no probes, how many look poisoned.
      no_poison: p-value of the hypothesis that nothing is poisoned.
      classes: of each class its share, that p-value (times K), and whether it is affected.
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
    seen_as: Int[np.ndarray, "N"] | None = None,
) -> Verdict:  # fmt: skip
    """Says whether anything stands out, in which classes, how much, and what to remove.

    On clean data whose classes are alike, something stands out in at most 1 % of all scans; a class alone makes it so
    only if three times as many of its images lie far out as should, and more than chance explains. Once it does for all
    images together, classes are named by the distances of their images, or by what these looked like at first; what
    they have in common with three quarters of the classes is put down to the calibration.

    Args:
      scores: [N], higher is more suspicious, on a scale that classes share.
      probe_scores: [P], of the probes, leave-one-out.
      labels: int [N].
      is_probe: [N].
      num_classes: K.
      rule, level: of `badloss_jax.scoring.reject`.
      seen_as: int [N], what each example looked like at first (`first_seen_as`), if it is known.
    """
    count, others = len(probe_scores), ~is_probe
    p_values = conformal_p_values(scores, probe_scores)
    no_poison = no_poison_p_value(p_values[others], count)
    excess = common_excess(p_values[others], labels[others], count)
    classes, level_of_class, strange = [], CERTAIN, np.ones(num_classes)
    if no_poison >= CERTAIN:  # a class alone has to convince
        excess += _HEAVIER * np.array(LEVELS)
    else:
        level_of_class = _NAMED
        if seen_as is not None:
            strange = stranger_p_values(labels, seen_as, is_probe, num_classes)
    for label in range(num_classes):
        chosen = p_values[others & (labels == label)]
        if len(chosen):
            certain = no_poison_p_value(chosen, count, excess)
            if seen_as is not None and no_poison < CERTAIN:
                certain = 2 * min(certain, float(strange[label]))
            certain = min(1.0, num_classes * certain)
            share = poisoned_share(chosen, count)
        else:
            certain, share = 1.0, PoisonedShare(0.0, 0.0, 0.0)
        classes.append({"images": int((labels == label).sum()), "probes": int(is_probe[labels == label].sum()),
                        "share": asdict(share), "no_poison_p_value": certain,
                        "affected": certain < level_of_class})  # fmt: skip
    stands_out = no_poison < CERTAIN or any(entry["affected"] for entry in classes)
    removed = np.zeros(len(scores), bool)
    if stands_out:
        removed = reject(rule, level, scores, p_values, is_probe)
    share = poisoned_share(p_values[others], count)
    return Verdict(p_values, removed, stands_out, share, no_poison, classes)
