"""Defences behind one signature: `(context, settings) -> Suspicion | Cleansed`.

Each says how suspicious every training example is, or trains a clean network itself. Begin to read with `context`, what
every defence is given and gives back, then `badloss`; `abl` is the shortest of the others.

A new one is a function in a file of its own, one line in `DEFENSES`, and its settings in `config.defenses`; README.md
shows one. Defences may import everything up to `scoring`; `config` and all that runs them stand later in the line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from badloss_jax.defenses import baselines
from badloss_jax.defenses.abl import abl
from badloss_jax.defenses.activation_clustering import activation_clustering
from badloss_jax.defenses.badloss import badloss
from badloss_jax.defenses.cbd import cbd
from badloss_jax.defenses.cognitive_distillation import cognitive_distillation
from badloss_jax.defenses.context import OWN, Cleansed, Context, Suspicion
from badloss_jax.defenses.frequency_analysis import frequency_analysis
from badloss_jax.defenses.neural_cleanse import neural_cleanse
from badloss_jax.defenses.pss import pss, trainings_of_pss
from badloss_jax.defenses.spectral_signatures import spectral_signatures


@dataclass(frozen=True)
class Defense:
    """A defence and what has to be known of it before it runs.

    Attributes:
      run: does the work.
      own_rule: whether it says itself what to remove.
      cleanses: whether it trains a clean network itself, in place of a removal.
      trainings: its settings -> how many trainings it asks for.
      attacked: whether it looks at the undefended network.
      recorded: whether all it needs are the recorded trajectories, so that it costs nothing more.
      margins: whether it needs margins, which those of kind "ranked" or "logits" give.
      kind: of trajectory that it scores by, if it is BaDLoss.
    """

    run: Callable[[Context, Mapping[str, Any]], Suspicion | Cleansed]
    own_rule: bool = False
    cleanses: bool = False
    trainings: Callable[[Mapping[str, Any]], int] = lambda settings: 0
    attacked: bool = False
    recorded: bool = False
    margins: bool = False
    kind: str = ""

    def rules(self, asked: Sequence[str]) -> list[str]:
        """Returns those of `config.rejection.rules` that it can be asked for, after its own."""
        if self.cleanses:
            return []

        rules = []
        if self.own_rule:
            rules.append(OWN)

        # Only BaDLoss knows who is in the attacks that the rule "clusters" asks for.
        rules += [rule for rule in asked if rule != "clusters" or self.kind]
        return rules


def _badloss(kind: str) -> Defense:
    """Returns BaDLoss by one kind of trajectory."""
    return Defense(badloss(kind), recorded=True, kind=kind)


def _of_losses(statistic: Callable[[np.ndarray], np.ndarray], sign: int = 1) -> Defense:
    """Returns a baseline that reads the recorded losses."""
    return Defense(baselines.of_losses(statistic, sign), recorded=True)


def _of_margins(statistic: Callable[[np.ndarray], np.ndarray], sign: int = 1) -> Defense:
    """Returns a baseline that reads the recorded margins."""
    return Defense(baselines.of_margins(statistic, sign), recorded=True, margins=True)


def _always(count: int) -> Callable[[Mapping[str, Any]], int]:
    """Returns a number of trainings that no setting changes."""
    return lambda settings: count


DEFENSES: dict[str, Defense] = {
    "badloss": _badloss("loss"),
    "badloss_step": _badloss("step"),
    "badloss_prob": _badloss("prob"),
    "badloss_logits": _badloss("logits"),
    "badloss_ranked": _badloss("ranked"),
    "badloss_features": _badloss("features"),
    "badloss_combined": _badloss("combined"),
    # What recorded trajectories say without probes.
    "mean_loss_low": _of_losses(baselines.mean_loss, sign=-1),
    "mean_loss_high": _of_losses(baselines.mean_loss),
    "loss_variance": _of_losses(baselines.loss_variance),
    "forgetting_events": _of_margins(baselines.forgetting_events),
    "area_under_margin": _of_margins(baselines.area_under_margin, sign=-1),
    "first_learned_epoch": _of_margins(baselines.first_learned_epoch, sign=-1),
    # What asks for networks of its own, or for the attacked one.
    "abl": Defense(abl, own_rule=True, trainings=_always(1)),
    "cbd": Defense(cbd, cleanses=True, trainings=_always(2)),
    "pss": Defense(pss, cleanses=True, trainings=trainings_of_pss, attacked=True),
    "neural_cleanse": Defense(neural_cleanse, own_rule=True, attacked=True),
    "cognitive_distillation": Defense(cognitive_distillation, own_rule=True, attacked=True),
    "activation_clustering": Defense(activation_clustering, own_rule=True, attacked=True),
    "spectral_signatures": Defense(spectral_signatures, own_rule=True, attacked=True),
    "frequency_analysis": Defense(frequency_analysis, own_rule=True, trainings=_always(1)),
}

__all__ = ["DEFENSES", "Cleansed", "Context", "Defense", "Suspicion"]
