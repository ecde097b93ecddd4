"""A watchdog: if nothing moves for too long, every thread's stack is printed and the process ends with exit code 1.

One process that hangs keeps all others waiting in their next collective for ever, and heartbeats do not see it. The
standard library's faulthandler watches from a thread of its own, even while the interpreter is stuck in a call.
"""

import faulthandler
import sys
import time
from types import TracebackType


class Watchdog:
    """Watches while it is open.

    Args:
      minutes: without a sign of life after which the process ends; 0 never ends it.
    """

    def __init__(self, minutes: float):
        self._seconds = minutes * 60
        self._armed = -1.0

    def __enter__(self) -> "Watchdog":
        self._arm()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Says that work got done; cheap enough for every step."""
        # Arming starts a thread, which is too much for every step.
        if time.monotonic() - self._armed > min(1.0, self._seconds / 4):
            self._arm()

    def _arm(self) -> None:
        if self._seconds:
            self._armed = time.monotonic()
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__ or 2)
