"""How far the host runs ahead of the devices."""

import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from badloss_jax.core.memory import on_cpus

_SECONDS = 0.1  # of steps that are waited for together
_MOST = 8


class InFlight:
    """What steps will say once they are done, in order.

    Steps of milliseconds are waited for several at a time: a host that wakes up for each of them takes a twentieth of
    the time that a CPU has for them. The devices always have as many before them as are waited for. Longer steps are
    waited for one at a time, and so are those of several processes, which have to find out the same at the same step.

    Those of several CPU devices as well: XLA has one thread for each. Where a device has 32 programs before it the next
    one waits in such a thread, and others wait in theirs for what all devices are to add up: then nothing goes on.

    Args:
      settle: is called with a step's result once all before it have been settled; waits for it.
      mesh: that the steps run on.
    """

    def __init__(self, settle: Callable[[Any], object], mesh: Mesh):
        self._settle = settle
        self._pending: list[Any] = []
        self._together = 1
        self._one_at_a_time = jax.process_count() > 1 or (on_cpus(mesh) and mesh.size > 1)
        self._since = time.monotonic()

    def append(self, result: Any) -> None:
        """Adds the result of a step that was just started; may wait for earlier ones."""
        self._pending.append(result)
        if len(self._pending) < 2 * self._together:
            return

        # More than that only after steps have become slower, when too many were started.
        count = len(self._pending) - self._together
        self._wait_for(count)

        now = time.monotonic()
        seconds = (now - self._since) / count
        self._since = now
        if not self._one_at_a_time:
            self._together = max(1, int(_SECONDS / max(seconds, _SECONDS / _MOST)))

    def settle_all(self) -> None:
        """Waits for all."""
        self._wait_for(len(self._pending))
        self._since = time.monotonic()

    def _wait_for(self, count: int) -> None:
        for _ in range(count):
            self._settle(self._pending.pop(0))
