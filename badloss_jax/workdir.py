"""The folder of a run: one config, one process at a time.

In it lie:

    config.json       the config, as it was resolved
    manifest.json     who is poisoned with what; surrogate.json, how long narcissus's surrogate took
    trajectories/     the store of what was recorded
    models/NAME/      recording, undefended, loss-fraction, ...: weights (orbax) and about.json
    metrics.jsonl     one line an epoch; tensorboard/ and wandb/ if asked for
    scores.parquet, results.json, gallery.npz
    report.html, report.md, trajectories.png, roc.png, rendered from the files above
    rescored/HASH/    what `badloss score` made of the stored trajectories
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from badloss_jax.config import config_hash, differences, from_json, to_dict, to_json
from badloss_jax.errors import DataError, UsageError
from badloss_jax.files import read_json, write_text


@contextmanager
def claim(folder: Path, config: ConfigDict) -> Iterator[None]:
    """Holds the folder for one process and one config while a run goes on in it.

    Raises:
      UsageError: it holds another config's run (the differences are named), files of something else, or another
        process is at work in it.
      DataError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--workdir {folder} is a file, not a folder")
    stored = folder / "config.json"
    if folder.is_dir() and not stored.is_file() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise UsageError(f"--workdir {folder} holds other files and no run: choose an empty or a new folder")
    with locked(folder):
        if stored.is_file():
            theirs = read_config(folder)
            if config_hash(theirs) != config_hash(config):
                changed = [f"{key}: {change}" for key, change in differences(to_dict(config), to_dict(theirs)).items()]
                raise UsageError(
                    f"--workdir {folder} holds the run of another config ({'; '.join(changed[:5])}"
                    f"{'; ...' if len(changed) > 5 else ''}): choose another folder, or go on with that config"
                )
        else:
            write_text(stored, to_json(config))
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; it goes with the process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"--workdir {folder} cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UsageError(f"another run (process {holder}) is at work in {folder}: wait for it") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def read_config(folder: Path) -> ConfigDict:
    """Returns the config of the run in the folder.

    Raises:
      UsageError: there is no run, or it was made by a version with other keys.
      DataError: the file cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"--workdir {folder} holds no run (no config.json in it)")
    return from_json(json.dumps(read_json(path)))


def start_metrics(folder: Path, model: str) -> None:
    """Drops what an interrupted training of this model left in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if path.is_file():
        own = f'{{"model": {json.dumps(model)}, '
        lines = path.read_text("utf-8").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if line.endswith("\n") and not line.startswith(own)))


def append_metrics(folder: Path, record: dict[str, Any]) -> None:
    """Appends one line to metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
