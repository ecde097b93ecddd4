"""Where a result was made: versions, devices, machine and commit."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from badloss_jax.core import __version__

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "numba",
    "scikit-learn",
    "ml_collections",
)
_LONGEST = 80  # characters of a commit's name


def environment() -> dict[str, Any]:
    """Returns versions, devices and machine, and the git commit when run from a checkout.

    Where git cannot tell the commit, as in a copy without .git, the environment variable BADLOSS_COMMIT does.
    """
    return {
        "badloss_jax": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu_count": len(os.sched_getaffinity(0)),  # that this process may use
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "jax_enable_x64": bool(jax.config.values["jax_enable_x64"]),
    }


def _git_commit() -> str | None:
    return _commit_of(Path(__file__).resolve().parents[2]) or _commit_told()


def _commit_of(root: Path) -> str | None:
    """Asks git for the commit of a checkout; None where there is no git, or nothing of git's."""
    if not (root / ".git").exists():
        return None

    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _commit_told() -> str | None:
    """Returns what BADLOSS_COMMIT says, which may be anything, as a short line of text."""
    told = os.environ.get("BADLOSS_COMMIT", "")
    return "".join(filter(str.isprintable, told)).strip()[:_LONGEST] or None
