"""results.json and scores.parquet: the contract with scripts. Keys are added, never renamed."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

import badloss_jax
from badloss_jax.config import config_hash, to_dict
from badloss_jax.defenses.badloss import Detection
from badloss_jax.errors import DataError, UsageError
from badloss_jax.evaluation.detection import detection_metrics, removal_metrics
from badloss_jax.files import read_json, write_atomically, write_text
from badloss_jax.scoring import anomaly_scores

SCHEMA_VERSION = 1
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn", "ml_collections")


def variant_entry(
    removed: np.ndarray, attack_of: np.ndarray, is_probe: np.ndarray, detection: Detection | None = None,
    retrained: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Builds one V of `variants`: detection (of a defence), shares removed, recall, the retrained model's figures."""
    entry: dict[str, Any] = {}
    if detection is not None:
        entry["detection"] = detection_metrics(detection.distances, attack_of, is_probe)
    entry |= removal_metrics(removed, attack_of)
    if retrained is not None:
        entry["retrained"] = dict(retrained)
    return entry


def header(config: ConfigDict) -> dict[str, Any]:
    """Returns what every results.json begins with."""
    return {
        "schema_version": SCHEMA_VERSION,
        "config": to_dict(config),
        "config_hash": config_hash(config),
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """Returns versions, devices and machine, and the git commit when run from a checkout."""
    devices = jax.devices()
    return {
        "badloss_jax": badloss_jax.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu_count": len(os.sched_getaffinity(0)),  # that this process may use
        "devices": [f"{device.platform}: {device.device_kind}" for device in devices],
        "jax_enable_x64": bool(jax.config.jax_enable_x64),  # type: ignore[attr-defined]
    }


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes JSON, NaN refused."""
    write_text(path, json.dumps(results, indent=2, allow_nan=False) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """Reads the results of a run that went to its end.

    Raises:
      UsageError: there are none.
      DataError: they are damaged, of another schema, or of a rescoring.
    """
    try:
        results = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path} does not exist: is {path.parent} the folder of a finished run?") from error
    try:
        if results["schema_version"] != SCHEMA_VERSION or "undefended" not in results:
            raise ValueError(f"it is not of a whole run in schema {SCHEMA_VERSION}")
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} cannot be used: {error}") from error
    return results


def write_scores(
    path: Path, labels: np.ndarray, attack_of: np.ndarray, is_probe: np.ndarray, detections: Mapping[str, Detection],
    transform: str,
) -> None:  # fmt: skip
    """Writes one row an example: ids, what is known of it, and what every kind and rule says."""
    columns: dict[str, Any] = {
        "example_id": np.arange(len(labels), dtype=np.int64),
        "label": labels.astype(np.int32),
        "probe": is_probe,
        "attack": pa.array(attack_of.tolist(), pa.string()),
    }
    for kind, detection in detections.items():
        columns[f"distance_{kind}"] = detection.distances
        already_log = kind == "combined"
        columns[f"score_{kind}"] = anomaly_scores(detection.distances, transform="linear" if already_log else transform)
        columns[f"p_value_{kind}"] = detection.p_values
        for rule, removed in detection.removed.items():
            columns[f"removed_{kind}_{rule}"] = removed
    write_atomically(path, lambda aside: pq.write_table(pa.table(columns), aside))


def _git_commit() -> str | None:
    root = Path(badloss_jax.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
