"""Finds poisoned training examples by how the network learns them: BaDLoss in JAX (Alex et al., ICLR 2025)."""

from badloss_jax.config import load_config
from badloss_jax.experiment import rescore, run_experiment
from badloss_jax.scoring import (
    anomaly_scores,
    benjamini_hochberg,
    conformal_p_values,
    filter_epochs,
    knn_distances,
    leave_one_out_distances,
    reject,
)

__version__ = "0.1.0"

__all__ = [
    "anomaly_scores",
    "benjamini_hochberg",
    "conformal_p_values",
    "filter_epochs",
    "knn_distances",
    "leave_one_out_distances",
    "load_config",
    "reject",
    "rescore",
    "run_experiment",
]
