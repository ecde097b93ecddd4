"""Runs a sweep item by item, over artefacts that all share; `badloss_jax.sweep` says what it consists of."""

import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from badloss_jax.core.errors import BadlossError, BusyError, PreemptedError, UsageError
from badloss_jax.core.files import check_free, locked, write_text
from badloss_jax.core.mesh import make_mesh
from badloss_jax.core.progress import Progress
from badloss_jax.runs.experiment import run_experiment
from badloss_jax.sweep import Item, Sweep, state_of, write_sweep


def run_sweep(
    sweep: Sweep, folder: Path, chosen: Sequence[int] | None = None, progress: Progress | None = None,
    mesh: Mesh | None = None, shared: Path | None = None,
) -> dict[str, str]:  # fmt: skip
    """Runs the items that are not done; one that fails does not stop the others.

    Args:
      sweep: see `load_sweep`.
      folder: of the sweep, new or its own.
      chosen: numbers of the items to run, by default all.
      progress: is told how far it is.
      mesh: of the devices, all by default.
      shared: folder of the artefacts, `folder / "shared"` by default; several sweeps can have the same.

    Returns:
      What failed: name of the item -> the error, in a line.

    Raises:
      PreemptedError: the sweep is to stop; the same command goes on.
      UsageError: there is no such item, or the folder holds something else.
    """
    progress, mesh = progress or Progress(None), mesh or make_mesh()
    numbers = list(range(len(sweep.items))) if chosen is None else list(chosen)
    for number in numbers:
        if not 0 <= number < len(sweep.items):
            raise UsageError(f"there is no item {number}: the sweep has {len(sweep.items)}, from 0")
    check_free(folder, "sweep.json", "sweep")
    with locked(folder, lambda holder: None):
        write_sweep(folder, sweep)
    left, failed = [sweep.items[number] for number in numbers], dict[str, str]()
    clock, wait = _Clock(len(left), progress), False
    while left:
        busy = []
        for item in left:
            try:
                error = _run_item(item, folder, shared or folder / "shared", progress, mesh, clock, wait)
                failed |= {item.name: error} if error else {}
            except BusyError:
                busy.append(item)
        wait = len(busy) == len(left)  # other items first, while another process makes what these need
        left = busy
    return failed


class _Clock:
    """Counts items, and tells how long the rest will take at the pace of those that were run so far."""

    def __init__(self, total: int, progress: Progress):
        self._total, self._progress = total, progress
        self._seen = self._run = 0
        self._started = time.monotonic()

    def begin(self, title: str) -> None:
        left = ""
        if self._run:
            seconds = (time.monotonic() - self._started) / self._run * (self._total - self._seen)
            left = f"  ETA {seconds // 3600:.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60:02.0f}"
        self._progress.note(f"== item {self._seen + 1} of {self._total}: {title}{left}")

    def end(self, ran: bool) -> None:
        self._seen += 1
        self._run += ran


def _run_item(
    item: Item, folder: Path, shared: Path, progress: Progress, mesh: Mesh, clock: _Clock, wait: bool
) -> str | None:
    """Runs an item unless it is done; returns what went wrong.

    Raises:
      BusyError: another process is at work on it, or on what it needs, and is not to be waited for.
    """

    def told(holder: str) -> None:
        progress.note(f"waiting for process {holder}, which is at work on: {item.title}")

    if state_of(folder, item) == "done":
        clock.end(ran=False)
        return None
    with locked(folder / "taken" / item.name, told if wait else None):
        if state_of(folder, item) == "done":  # by the process that was waited for
            clock.end(ran=False)
            return None
        clock.begin(item.title)
        error = _attempt(item, folder, shared, progress, mesh, wait)
        clock.end(ran=True)
        return error


def _attempt(item: Item, folder: Path, shared: Path, progress: Progress, mesh: Mesh, wait: bool) -> str | None:
    place = folder / "items" / item.name
    (place / "error.txt").unlink(missing_ok=True)
    try:
        run_experiment(item.as_config(), place, progress, mesh, shared=shared, wait=wait)
        return None
    except (PreemptedError, BusyError):
        raise
    except Exception as error:  # whatever it is, the other items do not depend on it
        known = isinstance(error, (BadlossError, OSError))
        told = f"{error}" if known else f"{type(error).__name__}: {error}"
        write_text(place / "error.txt", told + "\n" if known else traceback.format_exc())
        progress.note(f"   failed: {told}")
        return told
