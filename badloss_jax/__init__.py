"""Finds poisoned training examples by how the network learns them: BaDLoss in JAX (Alex et al., ICLR 2025).

Scan a training set:

    badloss_jax.scan("photos", "trusted.txt", Path("OUT"))

Record in a training loop of your own:

    recorder = badloss_jax.TrajectoryRecorder(num_examples, num_epochs)

Score losses [N, T] that you have: `filter_epochs`, `knn_distances`, `leave_one_out_distances`, `conformal_p_values`,
`benjamini_hochberg`, `reject`, `anomaly_scores`. Run an experiment: `load_config`, `run_experiment`, `rescore`. Put
triggers on images: `attacks`. `dir(badloss_jax)` lists all; the map of the package is its README.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from badloss_jax.core import __version__

if TYPE_CHECKING:
    from badloss_jax import attacks
    from badloss_jax.config import load_config
    from badloss_jax.runs.experiment import run_experiment
    from badloss_jax.runs.own_loop import TrajectoryRecorder
    from badloss_jax.runs.rescore import rescore
    from badloss_jax.runs.scan import scan
    from badloss_jax.scoring import (
        anomaly_scores,
        benjamini_hochberg,
        conformal_p_values,
        filter_epochs,
        knn_distances,
        leave_one_out_distances,
        reject,
    )

__all__ = [
    "TrajectoryRecorder",
    "__version__",
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

_HOMES = {
    "TrajectoryRecorder": "runs.own_loop",
    "load_config": "config",
    "rescore": "runs.rescore",
    "run_experiment": "runs.experiment",
    "scan": "runs.scan",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `badloss --help` waits for no JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "attacks":
        return import_module("badloss_jax.attacks")
    home = _HOMES.get(name, "scoring")
    return getattr(import_module(f"badloss_jax.{home}"), name)


def __dir__() -> list[str]:
    """Lists the public names, whether they were used yet or not."""
    return list(__all__)
