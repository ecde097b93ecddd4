"""What a scan says: scores, attacks, suspects and the verdict, in files and on a page."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from badloss_jax.config import to_dict
from badloss_jax.core.environment import environment
from badloss_jax.core.files import printable, write_lines, write_text
from badloss_jax.core.processes import on_first
from badloss_jax.data.training_set import TrainingSet
from badloss_jax.report.scan import Suspects, reasons, render_scan, sentence, write_scores, write_suspects
from badloss_jax.scoring import (
    COMBINED,
    Probes,
    Trajectories,
    Verdict,
    attack_entry,
    find_attacks,
    judge,
    nearest_probes,
    score_trajectories,
)
from badloss_jax.settings import parse_rule
from badloss_jax.trajectories.store import TrajectoryStore

SCHEMA_VERSION = 3
_NEAREST = 3  # probes that are shown beside a suspect


def write_verdict(
    store: TrajectoryStore,
    examples: TrainingSet,
    probe_ids: Int[np.ndarray, "P"],
    config: ConfigDict,
    workdir: Path,
    mesh: Mesh,
) -> dict[str, Any]:
    """Scores a recording, judges it, and writes everything but scan.json; of many processes, the first one writes.

    Args:
      store: the recording.
      examples: the training set.
      probe_ids: int64 [P].
      config: of the scan.
      workdir: its folder.
      mesh: the devices.

    Returns:
      What scan.json holds.
    """
    labels = examples.split.labels
    is_probe = np.isin(np.arange(len(labels)), probe_ids)
    trajectories = Trajectories.of_store(store)
    (kind,) = config.scoring.kinds
    by_kind, epochs = score_trajectories(trajectories, Probes(probe_ids), config.scoring, (kind,), mesh)
    scores = by_kind[kind].values()

    # Without clusters to look for, images are judged by their distance alone.
    clusters = None
    impressions = None
    if config.scoring.by_class and set(COMBINED) & store.layout.keys():
        clusters, impressions = find_attacks(trajectories, probe_ids, config.scoring, config.seed, mesh, far=scores)
    rule, level = parse_rule(config.rejection.rules[0], config.rejection)
    probe_scores = by_kind[kind].probe_scores
    verdict = judge(scores, probe_scores, labels, is_probe, examples.num_classes, rule, level, clusters)

    losses = store.read("loss", epochs)
    shown = store.rows(_kind_shown(store, kind), epochs)
    ids = _suspect_ids(verdict, scores, is_probe, config.rejection.alpha)
    suspects = Suspects(
        ids=ids,
        names=[examples.names[number] for number in ids],
        labels=labels[ids],
        scores=scores[ids],
        p_values=verdict.p_values[ids],
        nearest=probe_ids[nearest_probes(shown[ids], shown[probe_ids], _NEAREST)],
        reasons=reasons(losses, ids, probe_ids),
        removed=verdict.removed[ids],
        attacks=verdict.attack_of()[ids],
        seen_as=None if impressions is None else impressions.first[ids],
    )
    results = _results(verdict, examples, probe_ids, suspects) | {
        "epochs_kept": epochs.tolist(),
        "config": to_dict(config),
        "environment": environment(),
    }

    def write() -> None:
        write_suspects(workdir, suspects, examples)
        write_scores(workdir, examples, scores, verdict, is_probe, impressions)
        _write_lists(workdir, examples, verdict)
        write_text(workdir / "report.html", render_scan(results, suspects, examples, losses, scores, is_probe))

    on_first(write)
    return results


def _kind_shown(store: TrajectoryStore, kind: str) -> str:
    """Returns the kind by which a suspect's nearest probes are chosen: features show best which an image is like."""
    if "features" in store.layout:
        return "features"
    return kind


def _suspect_ids(
    verdict: Verdict, scores: Float[np.ndarray, "N"], is_probe: Bool[np.ndarray, "N"], alpha: float
) -> Int[np.ndarray, "M"]:
    """Returns what is removed, in an attack or further out than nearly all probes; the furthest first."""
    flagged = verdict.removed | (verdict.attack_of() > 0) | (~is_probe & (verdict.p_values <= alpha))
    ids = np.flatnonzero(flagged)
    return ids[np.argsort(-scores[ids], kind="stable")]


def _results(
    verdict: Verdict,
    examples: TrainingSet,
    probe_ids: Int[np.ndarray, "P"],
    suspects: Suspects,
) -> dict[str, Any]:
    """Returns what scan.json says of the images."""
    names = [printable(name) for name in examples.class_names]
    count = len(examples.names)
    clusters = [*verdict.attacks, *verdict.possible]
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": sentence(verdict, examples.class_names, len(probe_ids)),
        "stands_out": verdict.stands_out,
        "num_examples": count,
        "probe_count": len(probe_ids),
        "probe_rows": probe_ids.tolist(),
        "trusted_count": count - examples.own,
        "removed_count": int(verdict.removed.sum()),
        "suspect_count": len(suspects.ids),
        "left_out_count": len(examples.left_out),
        "attacks": [attack_entry(cluster, names[cluster.label]) for cluster in clusters],
        "share": asdict(verdict.share),
        "no_poison_p_value": verdict.no_poison,
        "classes": [{"name": name} | entry for name, entry in zip(names, verdict.classes, strict=True)],
    }


def _write_lists(workdir: Path, examples: TrainingSet, verdict: Verdict) -> None:
    """Writes remove.txt, keep.txt and left_out.txt; trusted images from beside the data are in none of them."""
    kept = ~verdict.removed
    kept[examples.own :] = False
    for name, rows in (("remove.txt", verdict.removed), ("keep.txt", kept)):
        write_lines(workdir / name, [examples.names[number] for number in np.flatnonzero(rows)])

    # A name may hold anything, and a line is to stay one.
    left_out = [f"{name}\t{reason}" for name, reason in examples.left_out.items()]
    write_lines(workdir / "left_out.txt", [line.replace("\n", "\\n").replace("\r", "\\r") for line in left_out])
