"""The poison manifest: for each attack its target class, trigger parameters and the example ids that it poisons.

Attacks never write images. The manifest and the source reproduce a poisoned training set bit by bit. What it holds is
in `plan`, how it is drawn in `draws`; here it is read from a file that may come from anybody.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from badloss_jax.attacks import ATTACKS
from badloss_jax.attacks.draws import choose_probes, draw_manifest
from badloss_jax.attacks.plan import FORMAT, AttackPlan, Manifest
from badloss_jax.core.errors import BadlossError, DataError, UsageError
from badloss_jax.core.files import read_json

__all__ = ["AttackPlan", "Manifest", "choose_probes", "draw_manifest", "load_manifest", "read_manifest"]

_MAX_PERTURBATION = 127  # in 1/255, as int8 holds
_MAX_PARAMETER = 1e6


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest that may come from anybody.

    Raises:
      UsageError: no such file.
      DataError: it is not a manifest, or names unknown attacks, impossible parameters or targets, or an id twice.
    """
    try:
        raw = read_json(path)
        if raw.get("format") != FORMAT:
            raise DataError(f"its format is not {FORMAT}")

        height, width, channels = (_integer(size) for size in raw["image_shape"])
        manifest = Manifest(
            num_examples=_integer(raw["num_examples"]),
            num_classes=_integer(raw["num_classes"]),
            image_shape=(height, width, channels),
            attacks={str(name): _plan(plan) for name, plan in raw["attacks"].items()},
        )
        for name, plan in manifest.attacks.items():
            _check_plan(name, plan, manifest)
        _check_ids(manifest)
    except FileNotFoundError as error:
        raise UsageError(f"manifest {path} does not exist") from error
    except (BadlossError, KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is not a usable manifest: {error}") from error
    return manifest


def load_manifest(path: Path, num_examples: int, num_classes: int, image_shape: tuple[int, int, int]) -> Manifest:
    """Reads a manifest for a training set of the given size.

    Args:
      path: of the manifest.
      num_examples: N of the training set.
      num_classes: K.
      image_shape: (H, W, C).

    Returns:
      The manifest.

    Raises:
      UsageError: no such file, or it was made for another data set (both sizes are named).
      DataError: see `read_manifest`.
    """
    manifest = read_manifest(path)
    ours = (num_examples, num_classes, tuple(image_shape))
    theirs = (manifest.num_examples, manifest.num_classes, manifest.image_shape)
    if ours != theirs:
        raise UsageError(
            f"attacks.manifest: {path} was made for (examples, classes, image shape) = {theirs}, and this training set"
            f" has {ours}"
        )
    return manifest


def _plan(raw: Mapping[str, Any]) -> AttackPlan:
    """Reads the types of one attack's plan; whether it makes sense is checked when the whole is there."""
    parameters = {str(key): float(value) for key, value in raw["parameters"].items()}
    example_ids = tuple(_integer(i) for i in raw["example_ids"])

    perturbation = tuple(raw.get("perturbation", ()))
    if not all(type(value) is int and abs(value) <= _MAX_PERTURBATION for value in perturbation):
        raise DataError("a perturbation holds something else than integers from -127 to 127")

    below_ids = tuple(_integer(i) for i in raw.get("below_ids", ()))
    return AttackPlan(
        target=_integer(raw["target"]),
        seed=_integer(raw["seed"]),
        example_ids=example_ids,
        parameters=parameters,
        perturbation=perturbation,
        below_ids=below_ids,
    )


def _check_plan(name: str, plan: AttackPlan, manifest: Manifest) -> None:
    if name not in ATTACKS:
        raise DataError(f"unknown attack {name!r}: expected one of {', '.join(ATTACKS)}")

    expected = ATTACKS[name].parameters
    if plan.parameters.keys() != set(expected):
        raise DataError(f"attack {name!r} has the parameters {sorted(plan.parameters)}, expected {list(expected)}")
    for key, value in plan.parameters.items():
        if not 0 < value <= (1 if key == "strength" else _MAX_PARAMETER):
            raise DataError(f"attack {name!r} has {key} {value}")

    if not 0 <= plan.target < manifest.num_classes:
        raise DataError(f"attack {name!r} has target {plan.target} of {manifest.num_classes} classes")
    if not plan.example_ids:
        raise DataError(f"attack {name!r} poisons nothing")

    # A perturbation has a value for every pixel and channel; the other triggers have none.
    size = math.prod(manifest.image_shape) if ATTACKS[name].optimised else 0
    if len(plan.perturbation) != size:
        raise DataError(f"attack {name!r} has a perturbation of {len(plan.perturbation)} values, expected {size}")


def _check_ids(manifest: Manifest) -> None:
    """Refuses ids that are none, that are poisoned twice, or that lie below what is no other attack's trigger."""
    ids = manifest.poisoned_ids
    outside = ids[(ids < 0) | (ids >= manifest.num_examples)]
    if len(outside):
        raise DataError(f"example id {outside[0]} is outside 0 to {manifest.num_examples - 1}")

    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        raise DataError(f"example id {unique[counts > 1][0]} is poisoned twice")

    # An example has one trigger below its own at most, so its id is in one list alone.
    below = [i for plan in manifest.attacks.values() for i in plan.below_ids]
    repeated = len(set(below)) < len(below)
    for plan in manifest.attacks.values():
        others = set(unique.tolist()) - set(plan.example_ids)
        strangers = set(plan.below_ids) - others
        if strangers or repeated:
            raise DataError(f"below_ids name {min(strangers, default='an id')} that no other attack poisons, or twice")


def _integer(value: Any) -> int:
    # To Python True is an int, to JSON it is none.
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise DataError(f"{value!r} is not a non-negative integer")
    return value
