"""Scores of examples whose trajectories lie in a buffer: which are complete, which probes, which kind, which k."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from badloss_jax.errors import UsageError
from badloss_jax.scoring.calibration import conformal_p_values
from badloss_jax.scoring.clusters import find_clusters
from badloss_jax.scoring.evidence import POSSIBLE, Cluster
from badloss_jax.scoring.impressions import impressions_of
from badloss_jax.scoring.scores import distances_by_kind, filter_epochs, scores_by_class
from badloss_jax.scoring.verdict import in_attacks
from badloss_jax.settings import default_config
from badloss_jax.trajectories.batches import integer, integers, named
from badloss_jax.trajectories.buffer import Buffer


@dataclass(frozen=True)
class Scores:
    """How suspicious each example is.

    Attributes:
      distances: float64 [N], to the k nearest probes, higher is more suspicious; of "combined" the mean standardised
        log distance. NaN of what was left out, as are the p-values.
      p_values: float64 [N], conformal: a clean example has p <= alpha with probability about alpha.
      epochs: int [E], those that the filter kept.
      kind: of trajectory.
      clusters: the attacks, and what may be one, that were found with the help of the labels; empty without these.
    """

    distances: Float[np.ndarray, "N"]
    p_values: Float[np.ndarray, "N"]
    epochs: Int[np.ndarray, "E"]
    kind: str
    clusters: tuple[Cluster, ...] = ()

    @property
    def removed(self) -> Bool[np.ndarray, "N"]:
        """Which examples are in an attack that is certain."""
        return in_attacks(self.clusters, len(self.distances))


def score_recorded(
    buffer: Buffer, num_examples: int, probe_ids: Any, k: int | None, kind: str | None, epochs: int | None,
    incomplete: str, mesh: Mesh, labels: Any = None,
) -> Scores:  # fmt: skip
    """Scores a buffer's examples by their distance to the probes; `TrajectoryRecorder.score` says what is what."""
    classes = None if labels is None else integers("labels", labels, 2**31)
    if classes is not None and len(classes) != num_examples:
        raise UsageError(f"there are {len(classes)} labels for {num_examples} examples")
    known: list[str] = [name for name in ("features", "ranked", "loss", "logits") if name in buffer]
    known = ["combined"] * (known[:2] == ["features", "ranked"]) + known
    kind = kind or known[0]
    for setting, value, allowed in (("kind", kind, known), ("incomplete", incomplete, ["error", "exclude"])):
        if value not in allowed:
            raise UsageError(f"{setting} = {value!r}: expected {' or '.join(allowed)}")
    width = buffer["loss"].shape[1]
    used = width if epochs is None else integer("epochs", epochs, 3, width)
    given = integers("probe_ids", probe_ids, num_examples)
    probes = np.unique(given)
    if len(probes) < max(2, len(given)):
        raise UsageError(f"probe_ids are {len(given)} ids of {len(probes)} examples: expected at least 2, each once")
    settings = default_config().scoring
    scoring = {name: {"k": min(settings[name].k, len(probes) - 1)} for name in known}
    if k is not None:
        scoring[kind] = {"k": integer("k", k, 1, len(probes) - 1)}
    parts = ("features", "ranked") if kind == "combined" else (kind,)
    searched = [name for name in ("features", "ranked") if name in buffer and classes is not None]
    there = np.asarray(_finite({part: buffer[part] for part in {"loss", *parts, *searched}}))[:num_examples, :used]
    rows = np.flatnonzero(there.all(axis=1))
    _check_complete(there, probes, kind, exclude=incomplete == "exclude")
    kept = filter_epochs(np.asarray(buffer["loss"])[rows, :used])

    def rows_of(part: str) -> np.ndarray:
        return np.asarray(buffer[part])[np.ix_(rows, kept)]

    places = np.searchsorted(rows, probes)
    found = distances_by_kind(rows_of, places, scoring, (kind,), mesh)[kind]
    distances, p_values = np.full((2, num_examples), np.nan)
    distances[rows], p_values[rows] = found[0], conformal_p_values(*found)
    if classes is None:
        return Scores(distances, p_values, kept, kind)

    kinds = [name for name in ("features", "ranked") if name in buffer]
    if kind not in ("combined", *kinds):
        raise UsageError(f"labels are given to look for attacks, which kind = {kind!r} does not show: expected"
                         " combined, features or ranked")  # fmt: skip
    recorded = [np.asarray(buffer[name])[rows, :used] for name in kinds]
    ours, is_probe = classes[rows], np.isin(rows, probes)
    scores, _ = scores_by_class(kind, *found, ours, places)
    looks = impressions_of(recorded[0], ours) if kinds[0] == "features" else None
    clusters = find_clusters(recorded, ours, is_probe, scores, looks, threshold=POSSIBLE, mesh=mesh)
    of_all = [replace(one, ids=rows[one.ids], score_ids=rows[one.score_ids]) for one in clusters]
    return Scores(distances, p_values, kept, kind, tuple(of_all))


def _check_complete(there: Bool[np.ndarray, "N T"], probes: Int[np.ndarray, "P"], kind: str, *, exclude: bool) -> None:
    """Raises UsageError, saying what to do, if an example lacks an epoch; if such are left out, if a probe does."""
    who, ids = ("probes", probes) if exclude else ("examples", np.arange(len(there)))
    lacking = ids[~there[ids].all(axis=1)]
    if not len(lacking):
        return
    gaps = np.flatnonzero(~there[lacking].all(axis=0))
    ways = ["record each once an epoch (no drop_last)"]
    ways += [] if exclude else ['leave them out by incomplete="exclude"']
    ways += [f"score the first epochs alone by epochs={gaps[0]}"] if gaps[0] >= 3 else []
    raise UsageError(
        f"{len(lacking)} of {len(ids)} {who} lack epochs of kind {kind}, which were not recorded or are"
        f" not finite: ids {named(lacking)}; epochs {named(gaps)}. Either {', or '.join(ways)}"
    )


@jax.jit
def _finite(buffer: Buffer) -> Bool[Array, "N T"]:
    """Says which cells were recorded and are finite, of all kinds given."""
    fine = [jnp.isfinite(array).all(axis=tuple(range(2, array.ndim))) for array in buffer.values()]
    return jnp.stack(fine).all(axis=0)
