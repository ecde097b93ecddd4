"""Scoring: trajectories in, distances to the probes, scores, p-values and removal lists out."""

from badloss_jax.scoring.calibration import (
    LEVELS,
    PoisonedShare,
    common_excess,
    conformal_p_values,
    detectable_share,
    no_poison_p_value,
    poisoned_share,
    standardised_by_class,
    unsupported,
)
from badloss_jax.scoring.distances import knn_distances, leave_one_out_distances, nearest_probes
from badloss_jax.scoring.impressions import first_seen_as, pixels_seen_as, stranger_p_values
from badloss_jax.scoring.rejection import (
    benjamini_hochberg,
    benjamini_hochberg_threshold,
    largest_threshold,
    reject,
)
from badloss_jax.scoring.scores import anomaly_scores, filter_epochs, log_distances, mean_standardised
from badloss_jax.scoring.verdict import CERTAIN, SIGNS, Verdict, judge

__all__ = [
    "CERTAIN",
    "LEVELS",
    "SIGNS",
    "PoisonedShare",
    "Verdict",
    "anomaly_scores",
    "benjamini_hochberg",
    "benjamini_hochberg_threshold",
    "common_excess",
    "conformal_p_values",
    "detectable_share",
    "filter_epochs",
    "first_seen_as",
    "judge",
    "knn_distances",
    "largest_threshold",
    "leave_one_out_distances",
    "log_distances",
    "mean_standardised",
    "nearest_probes",
    "no_poison_p_value",
    "pixels_seen_as",
    "poisoned_share",
    "reject",
    "standardised_by_class",
    "stranger_p_values",
    "unsupported",
]
