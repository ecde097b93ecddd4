"""results.json and scores.parquet: the contract with scripts. Keys are added, never renamed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from badloss_jax.attacks import ATTACKS
from badloss_jax.attacks.manifest import Manifest
from badloss_jax.config import config_hash, to_dict
from badloss_jax.core.environment import environment
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import read_json, write_atomically, write_text
from badloss_jax.defenses.context import Detection
from badloss_jax.evaluation.classifier import defense_effectiveness
from badloss_jax.evaluation.detection import detection_metrics, removal_metrics
from badloss_jax.scoring import anomaly_scores
from badloss_jax.settings import KINDS

SCHEMA_VERSION = 1
_RENDERED = {"config", "config_hash", "environment", "num_examples", "class_names", "attacks", "seconds", "epochs_kept",
             "variants"}  # fmt: skip


def variant_entry(
    removed: np.ndarray, attack_of: np.ndarray, is_probe: np.ndarray, detection: Detection | None = None,
    retrained: Mapping[str, Any] | None = None, undefended: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Builds one V of `variants`: detection (of a defence), shares removed, recall, the retrained model's figures."""
    entry: dict[str, Any] = {}
    if detection is not None:
        entry["detection"] = detection_metrics(detection.distances, attack_of, is_probe)
        entry |= {"details": dict(detection.details)} if detection.details else {}
    entry |= removal_metrics(removed, attack_of)
    if retrained is not None:
        entry["retrained"] = _compared(retrained, undefended)
    return entry


def cleansed_entry(model: Mapping[str, Any], undefended: Mapping[str, Any] | None) -> dict[str, Any]:
    """Builds one V of `variants` for a defence that trains a network itself and removes nothing."""
    plain = {key: value for key, value in model.items() if key != "details"}
    entry = {"removed_share": 0.0, "clean_removed_share": 0.0, "retrained": _compared(plain, undefended)}
    return entry | ({"details": dict(model["details"])} if model["details"] else {})


def _compared(model: Mapping[str, Any], undefended: Mapping[str, Any] | None) -> dict[str, Any]:
    if undefended is None:
        return dict(model)
    return dict(model) | {"defense_effectiveness": defense_effectiveness(undefended, model)}


def cost_entry(
    seconds_of: Mapping[str, float] | None, phases: Mapping[str, float], config: ConfigDict
) -> dict[str, Any]:
    """Builds the `cost` of a defence, up to its decision: what it took, without the retraining that follows.

    "seconds" counts the artefacts that it stands on (`seconds_of` has them one by one), by whomever they were made;
    "epochs" is that in units of one epoch of the undefended network's training on the same machine.
    """
    if seconds_of is None:
        return {}
    seconds = sum(seconds_of.values())
    epoch = phases["undefended"] / config.retraining.epochs if "undefended" in phases else 0.0
    return {"cost": {"seconds": seconds, "seconds_of": dict(seconds_of), "epochs": seconds / epoch if epoch else None}}


def header(config: ConfigDict, manifest: Manifest, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns what every results.json begins with: the schema, the settings, where it ran, and who attacks what."""
    return {
        "schema_version": SCHEMA_VERSION,
        "config": to_dict(config),
        "config_hash": config_hash(config),
        "environment": environment(),
        "num_examples": manifest.num_examples,
        "class_names": list(class_names),
        "attacks": {
            name: {"target": plan.target, "target_name": class_names[plan.target], "examples": len(plan.example_ids),
                   "clean_label": ATTACKS[name].clean_label, "parameters": plan.parameters}
            for name, plan in manifest.attacks.items()
        },
    }  # fmt: skip


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes JSON, NaN refused."""
    write_text(path, json.dumps(results, indent=2, allow_nan=False) + "\n")


def read_results(path: Path, to_render: bool = False) -> dict[str, Any]:
    """Reads the results of a run that went to its end.

    Args:
      path: of results.json.
      to_render: take those of a rescoring, too, and see that everything is there that a report shows.

    Raises:
      UsageError: there are none.
      DataError: they are damaged, of another schema, of a rescoring, or by a version that told less.
    """
    try:
        results = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path} does not exist: is {path.parent} the folder of a finished run?") from error
    whole = "undefended" in results or (to_render and ("rescored_from" in results or _only_detects(results)))
    if results.get("schema_version") != SCHEMA_VERSION or not whole:
        raise DataError(f"{path} cannot be used: it is not of a whole run in schema {SCHEMA_VERSION}")
    missing = _RENDERED - results.keys()
    if to_render and missing:
        raise DataError(
            f"{path} lacks {min(missing)!r}, which older versions did not write: run the same `badloss run` again in"
            " its folder; finished phases are kept"
        )
    return results


def _only_detects(results: Mapping[str, Any]) -> bool:
    try:
        return results["config"]["retraining"]["enabled"] is False
    except (KeyError, TypeError):
        return False


@dataclass(frozen=True)
class Scores:
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


def read_scores(path: Path) -> Scores:
    """Reads scores.parquet.

    Raises:
      DataError: it is missing or damaged, or lacks a column.
    """
    try:
        table = pq.read_table(path)
        columns = {name: table[name].to_numpy() for name in table.column_names if name != "attack"}
        attack_of = np.array(table["attack"].to_pylist(), dtype=object)
        kinds = [name.removeprefix("distance_") for name in columns if name.startswith("distance_")]
        removed: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in kinds}
        for name, column in columns.items():
            # removed_loss_variance_fraction is not of "loss", but of "loss_variance", if that is there.
            owner = max((kind for kind in kinds if name.startswith(f"removed_{kind}_")), key=len, default=None)
            if owner is not None:
                removed[owner][name.removeprefix(f"removed_{owner}_")] = column.astype(bool)
        scores = Scores(
            columns["label"].astype(np.int64), attack_of, columns["probe"].astype(bool),
            {kind: columns[f"distance_{kind}"].astype(np.float64) for kind in kinds},
            {kind: columns[f"score_{kind}"].astype(np.float64) for kind in kinds}, removed,
        )  # fmt: skip
        if not kinds or not all(removed.values()):
            raise ValueError("no kind of trajectory with its rules is in it")
        if not all(np.isfinite(values).all() for part in (scores.distances, scores.scores) for values in part.values()):
            raise ValueError("a distance or score is not finite")
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} is missing or damaged: {error}") from error
    return scores


def write_scores(
    path: Path, labels: np.ndarray, class_names: Sequence[str], attack_of: np.ndarray, is_probe: np.ndarray,
    detections: Mapping[str, Detection], transform: str,
) -> None:  # fmt: skip
    """Writes one row an example: ids, what is known of it, and what every kind and rule says."""
    columns: dict[str, Any] = {
        "example_id": np.arange(len(labels), dtype=np.int64),
        "label": labels.astype(np.int32),
        "class_name": pa.array([class_names[label] for label in labels.tolist()], pa.string()).dictionary_encode(),
        "probe": is_probe,
        "attack": pa.array(attack_of.tolist(), pa.string()),
    }
    for kind, detection in detections.items():
        columns[f"distance_{kind}"] = detection.distances
        distances = kind in KINDS or kind.startswith("badloss")
        logged = kind.endswith("combined") or not distances or detection.distances.min() < 0  # by class
        columns[f"score_{kind}"] = anomaly_scores(detection.distances, transform="linear" if logged else transform)
        columns[f"p_value_{kind}"] = detection.p_values
        for rule, removed in detection.removed.items():
            columns[f"removed_{kind}_{rule}"] = removed
    write_atomically(path, lambda aside: pq.write_table(pa.table(columns), aside))
