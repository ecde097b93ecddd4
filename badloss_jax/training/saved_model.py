"""Trained networks on disk: weights and batch statistics by orbax, and a JSON file that says what they are.

DIR/weights/    orbax, {"params": ..., "batch_stats": ...}, each packed
DIR/about.json  format, the network's spec, the hash of what it was trained on, and what it scored
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from badloss_jax.core.errors import DataError
from badloss_jax.core.files import read_json, write_text
from badloss_jax.core.mesh import replicated
from badloss_jax.core.processes import on_first
from badloss_jax.models import ModelSpec
from badloss_jax.training.state import AdamW, TrainState, create_state

_FORMAT = "badloss_jax.model/2"


def save_model(folder: Path, spec: ModelSpec, state: TrainState, about: dict[str, Any]) -> None:
    """Saves a network; `about.json` comes last, so a folder that has one is whole.

    Args:
      folder: of this network alone; what lies there is removed.
      spec: the network.
      state: its weights and statistics.
      about: what `about.json` says beside the spec; JSON.

    Raises:
      DataError: the disk is full or the folder read-only.
    """
    weights = _weights_of(state)
    needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(weights))

    # Said before: a save that fails half-way would leave half a model.
    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"{needed} bytes are needed and {free} free")

    try:
        on_first(prepare)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.resolve() / "weights", weights)
    except (OSError, ValueError) as error:
        raise DataError(f"the model cannot be saved in {folder}: {error}") from error

    # Last: a folder without about.json holds no whole model.
    write_about(folder, {"format": _FORMAT, "spec": asdict(spec), **about})


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Writes what `read_about` reads.

    Args:
      folder: of the network.
      about: JSON, its spec included.
    """
    on_first(lambda: write_text(folder / "about.json", json.dumps(about, indent=2)))


def read_about(folder: Path) -> dict[str, Any] | None:
    """Returns what `about.json` says, or None if no whole model is there.

    Raises:
      DataError: the file is damaged, or lacks a key.
    """
    try:
        about = read_json(folder / "about.json")
    except FileNotFoundError:
        return None

    missing = {"format", "spec", "hash", "tested", "evaluation", "seconds"} - about.keys()
    if missing:
        raise DataError(f"{folder / 'about.json'} lacks {min(missing)}: remove {folder} to train this model again")
    if about["format"] != _FORMAT:
        raise DataError(
            f"{folder / 'about.json'} has format {about['format']!r}, expected {_FORMAT!r}: remove {folder} to train"
            " this model again"
        )
    return about


def load_model(folder: Path, mesh: Mesh) -> tuple[ModelSpec, TrainState]:
    """Loads a network to evaluate or to build on: its spec, and a state with a fresh optimiser.

    Args:
      folder: that `save_model` wrote.
      mesh: the devices that get it, each all of it.

    Returns:
      The spec and the state.

    Raises:
      DataError: no whole model is there, or its weights do not fit its spec.
    """
    about = read_about(folder)
    if about is None:
        raise DataError(f"{folder} holds no model")

    try:
        spec = _spec_of(about)
        state = create_state(spec, AdamW(), 0, mesh)
        everywhere = replicated(mesh)
        # Weights go straight to where they will live, and to nowhere else.
        expected = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), _weights_of(state)
        )
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(folder.resolve() / "weights", expected)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"the model in {folder} cannot be loaded: {error}") from error

    params = replace(state.params, **restored["params"])
    batch_stats = replace(state.batch_stats, **restored["batch_stats"])
    return spec, replace(state, params=params, batch_stats=batch_stats)


def _spec_of(about: dict[str, Any]) -> ModelSpec:
    """Returns the spec that a network was saved with; JSON has lists for its tuples."""
    fields: dict[str, Any] = {}
    for key, value in about["spec"].items():
        if isinstance(value, list):
            value = tuple(value)
        fields[key] = value
    return ModelSpec(**fields)


def _weights_of(state: TrainState) -> dict[str, Any]:
    return {
        name: {"kernels": packed.kernels, "vectors": packed.vectors}
        for name, packed in (("params", state.params), ("batch_stats", state.batch_stats))
    }
