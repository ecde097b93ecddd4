"""Neural Cleanse (Wang et al., IEEE S&P 2019, sections IV and VI): a trigger is a short cut from any class to another.

For each class, the smallest mask and the pattern in it are optimised that flip the probes to that class. Classes whose
mask is an outlier among the classes' (anomaly index of at least 2) and small are attacked. Examples are scored by the
penultimate units that the pattern raises most.

Unlike the paper, which filters or patches at test time, examples are removed, as in BaDLoss' comparison. Unlike the
program of that comparison, which optimises on the poisoned training set, only the probes are looked at, an epoch is
`steps` batches of them, whatever their number, the paper's tanh parameters and Adam (betas 0.5, 0.9) are used, and the
mask that is kept is the smallest that flipped enough probes, not the last. Both double or halve the penalty each epoch.

Where several classes are attacked, each class's scores are shifted to its threshold and divided by their deviation over
the probes, and the largest counts: above 0 an example is removed, as the union of the classes' removals. Where none is,
the class of the smallest mask gives the scores, and nothing is removed.

The search itself is in `trigger_search`; here is what is made of the masks it ends with.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from badloss_jax.defenses.context import Context, Suspicion
from badloss_jax.defenses.trigger_search import reverse_engineer

_CONSISTENT = 1.4826  # the deviation of a normal distribution, in median absolute deviations
_TINY = 1e-9


def anomaly_indices(norms: Float[np.ndarray, "K"]) -> Float[np.ndarray, "K"]:
    """Computes |norm - median| / (1.4826 * median absolute deviation) (section IV-B), finite and at least 0."""
    deviations = np.abs(norms - np.median(norms))
    return deviations / max(_CONSISTENT * np.median(deviations), _TINY)


def attacked_classes(norms: Float[np.ndarray, "K"], anomaly: float) -> Int[np.ndarray, "A"]:
    """Returns the classes whose mask is an outlier and small, ascending.

    Args:
      norms: L1 norms of the masks, in pixels; small are those below the median.
      anomaly: the anomaly index that an outlier has at least.
    """
    is_outlier = anomaly_indices(norms) >= anomaly
    is_small = norms < np.median(norms)
    return np.flatnonzero(is_outlier & is_small)


def most_raised(raised: Float[np.ndarray, "F"], share: float) -> Int[np.ndarray, "U"]:
    """Returns the floor(share F) units, at least one, that are raised most.

    Args:
      raised: by how much the pattern raises each unit's mean activation.
      share: of the units, 0 to 1.
    """
    count = max(1, math.floor(share * len(raised)))
    return np.argsort(-raised, kind="stable")[:count]


def probe_threshold(of_probes: Float[np.ndarray, "P"], share: float) -> float:
    """Returns the smallest of the probes' scores that at most floor(share P) of them exceed.

    Args:
      of_probes: their scores.
      share: of the probes that may lie above, at least 0 and below 1.
    """
    descending = np.sort(of_probes)[::-1]
    return float(descending[math.floor(share * len(of_probes))])


def excess(
    activations: Float[np.ndarray, "A N"], probe_ids: Int[np.ndarray, "P"], share: float
) -> Float[np.ndarray, "N"]:
    """Combines the classes' scores: the largest excess over a class's threshold, in deviations of its probes' scores.

    Args:
      activations: [A, N], of each attacked class's units, by example.
      probe_ids: int [P].
      share: of the probes that the thresholds may cost, all classes together.
    """
    share_of_class = share / len(activations)
    parts = []
    for scores in activations.astype(np.float64):
        of_probes = scores[probe_ids]
        threshold = probe_threshold(of_probes, share_of_class)
        parts.append((scores - threshold) / max(of_probes.std(), _TINY))
    return np.max(parts, axis=0)


def neural_cleanse(context: Context, settings: Mapping[str, Any]) -> Suspicion:
    """Removes examples that the reverse-engineered triggers' units find suspicious, if a class is attacked at all.

    Args:
      context: what every defence is given.
      settings: `config.defenses.neural_cleanse`.

    Returns:
      Scores: the mean activation of the units that an attacked class's pattern raises most, less the threshold, in
      deviations over the probes; details: the attacked classes, and masks' norms (pixels), anomaly indices and shares
      of the probes flipped, by class.
    """
    features = context.observed().features
    probe_ids = context.probe_ids
    triggers = reverse_engineer(context, context.images(probe_ids), context.attacked(), settings)

    attacked = attacked_classes(triggers.norms, settings["anomaly"])
    # Where none is attacked, the smallest mask gives the scores all the same.
    scored = attacked
    if not len(attacked):
        scored = np.array([triggers.norms.argmin()])

    raised = triggers.features[scored] - features[probe_ids].mean(0)
    units = [most_raised(of_class, settings["unit_share"]) for of_class in raised]
    activations = np.stack([features[:, chosen].mean(1) for chosen in units])
    scores = excess(activations, probe_ids, settings["probe_share"])

    # Without an attacked class, what lies above the threshold does so by chance.
    removed = scores > 0
    if not len(attacked):
        removed = np.zeros(len(scores), bool)

    details = {
        "attacked": attacked.tolist(),
        "mask_norms": triggers.norms.tolist(),
        "anomaly_indices": anomaly_indices(triggers.norms).tolist(),
        "flipped": triggers.flipped.tolist(),
    }
    return Suspicion(scores, removed=removed, details=details)
