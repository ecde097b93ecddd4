"""Defences behind one signature: `(context, settings) -> Suspicion | Cleansed`; see `context`.

A new one is a function in a file of its own, one line in `DEFENSES`, and its settings in `config.defenses`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from badloss_jax.defenses import baselines
from badloss_jax.defenses.badloss import badloss
from badloss_jax.defenses.context import Cleansed, Context, Suspicion


@dataclass(frozen=True)
class Defense:
    """A defence and what has to be known of it before it runs.

    Attributes:
      run: does the work.
      own_rule: whether it says itself what to remove.
      cleanses: whether it trains a clean network itself, in place of a removal.
      trainings: how many networks it trains.
      recorded: whether all it needs are the recorded trajectories, so that it costs nothing more.
    """

    run: Callable[[Context, Mapping[str, Any]], Suspicion | Cleansed]
    own_rule: bool = False
    cleanses: bool = False
    trainings: int = 0
    recorded: bool = False


DEFENSES: dict[str, Defense] = {
    "badloss": Defense(badloss("loss"), recorded=True),
    "badloss_step": Defense(badloss("step"), recorded=True),
    "badloss_logits": Defense(badloss("logits"), recorded=True),
    "badloss_ranked": Defense(badloss("ranked"), recorded=True),
    "badloss_features": Defense(badloss("features"), recorded=True),
    "badloss_combined": Defense(badloss("combined"), recorded=True),
    "mean_loss_low": Defense(baselines.of_losses(baselines.mean_loss, -1), recorded=True),
    "mean_loss_high": Defense(baselines.of_losses(baselines.mean_loss), recorded=True),
    "loss_variance": Defense(baselines.of_losses(baselines.loss_variance), recorded=True),
    "forgetting_events": Defense(baselines.of_margins(baselines.forgetting_events), recorded=True),
    "area_under_margin": Defense(baselines.of_margins(baselines.area_under_margin, -1), recorded=True),
    "first_learned_epoch": Defense(baselines.of_margins(baselines.first_learned_epoch, -1), recorded=True),
}

__all__ = ["DEFENSES", "Cleansed", "Context", "Defense", "Suspicion"]
