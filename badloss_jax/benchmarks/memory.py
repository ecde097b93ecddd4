"""Memory of processes: the most that was resident, and the anonymous part, which no file stands behind."""

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_SECONDS_BETWEEN_SAMPLES = 0.002


@dataclass
class Peak:
    """The most anonymous memory beyond what there was at the beginning, in bytes."""

    size: int = 0


def peak_rss() -> int:
    """Returns the most bytes that were resident of this process, since it began."""
    # Linux gives kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def anonymous_memory(process: int | str = "self") -> int:
    """Returns a process's anonymous memory in bytes, 0 if it is over."""
    try:
        with open(f"/proc/{process}/status") as status:
            return next((1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


@contextmanager
def sampled_peak() -> Iterator[Peak]:
    """Samples this process's anonymous memory from a thread; what it yields holds the peak at the end."""
    begun = anonymous_memory()
    peak = Peak()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SECONDS_BETWEEN_SAMPLES):
            peak.size = max(peak.size, anonymous_memory() - begun)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
