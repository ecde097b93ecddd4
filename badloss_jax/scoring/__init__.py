"""Scoring: trajectories in, distances to the probes, scores, p-values and removal lists out."""

from badloss_jax.scoring.distances import knn_distances, leave_one_out_distances
from badloss_jax.scoring.rejection import benjamini_hochberg, conformal_p_values, reject
from badloss_jax.scoring.scores import anomaly_scores, filter_epochs, mean_standardised

__all__ = [
    "anomaly_scores",
    "benjamini_hochberg",
    "conformal_p_values",
    "filter_epochs",
    "knn_distances",
    "leave_one_out_distances",
    "mean_standardised",
    "reject",
]
