"""Runs a sweep item by item, over artefacts that all share; `badloss_jax.sweep` says what it consists of."""

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from badloss_jax.core.errors import BadlossError, BusyError, PreemptedError, UsageError
from badloss_jax.core.files import check_free, locked, write_text
from badloss_jax.core.mesh import make_mesh
from badloss_jax.core.progress import Progress
from badloss_jax.runs.experiment import run_experiment
from badloss_jax.sweep import Item, Sweep, state_of, write_sweep


def run_sweep(
    sweep: Sweep,
    folder: Path,
    chosen: Sequence[int] | None = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    shared: Path | None = None,
) -> dict[str, str]:
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
    progress = progress or Progress(None)
    mesh = mesh or make_mesh()
    items = _chosen_items(sweep, chosen)
    check_free(folder, "sweep.json", "sweep")
    with locked(folder, lambda holder: None):
        write_sweep(folder, sweep)

    runner = ItemRunner(folder, shared or folder / "shared", mesh, progress, Clock(len(items), progress))
    failed = {}
    wait = False
    while items:
        busy = []
        for item in items:
            try:
                error = runner.run(item, wait=wait)
            except BusyError:
                busy.append(item)
                continue
            if error:
                failed[item.name] = error

        # Other items come first while another process makes what these need; when nothing else is left, they wait.
        wait = len(busy) == len(items)
        items = busy
    return failed


def _chosen_items(sweep: Sweep, chosen: Sequence[int] | None) -> list[Item]:
    if chosen is None:
        return list(sweep.items)

    for number in chosen:
        if not 0 <= number < len(sweep.items):
            raise UsageError(f"there is no item {number}: the sweep has {len(sweep.items)}, from 0")
    return [sweep.items[number] for number in chosen]


class Clock:
    """Counts items, and tells how long the rest will take at the pace of those that were run so far."""

    def __init__(self, total: int, progress: Progress):
        self._total = total
        self._progress = progress
        self._passed = 0
        self._run = 0
        self._started = time.monotonic()

    def begin(self, title: str) -> None:
        """Says which item begins, and when all are likely to be done."""
        left = ""
        if self._run:
            seconds = (time.monotonic() - self._started) / self._run * (self._total - self._passed)
            left = f"  ETA {seconds // 3600:.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60:02.0f}"
        self._progress.note(f"== item {self._passed + 1} of {self._total}: {title}{left}")

    def end(self, ran: bool) -> None:
        """Counts an item that is done; whether it was run now, or by somebody before."""
        self._passed += 1
        if ran:
            self._run += 1


@dataclass(frozen=True)
class ItemRunner:
    """Runs the items of one sweep.

    Attributes:
      folder: of the sweep.
      shared: folder of the artefacts.
      mesh: the devices.
      progress: is told how far it is.
      clock: counts the items.
    """

    folder: Path
    shared: Path
    mesh: Mesh
    progress: Progress
    clock: Clock

    def run(self, item: Item, *, wait: bool) -> str | None:
        """Runs an item unless it is done.

        Args:
          item: of the sweep.
          wait: for other processes that are at work on it, or on what it needs.

        Returns:
          What went wrong, in a line; None if nothing did.

        Raises:
          BusyError: another process is at work on it, or on what it needs, and is not to be waited for.
          PreemptedError: the sweep is to stop.
        """
        if state_of(self.folder, item) == "done":
            self.clock.end(ran=False)
            return None

        def say_who(holder: str) -> None:
            self.progress.note(f"waiting for process {holder}, which is at work on: {item.title}")

        with locked(self.folder / "taken" / item.name, say_who if wait else None):
            # The process that was waited for may have done it.
            if state_of(self.folder, item) == "done":
                self.clock.end(ran=False)
                return None

            self.clock.begin(item.title)
            error = self._attempt(item, wait)
            self.clock.end(ran=True)
            return error

    def _attempt(self, item: Item, wait: bool) -> str | None:
        """Runs an item, and writes what went wrong to its folder, too."""
        workdir = self.folder / "items" / item.name
        (workdir / "error.txt").unlink(missing_ok=True)
        try:
            run_experiment(item.as_config(), workdir, self.progress, self.mesh, shared=self.shared, wait=wait)
            return None
        except (PreemptedError, BusyError):
            raise
        except (BadlossError, OSError) as error:
            line = f"{error}"
            write_text(workdir / "error.txt", line + "\n")
        except Exception as error:  # whatever it is, the other items do not depend on it
            line = f"{type(error).__name__}: {error}"
            write_text(workdir / "error.txt", traceback.format_exc())
        self.progress.note(f"   failed: {line}")
        return line
