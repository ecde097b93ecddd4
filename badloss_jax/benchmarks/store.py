"""`badloss bench store`: scoring trajectories from the disk, and its memory."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from badloss_jax.benchmarks.options import add_integer, names_of, sizes_of

ABOUT = (
    "Write stores of losses to the temporary folder, score each as `badloss"
    " score --trajectories` does, and measure seconds and anonymous memory."
)

EXAMPLES = ""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the benchmark's own options."""
    parser.add_argument("--sizes", default="1000000,10000000", metavar="N,N", help="(default 1000000,10000000)")
    parser.add_argument("--dtypes", default="float32", metavar="D", help="as stored: float32 or float16")
    parser.add_argument("--classes", type=int, metavar="K", help="look for attacks, too, in so many classes")
    add_integer(parser, "epochs", 30, "T")
    add_integer(parser, "probes", 250, "P")


def measure(arguments: Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures the scoring of one store after the other.

    Args:
      arguments: those of `add_arguments`.
      overrides: none, there are no settings.

    Yields:
      What `measure_store` yields, for each dtype.

    Raises:
      UsageError: an unknown dtype, or an impossible size.
      DataError: the scoring failed.
    """
    from badloss_jax.benchmarks.stored_scoring import measure_store

    for dtype in names_of("dtypes", arguments.dtypes, ("float32", "float16")):
        sizes = sizes_of(arguments.sizes)
        yield from measure_store(sizes, arguments.epochs, arguments.probes, dtype, arguments.classes or 0)


def table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: per store its size, seconds per phase, and the peak of anonymous memory."""
    rows = [["N", "T", "dtype", "stored", "distances", "clusters", "all", "examples/s", "anonymous memory"]]
    for figure in figures:
        seconds = figure["seconds"]
        clusters = ""
        if seconds.get("clusters") is not None:
            clusters = f"{seconds['clusters']:.2f} s"

        rows.append(
            [
                f"{figure['examples']:,}",
                str(figure["epochs"]),
                figure["dtype"],
                f"{figure['stored_bytes'] / 1e9:.2f} GB",
                f"{seconds['distances']:.2f} s",
                clusters,
                f"{seconds['all']:.2f} s",
                f"{figure['examples_per_second']:,.0f}",
                f"{figure['anonymous_bytes'] / 2**20:,.0f} MiB",
            ]
        )
    return rows
