"""Where the costly things of a run lie: trajectories, networks, what defences found, and the checkpoints on the way.

In a run's own folder they have names: models/undefended. In a folder that the items of a sweep share, they are named
by the hash of all that they depend on, models/0123456789abcdef, so that each is made once, by whoever needs it first,
while the others wait.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from badloss_jax.core.files import locked
from badloss_jax.core.processes import on_first


@dataclass(frozen=True)
class Artefacts:
    """The artefacts of one folder.

    Attributes:
      folder: where they lie.
      shared: whether other processes make and use them, too.
      wait: is told which other process is waited for; None does not wait, `held` then raises BusyError.
    """

    folder: Path
    shared: bool = False
    wait: Callable[[str], object] | None = None

    def path_of(self, kind: str, name: str, identity: str) -> Path:
        """Returns where an artefact lies.

        Args:
          kind: "models", "defenses", "checkpoints", ...
          name: in a run's own folder; "" if there is but one.
          identity: hash of all that it depends on, its name in a shared folder.
        """
        if self.shared:
            return self.folder / kind / identity
        return self.folder / kind / name.replace("/", "-")

    @contextmanager
    def held(self, path: Path) -> Iterator[None]:
        """Keeps an artefact to this run, all its processes, while it is looked for and, if it is not there, made.

        Raises:
          BusyError: another process makes it, and is not to be waited for.
        """
        if not self.shared:
            yield
            return

        wait = None
        if self.wait is not None:
            wait = partial(self._say_who, self.wait, path)
        lock = self.folder / "locks" / f"{path.parent.name}-{path.name}"
        with ExitStack() as stack:
            # The first process alone: the others of this run would wait for it.
            on_first(lambda: stack.enter_context(locked(lock, wait)))
            yield

    @staticmethod
    def _say_who(wait: Callable[[str], object], path: Path, holder: str) -> None:
        wait(f"waiting for process {holder}, which makes {path.name}")
