"""Finds poisoned training examples by how the network learns them: BaDLoss in JAX (Alex et al., ICLR 2025)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from badloss_jax import attacks
    from badloss_jax.config import load_config
    from badloss_jax.experiment import rescore, run_experiment
    from badloss_jax.own_loop import TrajectoryRecorder
    from badloss_jax.scanning import scan
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
    "TrajectoryRecorder",
    "anomaly_scores",
    "attacks",
    "benjamini_hochberg",
    "conformal_p_values",
    "filter_epochs",
    "knn_distances",
    "leave_one_out_distances",
    "load_config",
    "reject",
    "rescore",
    "run_experiment",
    "scan",
]

_HOMES = {"TrajectoryRecorder": "own_loop", "load_config": "config", "rescore": "experiment",
          "run_experiment": "experiment", "scan": "scanning"}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `badloss --help` waits for no JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "attacks":
        return import_module("badloss_jax.attacks")
    return getattr(import_module(f"badloss_jax.{_HOMES.get(name, 'scoring')}"), name)
