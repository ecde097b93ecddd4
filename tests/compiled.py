"""What XLA compiles for tests, about a third of their CPU time, is kept from one session to the next.

All processes of a session, those that tests start included, share one folder, which begins as a copy of the kept one. A
session adds to that only if it passes, so that no file stays that a killed process left torn. JAX names each program by
all that it depends on: its code, the compiler with its options, the CPU.
"""

import atexit
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

KEPT = Path("~/.cache/badloss_jax/tests").expanduser()
MOST = 500_000_000  # bytes; all tests together write 35 million
_NAME = "JAX_COMPILATION_CACHE_DIR"


def begin(kept: Path = KEPT) -> Path | None:
    """Makes the session's folder, and names it in the environment; returns None where that names one already.

    As it does in workers, in what tests start, and where somebody wants another place.
    """
    if _NAME in os.environ:
        return None
    own = Path(tempfile.mkdtemp(prefix="badloss-xla-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    os.environ[_NAME] = str(own)

    # Whatever is wrong with the kept folder, all can be compiled again.
    with suppress(OSError):
        # Programs of code that is no more would stay for ever: at some size all begins anew.
        if sum(file.stat().st_size for file in kept.iterdir()) > MOST:
            shutil.rmtree(kept)
        else:
            shutil.copytree(kept, own, dirs_exist_ok=True)
    return own


def keep(own: Path, kept: Path = KEPT) -> None:
    """Adds what a session compiled to what is kept."""
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as aside:
        for file in own.iterdir():
            if not (kept / file.name).exists():
                os.replace(shutil.copy(file, aside), kept / file.name)


_own = begin()


def pytest_sessionfinish(exitstatus):
    if _own is not None and exitstatus == pytest.ExitCode.OK:
        try:
            keep(_own)
        except OSError as error:
            print(f"\nwhat was compiled is not kept for the next session: {error}")
