"""Scoring: trajectories in, distances to the probes, scores, p-values and removal lists out."""

from badloss_jax.scoring.calibration import (
    PoisonedShare,
    conformal_p_values,
    no_poison_p_value,
    poisoned_share,
    standardised_by_class,
    unsupported,
)
from badloss_jax.scoring.clusters import find_clusters
from badloss_jax.scoring.distances import knn_distances, leave_one_out_distances, nearest_probes
from badloss_jax.scoring.evidence import CERTAIN, POSSIBLE, Cluster, Signs
from badloss_jax.scoring.impressions import Impressions, impressions_of
from badloss_jax.scoring.rejection import (
    benjamini_hochberg,
    benjamini_hochberg_threshold,
    largest_threshold,
    reject,
)
from badloss_jax.scoring.scores import anomaly_scores, filter_epochs, log_distances, mean_standardised
from badloss_jax.scoring.verdict import Verdict, attack_entry, in_attacks, judge

__all__ = [
    "CERTAIN",
    "POSSIBLE",
    "Cluster",
    "Impressions",
    "PoisonedShare",
    "Signs",
    "Verdict",
    "anomaly_scores",
    "attack_entry",
    "benjamini_hochberg",
    "benjamini_hochberg_threshold",
    "conformal_p_values",
    "filter_epochs",
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
    "poisoned_share",
    "reject",
    "standardised_by_class",
    "unsupported",
]
