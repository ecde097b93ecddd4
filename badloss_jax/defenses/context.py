"""What every defence is given, and what it gives back.

A defence is a function `(context, settings) -> Suspicion | Cleansed`. It sees the training set as its victim does and
knows the probes; nothing in the context says who is poisoned. What several defences need, such as the attacked model,
is made when it is first asked for and kept.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from badloss_jax.core.progress import Progress
from badloss_jax.models import ModelSpec
from badloss_jax.scoring import conformal_p_values, reject, unsupported
from badloss_jax.settings import parse_rule
from badloss_jax.training.batch import Examples
from badloss_jax.training.loop import Recipe
from badloss_jax.training.passes import make_look, map_examples
from badloss_jax.training.state import TrainState
from badloss_jax.trajectories.store import TrajectoryStore

OWN = "own"  # the rule that a defence brings along


@dataclass(frozen=True)
class Suspicion:
    """How suspicious a defence finds each example.

    Attributes:
      scores: [N], finite, higher is more suspicious.
      probe_scores: [P], what clean examples score, to calibrate p-values; None takes the probes' own of `scores`.
      removed: [N], what the defence removes by its own rule; None if it has none.
      details: what else it found, as JSON can say it.
      members: finds the examples [N] that are in attacks, for the rule "clusters"; None if it cannot.
    """

    scores: Float[np.ndarray, "N"]
    probe_scores: Float[np.ndarray, "P"] | None = None
    removed: Bool[np.ndarray, "N"] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    members: Callable[[], Bool[np.ndarray, "N"]] | None = None


@dataclass(frozen=True)
class Cleansed:
    """A network that a defence trained itself, in place of a removal and retraining."""

    state: TrainState
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Detection:
    """What one defence, or one kind of trajectory, says of every example.

    Attributes:
      distances: [N], higher is more suspicious: of BaDLoss, to the nearest probes; for "combined" the mean standardised
        log distance; of others, their own score.
      p_values: [N], conformal, from the probes: of BaDLoss their leave-one-out distances.
      removed: rule, as in `config.rejection.rules`, or "own" -> [N], the examples that it removes.
      details: what else the defence found.
    """

    distances: Float[np.ndarray, "N"]
    p_values: Float[np.ndarray, "N"]
    removed: Mapping[str, Bool[np.ndarray, "N"]]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Observed:
    """What the attacked network says of the training set, in evaluation mode.

    Attributes:
      logits: float32 [N, K].
      features: float32 [N, F], the penultimate layer's.
    """

    logits: Float[np.ndarray, "N K"]
    features: Float[np.ndarray, "N F"]


@dataclass
class Context:
    """The training set as the victim sees it, the probes, and what is made of them on demand.

    Attributes:
      data: the training set on the devices, or on its way to them.
      labels: int32 [N], as trained on.
      probe_ids: int64 [P], ascending.
      num_classes: K.
      spec: the network that is attacked.
      recipe: how it is trained.
      scoring: `config.scoring`.
      seed: of all that a defence draws; use `seeding.generator(context.seed, NAME, ...)`.
      batch_size: of passes that do not train.
      mesh: the devices.
      progress: is told of long work.
      trajectories: returns the recorded trajectories.
      attacked: returns the network trained on everything; the state may be used up (donated) by the caller.
      observed: returns what that network says of the training set.
      train: see `Train`.
    """

    data: Examples
    labels: Int[np.ndarray, "N"]
    probe_ids: Int[np.ndarray, "P"]
    num_classes: int
    spec: ModelSpec
    recipe: Recipe
    scoring: Mapping[str, Any]
    seed: int
    batch_size: int
    mesh: Mesh
    progress: Progress
    trajectories: Callable[[], TrajectoryStore]
    attacked: Callable[[], TrainState]
    observed: Callable[[], Observed]
    train: "Train"

    @property
    def is_probe(self) -> Bool[np.ndarray, "N"]:
        """Which examples are probes."""
        return np.isin(np.arange(len(self.labels)), self.probe_ids)

    def images(self, ids: Int[np.ndarray, "M"]) -> Float[np.ndarray, "M H W C"]:
        """Returns images as the victim sees them, in [0, 1], in float32 or wider."""
        dtype = self.spec.param_dtype
        return self.map(make_look(dtype.name, self.mesh), ids=ids)

    def map(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        ids: Int[np.ndarray, "M"] | None = None,
        batch_size: int = 0,
        title: str = "",
    ) -> Any:
        """Applies a jitted function of a batch to examples, by default to all, and gathers the results by example.

        Args:
          function: (batch, *arguments) -> a tree of arrays [B, ...], one row an example of the batch.
          *arguments: handed on, such as a network's state.
          ids: int [M], which examples.
          batch_size: by default `self.batch_size`.
          title: names the pass for the progress, if it is long.

        Returns:
          The tree, of NumPy arrays [M, ...] in the order of the ids.
        """
        if ids is None:
            ids = np.arange(len(self.data))

        # A pass without a title is too short to be worth a line.
        progress = None
        if title:
            progress = self.progress

        return map_examples(
            function,
            self.data,
            ids,
            batch_size or self.batch_size,
            self.mesh,
            *arguments,
            progress=progress,
            title=title,
        )


class Train(Protocol):
    """`context.train(name, recipe, ...)`: the one trainer, with checkpoints, for networks that a defence needs."""

    def __call__(
        self,
        name: str,
        recipe: Recipe,
        *,
        ids: Int[np.ndarray, "M"] | None = None,
        data: Examples | None = None,
        spec: ModelSpec | None = None,
        initial: TrainState | None = None,
        given: Any = None,
    ) -> TrainState:
        """Trains a network.

        Args:
          name: of this training; determines weights and order.
          recipe: how; its objective may be the defence's own.
          ids: int [M], the examples, by default all.
          data: another data set than the context's.
          spec: another network than the context's.
          initial: where to begin in place of fresh weights; it is used up.
          given: what the objective asks for.

        Returns:
          The trained network's state.
        """


def decide(suspicion: Suspicion, rejection: Mapping[str, Any], probe_ids: Int[np.ndarray, "P"]) -> Detection:
    """Calibrates a suspicion on the probes and applies every rejection rule; the probes always stay.

    The rule "clusters" is of BaDLoss alone: others are without it. A level that so few probes cannot support is warned
    of, and applied.

    Args:
      suspicion: of N examples.
      rejection: `config.rejection`.
      probe_ids: int [P], of the clean examples that calibrate the p-values.

    Returns:
      Scores, p-values in (0, 1], and what each rule removes, the defence's own first.

    Raises:
      UsageError: an unknown rule, or a level that is not above 0 and below 1.
    """
    scores = suspicion.scores
    is_probe = np.zeros(len(scores), bool)
    is_probe[probe_ids] = True

    probe_scores = suspicion.probe_scores
    if probe_scores is None:
        probe_scores = scores[probe_ids]
    p_values = conformal_p_values(scores, probe_scores)

    removed = {}
    if suspicion.removed is not None:
        removed[OWN] = suspicion.removed & ~is_probe

    for text in rejection["rules"]:
        rule, level = parse_rule(text, rejection)

        # No threshold on the scores: the search for attacks says who is in them.
        if rule == "clusters":
            if suspicion.members is not None:
                removed[text] = suspicion.members() & ~is_probe
            continue

        reason = unsupported(rule, level, len(probe_scores))
        if reason:
            warnings.warn(f"rejection.{reason}", stacklevel=2)
        removed[text] = reject(rule, level, scores, p_values, is_probe)

    return Detection(scores, p_values, removed, suspicion.details)
