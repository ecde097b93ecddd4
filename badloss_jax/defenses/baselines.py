"""What trajectories say without probes: the free baselines, for detection only.

The margin of an example at an epoch is the log-probability of its label less the largest of another class; it is
learned where that is above 0. Both are read from the trajectories of kind "ranked", or "logits", which must be there.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from badloss_jax.core.errors import UsageError
from badloss_jax.defenses.context import Context, Suspicion
from badloss_jax.trajectories.store import TrajectoryStore

_ROWS = 2**14  # examples that are read at once


def mean_loss(losses: Float[np.ndarray, "N T"]) -> Float[np.ndarray, "N"]:
    """Averages the losses over the epochs."""
    return losses.mean(1, dtype=np.float64)


def loss_variance(losses: Float[np.ndarray, "N T"]) -> Float[np.ndarray, "N"]:
    """Computes the variance (of the population) of each example's losses over the epochs."""
    return losses.var(1, dtype=np.float64)


def forgetting_events(margins: Float[np.ndarray, "N T"]) -> Float[np.ndarray, "N"]:
    """Counts the epochs at which an example is wrong after one at which it was right (Toneva et al., ICLR 2019).

    One that is never right has been forgotten more often than any other: T times.
    """
    right = margins > 0
    events = (right[:, :-1] & ~right[:, 1:]).sum(1)

    return np.where(right.any(1), events, margins.shape[1]).astype(np.float64)


def area_under_margin(margins: Float[np.ndarray, "N T"]) -> Float[np.ndarray, "N"]:
    """Averages the margins over the epochs (Pleiss et al., NeurIPS 2020); low for mislabelled examples."""
    return margins.mean(1, dtype=np.float64)


def first_learned_epoch(margins: Float[np.ndarray, "N T"]) -> Float[np.ndarray, "N"]:
    """Returns the first epoch, from 0, at which an example is right, T if it never is."""
    right = margins > 0
    return np.where(right.any(1), right.argmax(1), margins.shape[1]).astype(np.float64)


def margins_of(store: TrajectoryStore, labels: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N T"]:
    """Reads the margins, from "ranked" if both kinds are there.

    Args:
      store: of all examples.
      labels: as trained on; only "logits" needs them.

    Returns:
      float32, in nats.

    Raises:
      UsageError: neither "ranked" nor "logits" was recorded.
    """
    if "ranked" in store.layout:
        kind = "ranked"
    elif "logits" in store.layout:
        kind = "logits"
    else:
        raise UsageError("this baseline needs margins: put 'ranked' or 'logits' into recording.kinds")

    # The trajectories are several times the margins, and may be larger than memory.
    rows = store.rows(kind)
    parts = []
    for start in range(0, store.num_examples, _ROWS):
        values = rows[start : start + _ROWS].astype(np.float32)
        if kind == "ranked":
            parts.append(_ranked_margins(values))
        else:
            parts.append(_logit_margins(values, labels[start : start + _ROWS]))
    return np.concatenate(parts)


def _ranked_margins(ranked: Float[np.ndarray, "M T 1+m"]) -> Float[np.ndarray, "M T"]:
    """Subtracts the largest of the other classes' log-probabilities, the second column, from the label's, the first."""
    return ranked[:, :, 0] - ranked[:, :, 1]


def _logit_margins(logits: Float[np.ndarray, "M T K"], labels: Int[np.ndarray, "M"]) -> Float[np.ndarray, "M T"]:
    """Subtracts the largest of the other classes' logits from the label's: what normalises them cancels."""
    is_label = np.arange(logits.shape[2]) == labels[:, None, None]
    of_label = np.where(is_label, logits, -np.inf).max(2)
    largest_other = np.where(is_label, -np.inf, logits).max(2)
    return of_label - largest_other


def of_losses(
    statistic: Callable[[Float[np.ndarray, "N T"]], Float[np.ndarray, "N"]], sign: int = 1
) -> Callable[[Context, Mapping[str, Any]], Suspicion]:
    """Returns a statistic of the recorded losses as a defence.

    Args:
      statistic: of each example's losses over the epochs, in nats.
      sign: 1 finds large values suspicious, -1 small ones.
    """

    def defend(context: Context, settings: Mapping[str, Any]) -> Suspicion:
        losses = context.trajectories().read("loss")
        return Suspicion(sign * statistic(losses))

    return defend


def of_margins(
    statistic: Callable[[Float[np.ndarray, "N T"]], Float[np.ndarray, "N"]], sign: int = 1
) -> Callable[[Context, Mapping[str, Any]], Suspicion]:
    """Returns a statistic of the recorded margins as a defence.

    Args:
      statistic: of each example's margins over the epochs, in nats.
      sign: 1 finds large values suspicious, -1 small ones.
    """

    def defend(context: Context, settings: Mapping[str, Any]) -> Suspicion:
        margins = margins_of(context.trajectories(), context.labels)
        return Suspicion(sign * statistic(margins))

    return defend
