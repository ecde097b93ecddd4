"""Where the costly things of a run lie: trajectories, networks, what defences found, and the checkpoints on the way.

In a run's own folder they have names: models/undefended. In a folder that the items of a sweep share, they are named
by the hash of all that they depend on, models/0123456789abcdef, so that each is made once, by whoever needs it first,
while the others wait.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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

    def place(self, kind: str, name: str, identity: str) -> Path:
        """Returns where an artefact lies: `kind` is "models", "defenses", ...; `name` is "" if there is but one."""
        plain = identity if self.shared else name.replace("/", "-")
        return self.folder / kind / plain if plain else self.folder / kind

    @contextmanager
    def held(self, path: Path) -> Iterator[None]:
        """Keeps an artefact to this run, all its processes, while it is looked for and, if it is not there, made.

        Raises:
          BusyError: another process makes it, and is not to be waited for.
        """
        if not self.shared:
            yield
            return
        lock = self.folder / "locks" / f"{path.parent.name}-{path.name}"
        wait = self.wait
        told = wait and (lambda holder: wait(f"waiting for process {holder}, which makes {path.name}"))
        with ExitStack() as stack:
            on_first(lambda: stack.enter_context(locked(lock, told)))  # the others of this run would wait for the first
            yield
