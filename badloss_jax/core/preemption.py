"""Notice to stop with everything saved: Ctrl-C, or SIGTERM to any process, as before a machine is taken away."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from badloss_jax.core.errors import PreemptedError


class Preemption:
    """Listens for SIGTERM and for Ctrl-C while it is open. A second Ctrl-C interrupts at once, as ever.

    With several processes JAX's own service listens instead, passes the notice on, and finds a point that all of them
    have still to come to: so each has to ask equally often.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._noticed: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        # Python lets no other thread set a handler.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def reached(self) -> bool:
        """Whether to save what there is and stop, now."""
        self._asked += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._noticed is not None

    def stop_if_reached(self, told: str = "; everything is saved, and the same command goes on from here") -> None:
        """Raises PreemptedError if it is time; for between phases, when everything is saved."""
        if self.reached():
            raise self.stopped(told)

    def stopped(self, told: str) -> PreemptedError:
        """Returns the error that ends the run, with the exit code of what told it to stop."""
        if self._noticed != signal.SIGINT:
            return PreemptedError(f"stopped by SIGTERM{told}")

        error = PreemptedError(f"stopped by Ctrl-C{told}")
        error.exit_code = 130  # 128 + SIGINT, as shells have it
        return error

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # The second one: whoever presses it does not want to wait.
            if self._noticed == number:
                raise KeyboardInterrupt
            print("badloss: stopping as soon as all is saved; Ctrl-C again stops at once", file=sys.stderr)

        self._noticed = number
