"""Where a result is made: versions, devices, machine and commit; and which devices JAX need not look for."""

import importlib.util
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
_GOOGLE = "0x1ae0"  # maker of a device on the PCI bus


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


def leave_out_absent_tpus(root: Path = Path("/")) -> None:
    """Lets JAX take the CPU where libtpu is installed, to plan runs, and no TPU is: it would try, and say so at length.

    To be called before JAX looks for devices. Where it was told which to take, or may find GPUs, all stays as it is.

    Args:
      root: where /sys is.
    """
    told = jax.config.values["jax_platforms"]
    if told or importlib.util.find_spec("jax_plugins") or not importlib.util.find_spec("libtpu"):
        return
    makers = (file.read_text().strip() for file in (root / "sys/bus/pci/devices").glob("*/vendor"))
    if _GOOGLE not in makers:
        jax.config.update("jax_platforms", "cpu")


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
