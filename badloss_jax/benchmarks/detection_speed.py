"""How fast detectors are, from the files of a run to removal lists, and how little float16 changes of what they say."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from badloss_jax.attacks.manifest import read_manifest
from badloss_jax.benchmarks.timing import seconds_of, summary
from badloss_jax.core.mesh import make_mesh
from badloss_jax.defenses.badloss import detect
from badloss_jax.evaluation.detection import detection_metrics
from badloss_jax.runs.workdir import read_config
from badloss_jax.scoring import knn_distances, reject
from badloss_jax.trajectories.store import TrajectoryStore

_REMOVED = 0.4  # of the examples, as in the paper


@dataclass(frozen=True)
class _Truth:
    """What a run knows of its examples.

    Attributes:
      attack_of: str [N], "" of the clean.
      is_probe: bool [N].
    """

    attack_of: np.ndarray
    is_probe: Bool[np.ndarray, "N"]

    def auroc(self, distances: Float[np.ndarray, "N"]) -> float | None:
        """Returns the AUROC over all attacks; None where nothing is poisoned."""
        return detection_metrics(distances, self.attack_of, self.is_probe)["auroc"]["overall"]


def measure_detectors(workdir: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """Times every detector on the trajectories of a finished run, from its files to its removal lists.

    Args:
      workdir: the run's folder.
      repeats: calls of each detector, of which the median counts; a first one that compiles comes before.

    Yields:
      detector, examples, seconds, examples_per_second, auroc (overall), and float16: what storing a kind as float16
      would change that is stored as float32 (Spearman's correlation of the ranks, the largest change of a rank as a
      share of N, the share of the examples removed at 40 % that changes, auroc); None for other kinds.

    Raises:
      UsageError: there is no finished run in the folder.
      DataError: it is damaged.
    """
    config = read_config(workdir)
    store = TrajectoryStore.open(workdir / "trajectories")
    attack_of = read_manifest(workdir / "manifest.json").attack_of()
    probe_ids = store.probe_ids()
    truth = _Truth(attack_of, np.isin(np.arange(store.num_examples), probe_ids))

    for kind in config.scoring.kinds:
        scoring = config.scoring.to_dict() | {"kinds": (kind,)}
        work = partial(detect, store, probe_ids, scoring, config.rejection, make_mesh())
        # The first call compiles, and does not count.
        detections, epochs = work()
        distances = detections[kind].distances
        seconds = summary([seconds_of(lambda: work()[1]) for _ in range(repeats)])  # noqa: B023

        float16 = None
        if store.layout.get(kind, ((), ""))[1] == "float32":
            # Losses and probabilities alone are stored so.
            rounded = store.read(kind, epochs).astype(np.float16)
            float16_distances = knn_distances(rounded, rounded[probe_ids], scoring[kind]["k"])
            float16 = _changes(distances, float16_distances, truth)

        yield {
            "detector": f"badloss {kind}",
            "examples": store.num_examples,
            "seconds": seconds,
            "examples_per_second": store.num_examples / seconds["median"],
            "auroc": truth.auroc(distances),
            "float16": float16,
        }


def _changes(before: Float[np.ndarray, "N"], after: Float[np.ndarray, "N"], truth: _Truth) -> dict[str, float | None]:
    """Compares the ranking and the removal by two sets of distances."""
    # Removal goes by ranks: Spearman's correlation is that of the ranks.
    ranks_before = rankdata(before)
    ranks_after = rankdata(after)
    largest = np.abs(ranks_before - ranks_after).max()

    removed_before = _removed(before, truth)
    removed_after = _removed(after, truth)
    return {
        "rank_correlation": float(np.corrcoef(ranks_before, ranks_after)[0, 1]),
        "largest_rank_change": float(largest / len(before)),
        "removed_changed": float((removed_before != removed_after).mean()),
        "auroc": truth.auroc(after),
    }


def _removed(distances: Float[np.ndarray, "N"], truth: _Truth) -> Bool[np.ndarray, "N"]:
    # This rule does not look at p-values.
    return reject("fraction", _REMOVED, distances, np.ones(len(distances)), truth.is_probe)
