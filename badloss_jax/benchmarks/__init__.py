"""What `badloss bench` measures: speed, memory, and what a scan finds. May import everything but `cli`.

A benchmark is a module here, called as on the command line, and a line in `BENCHMARKS`; `Benchmark` says what the
module holds. It imports nothing heavy before it measures, so that no help text waits for JAX, and a long measurement is
a module of its own, named after what it measures. `badloss_jax.cli.bench` does what all have in common: it writes the
figures and prints the table. Begin with `input`, then read `decoding`, which it measures.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

BENCHMARKS = {
    "train": "training, and what recording costs",
    "buffer": "the trajectory buffer at any size",
    "input": "decoding images on the host",
    "scorer": "scoring, beside scikit-learn, FAISS, NumPy and top_k",
    "detectors": "every detector, on the files of a finished run",
    "store": "scoring trajectories from the disk, and its memory",
    "numerics": "how far float32 is from float64 with this JAX",
    "scan": "what a scan finds in a poisoned folder of images",
}


@runtime_checkable
class Benchmark(Protocol):
    """What the module of a benchmark holds.

    Attributes:
      ABOUT: what it measures, for its help.
      EXAMPLES: commands, for the end of its help; "" if it needs none.
    """

    ABOUT: str
    EXAMPLES: str

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Adds the options that are its own; the default `configurable=True` lets settings of a config be changed."""

    def measure(self, arguments: Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Measures.

        Args:
          arguments: the options, its own and the common ones.
          overrides: settings, each "--config.GROUP.KEY=VALUE"; none, unless it is configurable.

        Yields:
          Figures that JSON can hold, each of them as soon as it is known.

        Raises:
          UsageError: an option or a setting is wrong; nothing has been measured.
        """
        ...

    def table(self, figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Returns the header and the rows of a table of the figures."""
        ...


@runtime_checkable
class SetsUpDevices(Benchmark, Protocol):
    """A benchmark that changes what JAX fixes when it starts."""

    def before_jax_starts(self, arguments: Namespace) -> None:
        """Sets it."""


@runtime_checkable
class Resumable(Benchmark, Protocol):
    """A benchmark so long that it goes on after the figures that an interrupted one has left in its file."""

    def resume(
        self,
        arguments: Namespace,
        overrides: Sequence[str],
        kept: Sequence[dict[str, Any]],
    ) -> Iterator[dict[str, Any]]:
        """Measures what is not measured yet.

        Args:
          arguments: as of `measure`.
          overrides: as of `measure`.
          kept: figures that the same command has left, on the same machine and by the same version; perhaps none.

        Yields:
          As `measure` does, those that were kept at their place among the others.
        """
        ...


@runtime_checkable
class Pictured(Benchmark, Protocol):
    """A benchmark with a picture, which lies beside the file of its figures."""

    def save_picture(self, path: Path, figures: Sequence[Mapping[str, Any]]) -> None:
        """Draws the figures.

        Args:
          path: of the PNG file.
          figures: all that were measured.
        """


def find_benchmark(name: str) -> Benchmark:
    """Imports the module of one of `BENCHMARKS`."""
    return cast(Benchmark, import_module(f"{__name__}.{name}"))
