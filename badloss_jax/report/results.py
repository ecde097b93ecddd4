"""results.json and scores.parquet: the contract with scripts. Keys are added, never renamed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from badloss_jax.attacks import ATTACKS
from badloss_jax.attacks.manifest import Manifest
from badloss_jax.config import config_hash, to_dict
from badloss_jax.core.environment import environment
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import read_json, write_atomically, write_text
from badloss_jax.defenses import DEFENSES
from badloss_jax.defenses.context import Detection
from badloss_jax.evaluation.classifier import defense_effectiveness
from badloss_jax.evaluation.detection import detection_metrics, removal_metrics
from badloss_jax.scoring import anomaly_scores
from badloss_jax.settings import KINDS

SCHEMA_VERSION = 1
_RENDERED = {  # keys that a report shows
    "config",
    "config_hash",
    "environment",
    "num_examples",
    "class_names",
    "attacks",
    "seconds",
    "epochs_kept",
    "variants",
}


def variant_entry(
    removed: np.ndarray,
    attack_of: np.ndarray,
    is_probe: np.ndarray,
    detection: Detection | None = None,
    retrained: Mapping[str, Any] | None = None,
    undefended: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Builds one V of `variants`: detection (of a defence), shares removed, recall, the retrained model's figures.

    Args:
      removed: bool [N], what the variant removes.
      attack_of: str [N], the example's attack or "".
      is_probe: bool [N].
      detection: what the defence says of every example; None of a control, which scores nothing.
      retrained: figures of the network that was trained on the rest; None if none was.
      undefended: likewise of the network that was trained on everything.

    Returns:
      The entry, as JSON can say it; each figure is there only if it was measured.
    """
    entry: dict[str, Any] = {}
    if detection is not None:
        entry["detection"] = detection_metrics(detection.distances, attack_of, is_probe)
        if detection.details:
            entry["details"] = dict(detection.details)

    entry |= removal_metrics(removed, attack_of)

    if retrained is not None:
        entry["retrained"] = _compared(retrained, undefended)
    return entry


def cleansed_entry(model: Mapping[str, Any], undefended: Mapping[str, Any] | None) -> dict[str, Any]:
    """Builds one V of `variants` for a defence that trains a network itself and removes nothing.

    Args:
      model: figures of its network, and "details", what else the defence found.
      undefended: figures of the network that was trained on everything; None if none was.

    Returns:
      The entry, as JSON can say it.
    """
    figures = {key: value for key, value in model.items() if key != "details"}
    entry: dict[str, Any] = {
        "removed_share": 0.0,
        "clean_removed_share": 0.0,
        "retrained": _compared(figures, undefended),
    }
    if model["details"]:
        entry["details"] = dict(model["details"])
    return entry


def _compared(model: Mapping[str, Any], undefended: Mapping[str, Any] | None) -> dict[str, Any]:
    """Adds the defence effectiveness, which needs an undefended network to compare with."""
    if undefended is None:
        return dict(model)
    return dict(model) | {"defense_effectiveness": defense_effectiveness(undefended, model)}


def cost_entry(
    seconds_of: Mapping[str, float] | None, phases: Mapping[str, float], config: ConfigDict
) -> dict[str, Any]:
    """Builds the `cost` of a defence, up to its decision: what it took, without the retraining that follows.

    "seconds" counts the artefacts that it stands on, by whomever they were made; "epochs" is that in units of one epoch
    of the undefended network's training on the same machine.

    Args:
      seconds_of: artefact -> seconds that it took; None of a variant that is no defence.
      phases: phase of the run -> seconds.
      config: of the run.

    Returns:
      {"cost": ...}, or nothing of a variant that is no defence; "epochs" is None if no undefended network was trained.
    """
    if seconds_of is None:
        return {}

    seconds = sum(seconds_of.values())
    seconds_per_epoch = 0.0
    if "undefended" in phases:
        seconds_per_epoch = phases["undefended"] / config.retraining.epochs

    epochs = None
    if seconds_per_epoch:
        epochs = seconds / seconds_per_epoch
    return {"cost": {"seconds": seconds, "seconds_of": dict(seconds_of), "epochs": epochs}}


def header(config: ConfigDict, manifest: Manifest, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns what every results.json begins with: the schema, the settings, where it ran, and who attacks what.

    Args:
      config: of the run.
      manifest: its poison plan.
      class_names: K.

    Returns:
      The first keys of results.json, as JSON can say them.
    """
    attacks = {
        name: {
            "target": plan.target,
            "target_name": class_names[plan.target],
            "examples": len(plan.example_ids),
            "clean_label": ATTACKS[name].clean_label,
            "parameters": plan.parameters,
        }
        for name, plan in manifest.attacks.items()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "config": to_dict(config),
        "config_hash": config_hash(config),
        "environment": environment(),
        "num_examples": manifest.num_examples,
        "class_names": list(class_names),
        "attacks": attacks,
    }


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes results.json.

    Args:
      path: of the file.
      results: what JSON can say.

    Raises:
      ValueError: a number is NaN or infinite.
      DataError: the file cannot be written.
    """
    write_text(path, json.dumps(results, indent=2, allow_nan=False) + "\n")


def read_results(path: Path, to_render: bool = False) -> dict[str, Any]:
    """Reads the results of a run that went to its end.

    Args:
      path: of results.json.
      to_render: take those of a rescoring, too, and see that everything is there that a report shows.

    Returns:
      What the file holds.

    Raises:
      UsageError: there are none.
      DataError: they are damaged, of another schema, of a rescoring, or by a version that told less.
    """
    try:
        results = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path} does not exist: is {path.parent} the folder of a finished run?") from error

    # A rescoring, and a run that only detects, have no undefended network to compare with; a page can do without.
    whole = "undefended" in results
    if to_render and not whole:
        whole = "rescored_from" in results or _only_detects(results)
    if results.get("schema_version") != SCHEMA_VERSION or not whole:
        raise DataError(f"{path} cannot be used: it is not of a whole run in schema {SCHEMA_VERSION}")

    # The first in the alphabet is named, so that the message is always the same.
    missing = _RENDERED - results.keys()
    if to_render and missing:
        raise DataError(
            f"{path} lacks {min(missing)!r}, which older versions did not write: run the same `badloss run` again in"
            " its folder; finished phases are kept"
        )
    return results


def _only_detects(results: Mapping[str, Any]) -> bool:
    """Whether the run was to train no network beside the recording; the file may be anybody's."""
    try:
        return results["config"]["retraining"]["enabled"] is False
    except (KeyError, TypeError):
        return False


@dataclass(frozen=True)
class ScoresTable:
    """What scores.parquet says of N examples.

    Attributes:
      labels: int [N], as trained on.
      attack_of: str [N], the example's attack or "".
      is_probe: bool [N].
      distances: kind -> [N].
      scores: kind -> [N], in [0, 1].
      removed: kind -> rule -> bool [N].
    """

    labels: np.ndarray
    attack_of: np.ndarray
    is_probe: np.ndarray
    distances: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    removed: dict[str, dict[str, np.ndarray]]


def read_scores(path: Path) -> ScoresTable:
    """Reads scores.parquet.

    Raises:
      DataError: it is missing or damaged, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        columns = {name: table[name].to_numpy() for name in table.column_names if name != "attack"}
        attack_of = np.array(table["attack"].to_pylist(), dtype=object)
        scores = _scores_table(columns, attack_of)
        _check_scores(scores)
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} is missing or damaged: {error}") from error
    return scores


def _scores_table(columns: Mapping[str, np.ndarray], attack_of: np.ndarray) -> ScoresTable:
    """Sorts the columns of scores.parquet by kind and rule."""
    kinds = [name.removeprefix("distance_") for name in columns if name.startswith("distance_")]

    removed: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in kinds}
    for name, column in columns.items():
        # removed_loss_variance_fraction is not of "loss", but of "loss_variance", if that is there.
        owner = max((kind for kind in kinds if name.startswith(f"removed_{kind}_")), key=len, default=None)
        if owner is not None:
            removed[owner][name.removeprefix(f"removed_{owner}_")] = column.astype(bool)

    return ScoresTable(
        labels=columns["label"].astype(np.int64),
        attack_of=attack_of,
        is_probe=columns["probe"].astype(bool),
        distances={kind: columns[f"distance_{kind}"].astype(np.float64) for kind in kinds},
        scores={kind: columns[f"score_{kind}"].astype(np.float64) for kind in kinds},
        removed=removed,
    )


def _check_scores(table: ScoresTable) -> None:
    """Raises a ValueError where a kind has no rule, or a figure is not finite."""
    if not table.distances or not all(table.removed.values()):
        raise ValueError("no kind of trajectory with its rules is in it")

    for figures in (table.distances, table.scores):
        if not all(np.isfinite(values).all() for values in figures.values()):
            raise ValueError("a distance or score is not finite")


def write_scores(
    path: Path,
    labels: np.ndarray,
    class_names: Sequence[str],
    attack_of: np.ndarray,
    is_probe: np.ndarray,
    detections: Mapping[str, Detection],
    transform: str,
) -> None:
    """Writes scores.parquet, a row an example: ids, what is known of it, and what every kind and rule says.

    Args:
      path: of the file.
      labels: int [N], as trained on, in [0, K).
      class_names: K.
      attack_of: str [N], the example's attack or "".
      is_probe: bool [N].
      detections: kind of trajectory, or name of a defence -> what it says of every example.
      transform: "log" or "linear", how distances become scores in [0, 1]; see `anomaly_scores`.

    Raises:
      DataError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # The names of the classes repeat: as a dictionary, each is stored once.
    names = [class_names[label] for label in labels.tolist()]
    columns: dict[str, Any] = {
        "example_id": np.arange(len(labels), dtype=np.int64),
        "label": labels.astype(np.int32),
        "class_name": pa.array(names, pa.string()).dictionary_encode(),
        "probe": is_probe,
        "attack": pa.array(attack_of.tolist(), pa.string()),
    }
    for kind, detection in detections.items():
        columns[f"distance_{kind}"] = detection.distances
        columns[f"score_{kind}"] = _scores_to_show(kind, detection.distances, transform)
        columns[f"p_value_{kind}"] = detection.p_values
        for rule, removed in detection.removed.items():
            columns[f"removed_{kind}_{rule}"] = removed

    write_atomically(path, lambda aside: pq.write_table(pa.table(columns), aside))


def _scores_to_show(name: str, distances: np.ndarray, transform: str) -> np.ndarray:
    """Scales what a kind of trajectory, or a defence, says to [0, 1]; only plain distances are ever taken logs of."""
    kind = name
    if name not in KINDS:
        kind = DEFENSES[name].kind

    # "combined" is made of logarithms; a defence other than BaDLoss has a scale of its own; by class, distances count
    # from the class's median, and some are negative.
    if kind in ("", "combined") or distances.min() < 0:
        transform = "linear"
    return anomaly_scores(distances, transform=transform)
