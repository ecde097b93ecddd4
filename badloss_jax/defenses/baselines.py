"""What trajectories say without probes: the free baselines, for detection only.

The margin of an example at an epoch is the log-probability of its label less the largest of another class; it is
learned where that is above 0. Both are read from the trajectories of kind "ranked", or "logits", which must be there.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from badloss_jax.core.errors import UsageError
from badloss_jax.defenses.context import Context, Suspicion
from badloss_jax.trajectories.store import TrajectoryStore

_ROWS = 2**14


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


def margins_of(store: TrajectoryStore, labels: np.ndarray) -> Float[np.ndarray, "N T"]:
    """Reads the margins.

    Raises:
      UsageError: neither "ranked" nor "logits" was recorded.
    """
    if not {"ranked", "logits"} & store.layout.keys():
        raise UsageError("this baseline needs margins: put 'ranked' or 'logits' into recording.kinds")
    kind = "ranked" if "ranked" in store.layout else "logits"
    rows, parts = store.rows(kind), []
    for start in range(0, store.num_examples, _ROWS):
        values = rows[start : start + _ROWS].astype(np.float32)
        if kind == "ranked":
            parts.append(values[:, :, 0] - values[:, :, 1])
            continue
        own = np.arange(values.shape[2]) == labels[start : start + _ROWS, None, None]
        parts.append(np.where(own, values, -np.inf).max(2) - np.where(own, -np.inf, values).max(2))
    return np.concatenate(parts)


def of_losses(statistic: Callable[[np.ndarray], np.ndarray], sign: int = 1) -> Callable[..., Suspicion]:
    """Returns a statistic of the losses as a defence; `sign` -1 finds small values suspicious."""

    def defend(context: Context, settings: Mapping[str, Any]) -> Suspicion:
        return Suspicion(sign * statistic(context.trajectories().read("loss")))

    return defend


def of_margins(statistic: Callable[[np.ndarray], np.ndarray], sign: int = 1) -> Callable[..., Suspicion]:
    """Returns a statistic of the margins as a defence; `sign` -1 finds small values suspicious."""

    def defend(context: Context, settings: Mapping[str, Any]) -> Suspicion:
        return Suspicion(sign * statistic(margins_of(context.trajectories(), context.labels)))

    return defend
