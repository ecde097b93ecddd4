"""BaDLoss (Alex et al., ICLR 2025), with the paper's losses and with the other kinds of trajectory."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from badloss_jax.defenses.context import Context, Detection, Suspicion, decide
from badloss_jax.errors import UsageError
from badloss_jax.scoring import (
    POSSIBLE,
    Cluster,
    Impressions,
    filter_epochs,
    find_clusters,
    impressions_of,
    in_attacks,
)
from badloss_jax.scoring.scores import distances_by_kind, scores_by_class
from badloss_jax.trajectories.store import TrajectoryStore


def suspicions(
    store: TrajectoryStore, probe_ids: Int[np.ndarray, "P"], scoring: Mapping[str, Any], kinds: tuple[str, ...],
    mesh: Mesh | None = None, seed: int = 0,
) -> tuple[dict[str, Suspicion], Int[np.ndarray, "E"]]:  # fmt: skip
    """Scores the stored trajectories by each of the kinds: distances to the k nearest probes.

    The rows are shared by the devices of the mesh, by default one; every process reads its own.

    Args:
      store: of all examples.
      probe_ids: int [P].
      scoring: `config.scoring`; with `by_class`, scores are those of `standardised_by_class`.
      kinds: of trajectories.
      mesh: the devices.
      seed: of the search for attacks, which is made if somebody asks for their members.

    Returns:
      Suspicions by kind, calibrated by the probes' leave-one-out distances, and the epochs that the filter kept.

    Raises:
      UsageError: more epochs are to be scored than were recorded.
    """
    recorded, used = store.num_epochs, scoring["epochs"] or store.num_epochs
    if used > recorded:
        raise UsageError(f"scoring.epochs = {used}, and {recorded} were recorded")
    epochs = filter_epochs(store.rows("loss", np.arange(used)), mesh)
    found = distances_by_kind(lambda kind: store.rows(kind, epochs), probe_ids, scoring, kinds, mesh)
    if scoring["by_class"]:
        labels = store.labels()
        found = {kind: scores_by_class(kind, *pair, labels, probe_ids) for kind, pair in found.items()}

    @cache
    def members() -> Bool[np.ndarray, "N"]:
        return in_attacks(find_attacks(store, probe_ids, scoring, seed, mesh)[0], store.num_examples)

    return {kind: Suspicion(*pair, members=members) for kind, pair in found.items()}, epochs


def find_attacks(
    store: TrajectoryStore, probe_ids: Int[np.ndarray, "P"], scoring: Mapping[str, Any], seed: int,
    mesh: Mesh | None = None, far: Float[np.ndarray, "N"] | None = None,
) -> tuple[list[Cluster], Impressions | None]:  # fmt: skip
    """Looks for attacks: clusters of a class, in what was recorded of features and ranked log-probabilities.

    Args:
      store: of all examples.
      probe_ids: int [P].
      scoring: `config.scoring`.
      seed: of the search.
      mesh: the devices.
      far: [N], scores of `suspicions` with `by_class`, if they are known.

    Returns:
      Clusters that are possible at least, and what each example looks like, if features were recorded.

    Raises:
      UsageError: neither features nor ranked log-probabilities were recorded.
    """
    kinds = [kind for kind in ("features", "ranked") if kind in store.layout]
    if not kinds:
        raise UsageError("attacks are looked for in features and ranked log-probabilities, and neither was recorded")
    labels, used = store.labels(), np.arange(scoring["epochs"] or store.num_epochs)
    if far is None:
        kind = "combined" if len(kinds) == 2 else kinds[0]
        far = suspicions(store, probe_ids, {**scoring, "by_class": True}, (kind,), mesh)[0][kind].scores
    looks = impressions_of(store.rows("features", used), labels) if "features" in kinds else None
    is_probe = np.isin(np.arange(store.num_examples), probe_ids)
    recorded = [store.rows(kind, used) for kind in kinds]
    clusters = find_clusters(recorded, labels, is_probe, far, looks, threshold=POSSIBLE, seed=seed, mesh=mesh)
    return clusters, looks


def detect(
    store: TrajectoryStore, probe_ids: Int[np.ndarray, "P"], scoring: Mapping[str, Any], rejection: Mapping[str, Any],
    mesh: Mesh | None = None, seed: int = 0,
) -> tuple[dict[str, Detection], Int[np.ndarray, "E"]]:  # fmt: skip
    """Scores by every kind of `scoring.kinds` and applies every rejection rule.

    Returns:
      Detections by kind, and the epochs that the filter kept.
    """
    found, epochs = suspicions(store, probe_ids, scoring, tuple(scoring["kinds"]), mesh, seed)
    return {kind: decide(suspicion, rejection, probe_ids) for kind, suspicion in found.items()}, epochs


def badloss(kind: str) -> Callable[[Context, Mapping[str, Any]], Suspicion]:
    """Returns BaDLoss on one kind of trajectory as a defence; the paper's is "loss" with the rule "fraction"."""

    def defend(context: Context, settings: Mapping[str, Any]) -> Suspicion:
        store = context.trajectories()
        return suspicions(store, context.probe_ids, context.scoring, (kind,), context.mesh, context.seed)[0][kind]

    return defend
