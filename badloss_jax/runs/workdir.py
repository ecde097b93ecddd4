"""The folder of a run: one config, one process at a time.

In it lie:

    config.json       the config, as it was resolved
    manifest.json     who is poisoned with what; surrogate.json, how long narcissus's surrogate took
    trajectories/     the store of what was recorded
    models/NAME/      recording, undefended, loss-fraction, ...: weights (orbax) and about.json
    defenses/NAME.npz scores of a defence that looks at more than the trajectories
    checkpoints/NAME/ a training on its way; resumes.json, where one was taken up again
    metrics.jsonl     one line an epoch; tensorboard/ and wandb/ if asked for
    scores.parquet, results.json, gallery.npz
    report.html, report.md, trajectories.png, roc.png, rendered from the files above
    rescored/HASH/    what `badloss score` made of the stored trajectories
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from badloss_jax.config import config_hash, differences, from_json, to_dict, to_json
from badloss_jax.core.errors import UsageError
from badloss_jax.core.files import check_free, locked, read_json, write_text

_SHOWN = 5  # changed settings in a message


@contextmanager
def claim(folder: Path, config: ConfigDict, free: Sequence[str] = ()) -> Iterator[None]:
    """Holds the folder for one process and one config while a run goes on in it.

    Args:
      folder: of the run.
      config: its config.
      free: groups of settings that may have changed since; the new ones are kept then.

    Raises:
      UsageError: it holds another config's run (the differences are named), files of something else, or another
        process is at work in it.
      DataError: it cannot be written.
    """
    check_free(folder, "config.json", "run")
    path = folder / "config.json"
    with locked(folder):
        if path.is_file():
            _check_config_is_the_same(folder, config, free)
        # What is free to change is kept as it is now, for who reads the folder.
        if free or not path.is_file():
            write_text(path, to_json(config))

        yield


def _check_config_is_the_same(folder: Path, config: ConfigDict, free: Sequence[str]) -> None:
    """Raises UsageError if the folder's run has another config, but for the groups that are free."""
    stored = read_config(folder)
    for group in free:
        stored[group] = config[group]
    if config_hash(stored) == config_hash(config):
        return

    # Some tell which config it was; all would fill the screen.
    changes = [f"{key}: {change}" for key, change in differences(to_dict(config), to_dict(stored)).items()]
    if len(changes) > _SHOWN:
        changes[_SHOWN:] = ["..."]
    raise UsageError(
        f"--workdir {folder} holds the run of another config ({'; '.join(changes)}): choose another folder, or go on"
        " with that config"
    )


def read_config(folder: Path) -> ConfigDict:
    """Returns the config of the run in the folder.

    Raises:
      UsageError: there is no run, or it was begun by a version with other settings.
      DataError: the file cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"--workdir {folder} holds no run (no config.json in it)")
    try:
        return from_json(json.dumps(read_json(path)))
    except UsageError as error:
        raise UsageError(
            f"--workdir {folder}: {error}. Go on with the version that began it, or choose another folder"
        ) from error


def start_metrics(folder: Path, model: str, epoch: int = 0) -> None:
    """Drops what an interrupted training of this model left in metrics.jsonl.

    Args:
      folder: of the run.
      model: its name.
      epoch: from which on lines are dropped.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return

    lines = path.read_text("utf-8").splitlines(keepends=True)
    write_text(path, "".join(line for line in lines if not _is_later(line, model, epoch)))


def _is_later(line: str, model: str, epoch: int) -> bool:
    """Whether a line is this model's, from the epoch on; or was cut off when the process was killed."""
    # Half a line, which the next one would be appended to.
    if not line.endswith("\n"):
        return True
    try:
        record = json.loads(line)
        return record["model"] == model and record["epoch"] >= epoch
    except (ValueError, KeyError, TypeError):
        return True


def add_resume(folder: Path, phase: str, step: int) -> None:
    """Notes that a training was taken up again.

    Args:
      folder: of the run.
      phase: name of the training.
      step: after how many steps.
    """
    resumes = [*read_resumes(folder), {"phase": phase, "step": step}]
    write_text(folder / "resumes.json", json.dumps({"resumes": resumes}))


def read_resumes(folder: Path) -> list[dict[str, Any]]:
    """Returns where trainings of this folder were taken up again, [{phase, step}], in order."""
    try:
        return list(read_json(folder / "resumes.json")["resumes"])
    except (FileNotFoundError, KeyError, TypeError):
        return []


def append_metrics(folder: Path, record: dict[str, Any]) -> None:
    """Appends one line to metrics.jsonl.

    Args:
      folder: of the run.
      record: JSON-able, without NaN.
    """
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
