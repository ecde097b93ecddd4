"""How far the host runs ahead of the devices."""

import time
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from badloss_jax.core.memory import on_cpus

_SECONDS = 0.1  # of steps that are waited for together
_MOST = 8
_AHEAD = 4  # steps that an accelerator has before it


class InFlight:
    """What steps will say once they are done, in order.

    Accelerators have four steps before them, so that a host that is late for once does not stop them; what a step said
    is known four steps later, in every process at the same one.

    On a CPU steps of milliseconds are waited for several at a time: a host that wakes up for each of them takes a
    twentieth of the time that there is for them. There are always as many left as are waited for. Longer steps are
    waited for one at a time.

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
        self._since = time.monotonic()

        # Of all devices but a single CPU, which is slow enough to be asked how long it takes.
        self._fixed: int | None = None
        if not on_cpus(mesh):
            self._fixed = _AHEAD
        elif mesh.size > 1:
            self._fixed = 1

    def append(self, result: Any) -> None:
        """Adds the result of a step that was just started; may wait for earlier ones."""
        self._pending.append(result)
        if self._fixed is not None:
            self._wait_for(len(self._pending) - self._fixed)
            return
        if len(self._pending) < 2 * self._together:
            return

        # More than that only after steps have become slower, when too many were started.
        count = len(self._pending) - self._together
        self._wait_for(count)

        now = time.monotonic()
        seconds = (now - self._since) / count
        self._since = now
        self._together = max(1, int(_SECONDS / max(seconds, _SECONDS / _MOST)))

    def settle_all(self) -> None:
        """Waits for all."""
        self._wait_for(len(self._pending))
        self._since = time.monotonic()

    def _wait_for(self, count: int) -> None:
        for _ in range(count):
            self._settle(self._pending.pop(0))
