"""Progress of long work: a bar with rate and ETA in a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Counts examples of one phase after the other.

    Args:
      stream: to print to; with None it is silent.
      seconds_between_lines: at the least, where the stream is no terminal.
    """

    def __init__(self, stream: TextIO | None = sys.stderr, seconds_between_lines: float = 10.0):
        self._stream = stream
        self._between = seconds_between_lines
        self._title = ""
        self._bar: tqdm | None = None

        # The monotonic clock's, in seconds.
        self._started = 0.0
        self._last_line = 0.0

        # Examples.
        self._before = 0
        self._done = 0
        self._total = 0

    def phase(self, title: str) -> None:
        """Names the phase that begins."""
        self._title = title

    def note(self, text: str) -> None:
        """Prints a line of its own."""
        if self._stream:
            print(text, file=self._stream, flush=True)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Tells how long a step takes of which nothing else can be told: now and then, and at its end.

        Args:
          text: what is done, such as "compiling the training step".
        """
        started = time.monotonic()
        over = threading.Event()

        def tell() -> None:
            while not over.wait(3 * self._between):
                self.note(f"{text} ... {_clock(time.monotonic() - started)}")

        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        try:
            yield
        finally:
            over.set()
            telling.join()
        self.note(f"{text}  {_clock(time.monotonic() - started)}")

    def begin(self, total: int, done: int = 0) -> None:
        """Starts counting.

        Args:
          total: examples of this phase.
          done: those of them that an earlier run did; they do not count for the rate.
        """
        now = time.monotonic()
        self._started = now
        self._last_line = now

        self._before = done
        self._done = done
        self._total = total

        if self._stream and self._stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=self._title,
                unit=" examples",
                unit_scale=True,
                file=self._stream,
                leave=False,
                mininterval=0.5,
                dynamic_ncols=True,
            )

    def advance(self, count: int, where: str) -> None:
        """Counts more examples.

        Args:
          count: how many.
          where: the phase stands, to be shown beside the bar.
        """
        self._done += count
        if self._bar is not None:
            self._bar.set_postfix_str(where, refresh=False)
            self._bar.update(count)

    def say(self, text: str) -> None:
        """Tells where the phase stands, outside a terminal at most every few seconds."""
        if not self._stream or self._bar is not None:
            return
        now = time.monotonic()
        if now - self._last_line < self._between:
            return
        self._last_line = now

        rate = (self._done - self._before) / (now - self._started)
        left = (self._total - self._done) / max(rate, 1e-9)
        self.note(f"{self._title}  {text}  {rate:,.0f} examples/s  ETA {left // 60:.0f}:{left % 60:02.0f}")

    def end(self) -> None:
        """Ends the phase with one line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

        seconds = time.monotonic() - self._started
        done = self._done - self._before
        self.note(f"{self._title}  {done:,} examples in {seconds:.1f} s ({done / seconds:,.0f}/s)")


def _clock(seconds: float) -> str:
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"
