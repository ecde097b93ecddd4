"""What a run spends: the seconds of each phase, whose they are, and which training of how many is at work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Entry:
    """A phase at work.

    Attributes:
      before: seconds that it had taken before it was taken up again.
      elsewhere: seconds since then that it waited for what other phases make.
      used: what it stands on: phase -> seconds that this took, whenever it was made.
      seconds: its own, once it is over.
    """

    before: float = 0.0
    elsewhere: float = 0.0
    used: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def so_far(self) -> float:
        """Returns its own seconds up to now."""
        return self.before + time.monotonic() - self.started - self.elsewhere


@dataclass
class Ledger:
    """The seconds and trainings of one run; `with ledger("recording"):` measures a phase.

    Attributes:
      planned: how many trainings there will be, as far as settings tell.
      seconds: phase -> what it took, by whomever it was made.
      begun: how many trainings have begun, or were found done.
    """

    planned: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    begun: int = 0
    _at_work: Entry | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[Entry]:
        """Measures a phase, but for what it waits for (`standing_on`).

        Args:
          phase: its name in results.json.

        Yields:
          Its entry. Whoever finds the phase done before sets its `seconds`, and what it `used`.
        """
        outer = self._at_work
        entry = Entry()
        self._at_work = entry
        try:
            yield entry
        finally:
            self._at_work = outer

        # Not if it failed: what has no end has no seconds.
        entry.seconds = entry.seconds or entry.so_far()
        self.seconds[phase] = entry.seconds

    @contextmanager
    def standing_on(self, phase: str) -> Iterator[None]:
        """Notes that the phase at work stands on another one, whose time is not its own."""
        started = time.monotonic()
        yield

        if self._at_work is not None:
            self._at_work.elsewhere += time.monotonic() - started
            self._at_work.used[phase] = self.seconds[phase]

    def skip(self, trainings: int) -> None:
        """Counts trainings whose outcome was found done, so that they are not begun."""
        self.begun += trainings

    def number(self, training: str) -> str:
        """Counts a training, and returns its title, such as "[2/7] undefended"."""
        self.begun += 1
        return f"[{self.begun}/{max(self.begun, self.planned)}] {training}"
