"""Scoring: trajectories in, distances to the probes, scores, p-values and removal lists out."""

from badloss_jax.scoring.distances import knn_distances, leave_one_out_distances
from badloss_jax.scoring.rejection import (
    benjamini_hochberg,
    benjamini_hochberg_threshold,
    conformal_p_values,
    largest_threshold,
    reject,
)
from badloss_jax.scoring.scores import anomaly_scores, filter_epochs, mean_standardised

__all__ = [
    "anomaly_scores",
    "benjamini_hochberg",
    "benjamini_hochberg_threshold",
    "conformal_p_values",
    "filter_epochs",
    "knn_distances",
    "largest_threshold",
    "leave_one_out_distances",
    "mean_standardised",
    "reject",
]
