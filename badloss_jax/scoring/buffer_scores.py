"""Scores of examples whose trajectories lie in a buffer: which are complete, which probes, which kind, which k."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from badloss_jax.core.errors import UsageError
from badloss_jax.scoring.calibration import conformal_p_values
from badloss_jax.scoring.evidence import Cluster
from badloss_jax.scoring.score import (
    COMBINED,
    Probes,
    Trajectories,
    available_kinds,
    find_attacks,
    parts_of,
    score_trajectories,
)
from badloss_jax.scoring.verdict import in_attacks
from badloss_jax.settings import default_config
from badloss_jax.trajectories.batches import integer, integers, named
from badloss_jax.trajectories.buffer import Buffer

_PREFERRED = ("combined", "features", "ranked", "loss", "logits")  # kinds, that which found most first


@dataclass(frozen=True)
class Scores:
    """How suspicious each example is.

    Attributes:
      distances: float64 [N], to the k nearest probes, higher is more suspicious; of "combined" the mean standardised
        log distance, and by class the log distance on the scale of each class. NaN of what was left out, as are the
        p-values.
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


@dataclass(frozen=True)
class Request:
    """What is asked for, as `TrajectoryRecorder.score` takes it.

    Attributes:
      probe_ids: ids of examples that are known to be clean.
      k: probes in the mean distance; None for the default of the kind.
      kind: of trajectory; None for that which found most, of those there are.
      epochs: score so many, the first; None for all.
      incomplete: "error", or "exclude" to leave out examples that lack an epoch.
      labels: of all examples, to look for attacks; None if they are not known.
      by_class: put every class on its own scale.
    """

    probe_ids: Any
    k: int | None = None
    kind: str | None = None
    epochs: int | None = None
    incomplete: str = "error"
    labels: Any = None
    by_class: bool = False


def score_buffer(buffer: Buffer, num_examples: int, request: Request, mesh: Mesh) -> Scores:
    """Scores a buffer's examples by their distance to the probes.

    Args:
      buffer: kind -> [N', T, ...], N' at least N; NaN of what was not recorded.
      num_examples: N.
      request: which probes, kind, k, epochs and labels.
      mesh: the devices that share the rows.

    Returns:
      The scores, with the attacks if there are labels.

    Raises:
      UsageError: a part of the request is impossible, or examples lack an epoch (how many, ids and epochs are named).
    """
    available = available_kinds(tuple(buffer))
    known = [name for name in _PREFERRED if name in available]
    kind = _kind(request, known)
    # All that was asked for is checked before anything is measured.
    labels = _labels(request, kind, num_examples)
    probes = _probe_ids(request, num_examples)
    width = buffer["loss"].shape[1]
    used = width if request.epochs is None else integer("epochs", request.epochs, 3, width)
    scoring = _settings(request, kind, known, len(probes)) | {"epochs": used}

    # What is searched for attacks has to be complete, too.
    needed = {"loss", *parts_of(kind, scoring)}
    if labels is not None:
        needed |= {name for name in COMBINED if name in buffer}
    finite = np.asarray(_finite({name: buffer[name] for name in needed}))[:num_examples, :used]
    _check_complete(finite, probes, kind, exclude=request.incomplete == "exclude")

    # From here on examples are numbered by rows, without those that are left out.
    rows = np.flatnonzero(finite.all(axis=1))
    ours = Trajectories(
        num_examples=len(rows),
        num_epochs=used,
        kinds=tuple(buffer),
        rows=lambda name, epochs: np.asarray(buffer[name])[np.ix_(rows, epochs)],
        labels=None if labels is None else labels[rows],
    )
    probe_rows = np.searchsorted(rows, probes)
    scores, kept = score_trajectories(ours, Probes(probe_rows), scoring, (kind,), mesh)
    of_kind = scores[kind]

    distances = np.full(num_examples, np.nan)
    distances[rows] = of_kind.values()
    p_values = np.full(num_examples, np.nan)
    p_values[rows] = conformal_p_values(distances[rows], of_kind.probe_scores)
    if kind not in ("combined", *COMBINED) or ours.labels is None:
        return Scores(distances, p_values, kept, kind)

    by_class = of_kind if request.by_class else of_kind.by_class(ours.labels)
    clusters, _ = find_attacks(ours, probe_rows, scoring, 0, mesh, far=by_class.values())
    of_all = [replace(cluster, ids=rows[cluster.ids], score_ids=rows[cluster.score_ids]) for cluster in clusters]
    return Scores(distances, p_values, kept, kind, tuple(of_all))


def _kind(request: Request, known: list[str]) -> str:
    """Returns the kind to score by; of impossible words, says which there are."""
    kind = request.kind or known[0]
    if kind not in known:
        raise UsageError(f"kind = {kind!r}: expected {' or '.join(known)}")
    if request.incomplete not in ("error", "exclude"):
        raise UsageError(f"incomplete = {request.incomplete!r}: expected error or exclude")
    return kind


def _labels(request: Request, kind: str, num_examples: int) -> Int[np.ndarray, "N"] | None:
    """Returns the labels, if they were given and what is asked for can use them."""
    if request.labels is None:
        if request.by_class:
            raise UsageError("by_class = True compares examples with their class: give labels, too")
        return None

    labels = integers("labels", request.labels, 2**31)
    if len(labels) != num_examples:
        raise UsageError(f"there are {len(labels)} labels for {num_examples} examples")
    if kind not in ("combined", *COMBINED) and not request.by_class:
        raise UsageError(
            f"labels are given to look for attacks, which kind = {kind!r} does not show: expected combined, features"
            " or ranked, or by_class=True"
        )
    return labels


def _probe_ids(request: Request, num_examples: int) -> Int[np.ndarray, "P"]:
    """Returns the probes' ids, ascending."""
    given = integers("probe_ids", request.probe_ids, num_examples)
    ids = np.unique(given)
    if len(ids) < max(2, len(given)):
        raise UsageError(f"probe_ids are {len(given)} ids of {len(ids)} examples: expected at least 2, each once")
    return ids


def _settings(request: Request, kind: str, known: list[str], num_probes: int) -> dict[str, Any]:
    """Returns what `config.scoring` would say: the default k of each kind, where there are probes enough."""
    defaults = default_config().scoring
    scoring: dict[str, Any] = {name: {"k": min(defaults[name].k, num_probes - 1)} for name in known}
    if request.k is not None:
        scoring[kind] = {"k": integer("k", request.k, 1, num_probes - 1)}
    return scoring | {"by_class": request.by_class}


def _check_complete(
    complete: Bool[np.ndarray, "N T"], probes: Int[np.ndarray, "P"], kind: str, *, exclude: bool
) -> None:
    """Raises UsageError, saying what to do, if an example lacks an epoch; if such are left out, if a probe does."""
    who = "examples"
    ids = np.arange(len(complete))
    if exclude:
        who = "probes"
        ids = probes
    lacking = ids[~complete[ids].all(axis=1)]
    if not len(lacking):
        return

    gaps = np.flatnonzero(~complete[lacking].all(axis=0))
    ways = ["record each once an epoch (no drop_last)"]
    if not exclude:
        ways.append('leave them out by incomplete="exclude"')
    if gaps[0] >= 3:
        ways.append(f"score the first epochs alone by epochs={gaps[0]}")

    raise UsageError(
        f"{len(lacking)} of {len(ids)} {who} lack epochs of kind {kind}, which were not recorded or are"
        f" not finite: ids {named(lacking)}; epochs {named(gaps)}. Either {', or '.join(ways)}"
    )


@jax.jit
def _finite(buffer: Buffer) -> Bool[Array, "N T"]:
    """Says which cells were recorded and are finite, of all kinds given."""
    finite = [jnp.isfinite(array).all(axis=tuple(range(2, array.ndim))) for array in buffer.values()]
    return jnp.stack(finite).all(axis=0)
