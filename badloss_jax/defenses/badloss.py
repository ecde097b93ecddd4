"""BaDLoss (Alex et al., ICLR 2025), with the paper's losses and with the other kinds of trajectory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from badloss_jax.config import parse_rule
from badloss_jax.scoring import (
    conformal_p_values,
    filter_epochs,
    knn_distances,
    leave_one_out_distances,
    mean_standardised,
    reject,
)
from badloss_jax.trajectories.store import TrajectoryStore


@dataclass(frozen=True)
class Detection:
    """What one kind of trajectory says of every example.

    Attributes:
      distances: [N], to the nearest probes; for "combined" the mean standardised log distance.
      p_values: [N], conformal, from the probes' leave-one-out distances.
      removed: rule, as in `config.rejection.rules` -> [N], the examples that it removes.
    """

    distances: Float[np.ndarray, "N"]
    p_values: Float[np.ndarray, "N"]
    removed: Mapping[str, Bool[np.ndarray, "N"]]


def detect(
    store: TrajectoryStore,
    probe_ids: Int[np.ndarray, "P"],
    scoring: Mapping[str, Any],
    rejection: Mapping[str, Any],
    mesh: Mesh | None = None,
) -> tuple[dict[str, Detection], Int[np.ndarray, "E"]]:
    """Scores the stored trajectories by every kind of `scoring.kinds` and applies every rejection rule.

    The rows are shared by the devices of the mesh, by default one; every process reads its own.

    Returns:
      Detections by kind, and the epochs that the filter kept.
    """
    epochs = filter_epochs(store.rows("loss"), mesh)
    is_probe = np.zeros(store.num_examples, bool)
    is_probe[probe_ids] = True
    measured: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def distances_of(kind: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        if (kind, k) not in measured:
            trajectories = store.rows(kind, epochs)
            probes = trajectories[probe_ids]
            measured[kind, k] = knn_distances(trajectories, probes, k, mesh), leave_one_out_distances(probes, k)
        return measured[kind, k]

    detections = {}
    for kind in scoring["kinds"]:
        k = scoring[kind]["k"]
        if kind == "combined":
            parts = [distances_of(part, k or scoring[part]["k"]) for part in ("features", "ranked")]
            ours, of_probes = mean_standardised([part[0] for part in parts], [part[1] for part in parts])
        else:
            ours, of_probes = distances_of(kind, k)
        p_values = conformal_p_values(ours, of_probes)
        removed = {}
        for text in rejection["rules"]:
            rule, level = parse_rule(text)
            removed[text] = reject(rule, rejection[rule] if level is None else level, ours, p_values, is_probe)
        detections[kind] = Detection(ours, p_values, removed)
    return detections, epochs
