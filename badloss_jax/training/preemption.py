"""Notice that the machine is about to be taken away: SIGTERM, to any process of the run."""

import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

from badloss_jax.errors import PreemptedError


class Preemption:
    """Listens for SIGTERM while it is open.

    With several processes JAX's own service listens instead, passes the notice on, and finds a point that all of them
    have still to come to: so each has to ask equally often.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._noticed = False
        self._before: signal.Handlers | object = None

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]
            self._before = None

    def reached(self) -> bool:
        """Whether to save what there is and stop, now."""
        self._asked += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._noticed

    def stop_if_reached(self) -> None:
        """Raises PreemptedError if it is time; for between phases, when everything is saved."""
        if self.reached():
            raise PreemptedError("stopped by SIGTERM; everything is saved, and the same command goes on from here")

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True
