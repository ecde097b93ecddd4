"""Scoring: trajectories in, distances to the probes, scores, p-values and removal lists out.

It imports `trajectories` and what stands before it, and trains nothing: everything here can be done again from a store.
Begin with `score`, the one door through which a recording is scored: it measures `distances`, looks for attacks in
`clusters`, and `verdict` says what follows. The README has what the numbers mean and how they were settled.
"""

from badloss_jax.scoring.calibration import (
    PoisonedShare,
    class_scales,
    conformal_p_values,
    no_poison_p_value,
    poisoned_share,
    unsupported,
)
from badloss_jax.scoring.clusters import find_clusters
from badloss_jax.scoring.distances import knn_distances, leave_one_out_distances, nearest_probes
from badloss_jax.scoring.epoch_filter import filter_epochs
from badloss_jax.scoring.evidence import CERTAIN, POSSIBLE, Cluster, Signs
from badloss_jax.scoring.impressions import Impressions, impressions_of
from badloss_jax.scoring.rejection import (
    benjamini_hochberg,
    benjamini_hochberg_threshold,
    largest_threshold,
    reject,
)
from badloss_jax.scoring.score import (
    COMBINED,
    KindScores,
    Probes,
    Trajectories,
    available_kinds,
    epochs_to_score,
    find_attacks,
    parts_of,
    score_trajectories,
)
from badloss_jax.scoring.transforms import anomaly_scores, log_distances, mean_standardised
from badloss_jax.scoring.verdict import Verdict, attack_entry, in_attacks, judge

__all__ = [
    "CERTAIN",
    "COMBINED",
    "POSSIBLE",
    "Cluster",
    "Impressions",
    "KindScores",
    "PoisonedShare",
    "Probes",
    "Signs",
    "Trajectories",
    "Verdict",
    "anomaly_scores",
    "attack_entry",
    "available_kinds",
    "benjamini_hochberg",
    "benjamini_hochberg_threshold",
    "class_scales",
    "conformal_p_values",
    "epochs_to_score",
    "filter_epochs",
    "find_attacks",
    "find_clusters",
    "impressions_of",
    "in_attacks",
    "judge",
    "knn_distances",
    "largest_threshold",
    "leave_one_out_distances",
    "log_distances",
    "mean_standardised",
    "nearest_probes",
    "no_poison_p_value",
    "parts_of",
    "poisoned_share",
    "reject",
    "score_trajectories",
    "unsupported",
]
