"""What a defence found, kept in a file: defenses/NAME.npz."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from badloss_jax.core.errors import DataError
from badloss_jax.core.files import NPZ_ERRORS, write_atomically
from badloss_jax.defenses import Suspicion

_DTYPE_KINDS = {"finite numbers": "fiu", "truth values": "b"}


def write_suspicion(path: Path, identity: str, suspicion: Suspicion, seconds: Mapping[str, float]) -> None:
    """Writes a suspicion, atomically.

    Args:
      path: of the .npz file.
      identity: hash of everything that it depends on.
      suspicion: what the defence found.
      seconds: what took how many, by phase.
    """
    record = json.dumps({"identity": identity, "seconds": dict(seconds), "details": dict(suspicion.details)})
    arrays = {
        "scores": np.asarray(suspicion.scores, np.float64),
        "about": np.frombuffer(record.encode(), np.uint8),  # an .npz file holds arrays only
    }
    for name in ("probe_scores", "removed"):
        array = getattr(suspicion, name)
        if array is not None:
            arrays[name] = np.asarray(array)

    write_atomically(path, lambda aside: np.savez(aside, **arrays))  # type: ignore[arg-type]


def read_suspicion(
    path: Path, identity: str, name: str, num_examples: int, num_probes: int
) -> tuple[Suspicion, dict[str, float]]:
    """Reads what `write_suspicion` wrote.

    Args:
      path: of the .npz file.
      identity: that it has to have.
      name: of the defence.
      num_examples, num_probes: N and P.

    Returns:
      The suspicion, and what took how many seconds, by phase.

    Raises:
      DataError: it is damaged, or belongs to something else.
    """
    try:
        # Whatever is wrong with the file becomes one error that says what to do.
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        record = json.loads(arrays.pop("about").tobytes())
        if record["identity"] != identity:
            raise ValueError("it belongs to other data, other settings or another version")

        suspicion = Suspicion(**arrays, details=dict(record["details"]))
        seconds = {phase: float(spent) for phase, spent in record["seconds"].items()}
        wrong = wrong_array(suspicion, num_examples, num_probes)
        if wrong:
            raise ValueError(f"it has {wrong}")
        if name not in seconds:
            raise ValueError(f"it does not say how long {name} took")
    except NPZ_ERRORS as error:
        raise DataError(f"{path} cannot be used: {error}; remove it to let the defence work again") from error
    return suspicion, seconds


def wrong_array(suspicion: Suspicion, num_examples: int, num_probes: int) -> str:
    """Says which array of a suspicion is not what it should be.

    Args:
      suspicion: of a defence.
      num_examples, num_probes: N and P.

    Returns:
      Its name, what it is and what was expected; "" if all are right.
    """
    expected = {
        "scores": (num_examples, "finite numbers"),
        "probe_scores": (num_probes, "finite numbers"),
        "removed": (num_examples, "truth values"),
    }
    for name, (size, values) in expected.items():
        array = getattr(suspicion, name)
        if array is None and name != "scores":
            continue

        # An object or a text array has no finite numbers to look for.
        is_of_kind = array.dtype.kind in _DTYPE_KINDS[values]
        if not is_of_kind or array.shape != (size,) or not np.isfinite(array).all():
            return f"{name}, {array.dtype} {array.shape}, that are not {size} {values}"
    return ""
