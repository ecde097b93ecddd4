"""BaDLoss (Alex et al., ICLR 2025), with the paper's losses and with the other kinds of trajectory."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int

from badloss_jax.defenses.context import Context, Detection, Suspicion, decide
from badloss_jax.scoring import Probes, Trajectories, find_attacks, in_attacks, score_trajectories
from badloss_jax.trajectories.store import TrajectoryStore


def suspicions(
    store: TrajectoryStore,
    probe_ids: Int[np.ndarray, "P"],
    scoring: Mapping[str, Any],
    kinds: tuple[str, ...],
    mesh: Mesh | None = None,
    seed: int = 0,
) -> tuple[dict[str, Suspicion], Int[np.ndarray, "E"]]:
    """Scores the stored trajectories by each of the kinds: distances to the k nearest probes.

    Args:
      store: of all examples.
      probe_ids: int [P].
      scoring: `config.scoring`.
      kinds: of trajectories.
      mesh: the devices that share the rows, by default one.
      seed: of the search for attacks, which is made if somebody asks for their members.

    Returns:
      Suspicions by kind, calibrated by the probes' leave-one-out distances, and the epochs that the filter kept.

    Raises:
      UsageError: more epochs are to be scored than were recorded.
    """
    trajectories = Trajectories.of_store(store)
    scores, epochs = score_trajectories(trajectories, Probes(probe_ids), scoring, kinds, mesh)

    # Looked for once, whatever the number of kinds, and only if a rule asks who is in an attack.
    @cache
    def members() -> Bool[np.ndarray, "N"]:
        clusters, _ = find_attacks(trajectories, probe_ids, scoring, seed, mesh)
        return in_attacks(clusters, store.num_examples)

    by_kind = {}
    for kind, of_kind in scores.items():
        by_kind[kind] = Suspicion(of_kind.values(), of_kind.probe_scores, members=members)
    return by_kind, epochs


def detect(
    store: TrajectoryStore,
    probe_ids: Int[np.ndarray, "P"],
    scoring: Mapping[str, Any],
    rejection: Mapping[str, Any],
    mesh: Mesh | None = None,
    seed: int = 0,
) -> tuple[dict[str, Detection], Int[np.ndarray, "E"]]:
    """Scores by every kind of `scoring.kinds` and applies every rejection rule.

    Args:
      store: of all examples.
      probe_ids: int [P].
      scoring: `config.scoring`.
      rejection: `config.rejection`.
      mesh: the devices that share the rows, by default one.
      seed: of the search for attacks, for the rule "clusters".

    Returns:
      Detections by kind, and the epochs that the filter kept.

    Raises:
      UsageError: more epochs are to be scored than were recorded, or a rule that does not exist.
    """
    kinds = tuple(scoring["kinds"])
    by_kind, epochs = suspicions(store, probe_ids, scoring, kinds, mesh, seed)

    detections = {kind: decide(suspicion, rejection, probe_ids) for kind, suspicion in by_kind.items()}
    return detections, epochs


def badloss(kind: str) -> Callable[[Context, Mapping[str, Any]], Suspicion]:
    """Returns BaDLoss on one kind of trajectory as a defence; the paper's is "loss" with the rule "fraction"."""

    def defend(context: Context, settings: Mapping[str, Any]) -> Suspicion:
        store = context.trajectories()
        by_kind, _ = suspicions(store, context.probe_ids, context.scoring, (kind,), context.mesh, context.seed)
        return by_kind[kind]

    return defend
