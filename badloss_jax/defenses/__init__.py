"""Defences behind one signature: `(context, settings) -> Suspicion | Cleansed`; see `context`.

A new one is a function in a file of its own, one line in `DEFENSES`, and its settings in `config.defenses`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from badloss_jax.defenses import baselines
from badloss_jax.defenses.abl import abl
from badloss_jax.defenses.activation_clustering import activation_clustering
from badloss_jax.defenses.badloss import badloss
from badloss_jax.defenses.cbd import cbd
from badloss_jax.defenses.cognitive_distillation import cognitive_distillation
from badloss_jax.defenses.context import Cleansed, Context, Suspicion
from badloss_jax.defenses.frequency_analysis import frequency_analysis
from badloss_jax.defenses.neural_cleanse import neural_cleanse
from badloss_jax.defenses.pss import pss
from badloss_jax.defenses.spectral_signatures import spectral_signatures


@dataclass(frozen=True)
class Defense:
    """A defence and what has to be known of it before it runs.

    Attributes:
      run: does the work.
      own_rule: whether it says itself what to remove.
      cleanses: whether it trains a clean network itself, in place of a removal.
      trainings: how many networks it trains.
      recorded: whether all it needs are the recorded trajectories, so that it costs nothing more.
      margins: whether it needs margins, which those of kind "ranked" or "logits" give.
    """

    run: Callable[[Context, Mapping[str, Any]], Suspicion | Cleansed]
    own_rule: bool = False
    cleanses: bool = False
    trainings: int = 0
    recorded: bool = False
    margins: bool = False


DEFENSES: dict[str, Defense] = {
    "badloss": Defense(badloss("loss"), recorded=True),
    "badloss_step": Defense(badloss("step"), recorded=True),
    "badloss_prob": Defense(badloss("prob"), recorded=True),
    "badloss_logits": Defense(badloss("logits"), recorded=True),
    "badloss_ranked": Defense(badloss("ranked"), recorded=True),
    "badloss_features": Defense(badloss("features"), recorded=True),
    "badloss_combined": Defense(badloss("combined"), recorded=True),
    "mean_loss_low": Defense(baselines.of_losses(baselines.mean_loss, -1), recorded=True),
    "mean_loss_high": Defense(baselines.of_losses(baselines.mean_loss), recorded=True),
    "loss_variance": Defense(baselines.of_losses(baselines.loss_variance), recorded=True),
    "forgetting_events": Defense(baselines.of_margins(baselines.forgetting_events), recorded=True, margins=True),
    "area_under_margin": Defense(baselines.of_margins(baselines.area_under_margin, -1), recorded=True, margins=True),
    "first_learned_epoch": Defense(
        baselines.of_margins(baselines.first_learned_epoch, -1), recorded=True, margins=True
    ),
    "abl": Defense(abl, own_rule=True, trainings=1),
    "cbd": Defense(cbd, cleanses=True, trainings=2),
    "pss": Defense(pss, cleanses=True, trainings=41),
    "neural_cleanse": Defense(neural_cleanse, own_rule=True),
    "cognitive_distillation": Defense(cognitive_distillation, own_rule=True),
    "activation_clustering": Defense(activation_clustering, own_rule=True),
    "spectral_signatures": Defense(spectral_signatures, own_rule=True),
    "frequency_analysis": Defense(frequency_analysis, own_rule=True, trainings=1),
}

__all__ = ["DEFENSES", "Cleansed", "Context", "Defense", "Suspicion"]
