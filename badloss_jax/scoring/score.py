"""The one door through which a recording is scored, for a run, a rescoring, a scan, stored trajectories, a recorder.

Distances are measured once for each kind of trajectory and k; what is made of them is computed part by part, wherever
they lie, so that any number of examples can be scored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from badloss_jax.core.errors import UsageError
from badloss_jax.scoring.calibration import ClassScales, class_scales
from badloss_jax.scoring.clusters import find_clusters
from badloss_jax.scoring.distances import knn_distances, leave_one_out_distances
from badloss_jax.scoring.epoch_filter import filter_epochs
from badloss_jax.scoring.evidence import POSSIBLE, Cluster
from badloss_jax.scoring.impressions import Impressions, impressions_of
from badloss_jax.scoring.rows import Rows
from badloss_jax.scoring.transforms import log_distances, mean_standardised
from badloss_jax.trajectories.store import TrajectoryStore

COMBINED = ("features", "ranked")  # what the kind "combined" is made of, and attacks are looked for in


def parts_of(kind: str, scoring: Mapping[str, Any]) -> dict[str, int]:
    """Says which kinds of trajectory a kind of score is made of.

    Args:
      kind: of `badloss_jax.settings.KINDS`.
      scoring: kind -> {"k": probes in the mean distance}, as `config.scoring`; 0 for "combined" takes its parts' own.

    Returns:
      Kind of trajectory -> k.
    """
    if kind != "combined":
        return {kind: scoring[kind]["k"]}
    return {part: scoring[kind]["k"] or scoring[part]["k"] for part in COMBINED}


def available_kinds(recorded: Sequence[str]) -> list[str]:
    """Returns those that recorded trajectories can be scored by, which beside their own may be "combined"."""
    kinds = [*recorded]
    if set(COMBINED) <= set(recorded):
        kinds.append("combined")
    return kinds


@dataclass(frozen=True)
class Trajectories:
    """What was recorded, wherever it lies.

    Attributes:
      num_examples: N.
      num_epochs: T.
      kinds: that were recorded.
      rows: (kind, int [E]) -> its trajectories at these epochs, [N, E] or [N, E, width].
      labels: int [N], as trained on; None if they are not known.
    """

    num_examples: int
    num_epochs: int
    kinds: tuple[str, ...]
    rows: Callable[[str, Int[np.ndarray, "E"]], Rows]
    labels: Int[np.ndarray, "N"] | None = None

    @classmethod
    def of_store(cls, store: TrajectoryStore) -> "Trajectories":
        """Returns those of a store; what was not recorded, or is not finite, is an error where it is read."""
        return cls(store.num_examples, store.num_epochs, tuple(store.layout), store.rows, store.labels())


@dataclass(frozen=True)
class Probes:
    """Examples that are known to be clean, by their ids or by trajectories of their own.

    Attributes:
      ids: int64 [P], ascending; of trajectories of their own, none.
      own: [P, T] or [P, T, width], at all epochs that were recorded, of the one kind that there is.
    """

    ids: Int[np.ndarray, "P"]
    own: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids if self.own is None else self.own)

    def among(self, rows: Rows, epochs: Int[np.ndarray, "E"]) -> np.ndarray:
        """Returns their trajectories.

        Args:
          rows: trajectories of all examples at the epochs, [N, E] or [N, E, width].
          epochs: int [E].

        Returns:
          [P, E] or [P, E, width].
        """
        if self.own is None:
            return np.asarray(rows[self.ids])
        return self.own[:, epochs]


@dataclass(frozen=True)
class KindScores:
    """How far every example lies from the probes, by one kind of trajectory.

    Attributes:
      kind: of trajectory, or "combined".
      k: of each part that it is made of.
      distances: of each part [N], in memory or on disk.
      probe_distances: of each part [P], leave-one-out.
      probe_scores: [P], leave-one-out, on the scale of `values`.
      unscaled: [P], the same before every class is put on its own scale.
      probes: the probes.
      labels: int [N], if the classes are each on their own scale.
      scales: those.
    """

    kind: str
    k: tuple[int, ...]
    distances: tuple[Any, ...]
    probe_distances: tuple[Float[np.ndarray, "P"], ...]
    probe_scores: Float[np.ndarray, "P"]
    unscaled: Float[np.ndarray, "P"]
    probes: Probes
    labels: Int[np.ndarray, "N"] | None = None
    scales: ClassScales | None = None

    @property
    def is_logarithm(self) -> bool:
        """Whether the values are on a logarithmic scale already."""
        return self.kind == "combined" or self.scales is not None

    def by_class(self, labels: Int[np.ndarray, "N"]) -> "KindScores":
        """Returns the same with every class on its own scale (`class_scales`)."""
        unscaled = self.probe_scores
        if self.kind != "combined":
            unscaled = log_distances(unscaled)
        scales = class_scales(unscaled, labels[self.probes.ids])
        return replace(self, unscaled=unscaled, probe_scores=scales.of_probes, labels=labels, scales=scales)

    def values(self, start: int = 0, stop: int | None = None) -> Float[np.ndarray, "M"]:
        """Computes the scores of a range of examples.

        They are distances, of "combined" the mean standardised log distance; by class, log distances on the scale of
        each class, and a probe's is its leave-one-out distance.

        Args:
          start: the first example.
          stop: the example after the last; by default there is no more.

        Returns:
          [M], higher is more suspicious; NaN where a distance is NaN.
        """
        if stop is None:
            stop = len(self.distances[0])
        parts = [np.asarray(distances[start:stop]) for distances in self.distances]
        scores = parts[0]
        if len(parts) > 1:
            scores, _ = mean_standardised(parts, self.probe_distances)
        if self.scales is None or self.labels is None:
            return scores

        # Of the probe itself the distance would be 0, or next to it.
        scores = np.array(scores if self.kind == "combined" else log_distances(scores), np.float64)
        inside = (self.probes.ids >= start) & (self.probes.ids < stop)
        scores[self.probes.ids[inside] - start] = self.unscaled[inside]
        return self.scales(scores, self.labels[start:stop])


def epochs_to_score(
    trajectories: Trajectories,
    scoring: Mapping[str, Any],
    mesh: Mesh | None = None,
    *,
    exclude_non_finite: bool = False,
) -> Int[np.ndarray, "E"]:
    """Chooses the epochs that the filter keeps of the first `scoring.epochs`.

    Args:
      trajectories: of all examples.
      scoring: as `config.scoring`.
      mesh: whose processes each read their own rows.
      exclude_non_finite: leave out examples with losses that are not finite.

    Returns:
      int [E], ascending; all of the first if no losses were recorded.

    Raises:
      UsageError: more epochs are to be scored than were recorded.
    """
    used = scoring["epochs"] or trajectories.num_epochs
    if used > trajectories.num_epochs:
        raise UsageError(f"scoring.epochs = {used}, and {trajectories.num_epochs} were recorded")

    epochs = np.arange(used)
    if "loss" not in trajectories.kinds:
        return epochs
    return filter_epochs(trajectories.rows("loss", epochs), mesh, exclude_non_finite=exclude_non_finite)


def score_trajectories(
    trajectories: Trajectories,
    probes: Probes,
    scoring: Mapping[str, Any],
    kinds: Sequence[str],
    mesh: Mesh | None = None,
    *,
    epochs: Int[np.ndarray, "E"] | None = None,
    measure: Callable[[str, int, Rows, np.ndarray], Any] | None = None,
) -> tuple[dict[str, KindScores], Int[np.ndarray, "E"]]:
    """Scores every example by its mean distance to the k nearest probes, by each of the kinds.

    Args:
      trajectories: of all examples.
      probes: known to be clean.
      scoring: as `config.scoring`; with `by_class`, every class is put on its own scale (`class_scales`).
      kinds: of trajectories.
      mesh: the devices that share the rows, by default one; every process reads its own rows.
      epochs: int [E], to score, by default those of `epochs_to_score`.
      measure: (kind, k, rows, probes' rows) -> distances [N], by default `knn_distances`.

    Returns:
      Scores by kind, and the epochs.

    Raises:
      UsageError: more epochs are to be scored than were recorded, or classes without labels.
    """
    labels = trajectories.labels if scoring["by_class"] else None
    if scoring["by_class"] and (labels is None or probes.own is not None):
        raise UsageError(
            "scoring.by_class = True compares examples with their class: it needs all labels, and the probes' ids"
        )
    if epochs is None:
        epochs = epochs_to_score(trajectories, scoring, mesh)

    # Several kinds of score may be made of the same distances, which are measured but once.
    measured: dict[tuple[str, int], tuple[Any, np.ndarray]] = {}
    scores = {}
    for kind in kinds:
        parts = parts_of(kind, scoring)
        for part, k in parts.items():
            if (part, k) in measured:
                continue
            rows = trajectories.rows(part, epochs)
            of_probes = probes.among(rows, epochs)
            if measure is None:
                distances = knn_distances(rows, of_probes, k, mesh)
            else:
                distances = measure(part, k, rows, of_probes)
            measured[part, k] = distances, leave_one_out_distances(of_probes, k)

        plain = _kind_scores(kind, parts, [measured[part, k] for part, k in parts.items()], probes)
        scores[kind] = plain if labels is None else plain.by_class(labels)
    return scores, epochs


def _kind_scores(
    kind: str,
    parts: Mapping[str, int],
    measured: Sequence[tuple[Any, np.ndarray]],
    probes: Probes,
) -> KindScores:
    """Puts the distances of a kind's parts together, as (of all examples, of the probes), on one scale for all."""
    distances, of_probes = zip(*measured, strict=True)
    if len(parts) == 1:
        probe_scores = of_probes[0]
    else:
        _, probe_scores = mean_standardised(of_probes, of_probes)
    return KindScores(
        kind=kind,
        k=tuple(parts.values()),
        distances=distances,
        probe_distances=of_probes,
        probe_scores=probe_scores,
        unscaled=probe_scores,
        probes=probes,
    )


def find_attacks(
    trajectories: Trajectories,
    probe_ids: Int[np.ndarray, "P"],
    scoring: Mapping[str, Any],
    seed: int,
    mesh: Mesh | None = None,
    far: Float[np.ndarray, "N"] | None = None,
) -> tuple[list[Cluster], Impressions | None]:
    """Looks for attacks: clusters of a class, in what was recorded of features and ranked log-probabilities.

    Args:
      trajectories: of all examples, with labels.
      probe_ids: int [P].
      scoring: as `config.scoring`.
      seed: of the search.
      mesh: the devices.
      far: [N], scores with `by_class`, if they are known.

    Returns:
      Clusters that are possible at least, and what each example looks like, if features were recorded.

    Raises:
      UsageError: neither features nor ranked log-probabilities were recorded, or there are no labels.
    """
    kinds = [kind for kind in COMBINED if kind in trajectories.kinds]
    labels = trajectories.labels
    if not kinds or labels is None:
        raise UsageError(
            "attacks are looked for in features and ranked log-probabilities of labelled examples, and neither was"
            " recorded, or labels are missing"
        )

    if far is None:
        kind = available_kinds(kinds)[-1]
        by_class = {**scoring, "by_class": True}
        scores, _ = score_trajectories(trajectories, Probes(probe_ids), by_class, (kind,), mesh)
        far = scores[kind].values()

    # The search chooses epochs itself; what the filter leaves out is not left out here.
    used = np.arange(scoring["epochs"] or trajectories.num_epochs)
    recorded = [trajectories.rows(kind, used) for kind in kinds]
    looks = None
    if kinds[0] == "features":
        looks = impressions_of(recorded[0], labels)

    is_probe = np.isin(np.arange(trajectories.num_examples), probe_ids)
    clusters = find_clusters(recorded, labels, is_probe, far, looks, threshold=POSSIBLE, seed=seed, mesh=mesh)
    return clusters, looks
