"""What a recorder is made with: checked, the kinds of trajectory that follow from it, and its file in a saved one."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import read_json
from badloss_jax.trajectories.batches import integer
from badloss_jax.trajectories.kinds import Kinds
from badloss_jax.trajectories.store import TrajectoryStore

SETTINGS_FILE = "recorder.json"
SETTINGS = ("num_classes", "num_features", "feature_dim", "ranked_others", "keep_logits", "seed")
_LEAST = {
    "num_examples": 1,
    "num_epochs": 3,
    "num_classes": 2,
    "num_features": 1,
    "feature_dim": 1,
    "ranked_others": 1,
    "seed": 0,
}
_OPTIONAL = ("num_classes", "num_features")


def checked_sizes(settings: Mapping[str, Any]) -> dict[str, int]:
    """Returns the sizes as Python integers, name -> size, without those that are None.

    Raises:
      UsageError: one is no integer, or too small.
    """
    sizes = {}
    for name, least in _LEAST.items():
        # None of these two means a kind that is not recorded.
        if settings[name] is not None or name not in _OPTIONAL:
            sizes[name] = integer(name, settings[name], least)
    return sizes


def kinds_of(settings: Mapping[str, Any]) -> Kinds:
    """Returns the kinds that a recorder of these `SETTINGS` records; their order is that of the stored layout."""
    names = []
    if settings["num_classes"]:
        names.append("ranked")
    if settings["num_features"]:
        names.append("features")
    if settings["num_classes"] and settings["keep_logits"]:
        names.append("logits")

    return Kinds(
        tuple(names),
        settings["num_classes"] or 0,
        settings["num_features"] or 0,
        settings["feature_dim"],
        settings["ranked_others"],
        settings["seed"],
    )


def check_made_alike(first: object, part: object, number: int) -> None:
    """Checks that two recorders can be merged.

    Args:
      first: a recorder.
      part: another one.
      number: of the part, for the message.

    Raises:
      UsageError: they were made with other sizes or settings (both values are named).
    """
    for name in ("num_examples", "num_epochs", *SETTINGS):
        ours = getattr(first, name)
        theirs = getattr(part, name)
        if ours != theirs:
            raise UsageError(f"{name} = {theirs} in part {number}, and {ours} in part 0: they have to agree")


def read_settings(store: TrajectoryStore) -> dict[str, Any]:
    """Returns what the recorder of a store was made with, name -> value of `SETTINGS`; the values are not checked.

    Raises:
      DataError: the file is missing, damaged or lacks one.
    """
    path = store.folder / SETTINGS_FILE
    try:
        settings = read_json(path)
        return {name: settings[name] for name in SETTINGS}
    except (FileNotFoundError, KeyError) as error:
        raise DataError(f"{path} is missing or damaged: {error}") from error


def put_in_place(whole: Path, folder: Path) -> None:
    """Gives a folder that was written beside another the other's name, and removes the other.

    Args:
      whole: the folder that is complete.
      folder: what it is to be called; that which has the name goes.
    """
    before = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)

    # A folder cannot be replaced in one step; between these two renames both are whole, under other names.
    whole.rename(folder)
    shutil.rmtree(before, ignore_errors=True)
