"""`badloss bench scorer`: scoring, beside scikit-learn, FAISS, NumPy and top_k."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from badloss_jax.benchmarks.options import add_integer, add_repeats, names_of, sizes_of
from badloss_jax.core.errors import UsageError

ABOUT = """\
Score synthetic trajectories by every kernel of badloss_jax and by scikit-learn, FAISS (if installed), NumPy and
jax.lax.top_k, in turns and with the same threads: seconds, rates beside the machine's own limits, memory, error
against float64. --out also writes a plot of seconds against N.
"""

EXAMPLES = """\
examples:
  badloss bench scorer --out OUT.json
  badloss bench scorer --sizes 1000000 --methods numba,xla,faiss --dtypes float32,float16
  badloss bench detectors --workdir OUT    every detector on the trajectories of a finished run
"""

_MARKERS = "osD^v<>Px*"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the benchmark's own options."""
    parser.add_argument(
        "--sizes",
        default="10000,50000,200000,1281167",
        metavar="N,N",
        help="trajectories, each in turn (default 10000,50000,200000,1281167)",
    )
    parser.add_argument("--methods", default="", metavar="A,B", help="default: all")
    parser.add_argument(
        "--dtypes", default="float32", metavar="A,B", help="as stored: float32, float16 (default float32)"
    )
    add_integer(parser, "epochs", 30, "T")
    add_integer(parser, "probes", 250, "P")
    add_integer(parser, "k", 50, "nearest probes")
    add_repeats(parser)


def measure(arguments: Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures every method at every size.

    Args:
      arguments: those of `add_arguments`.
      overrides: none, there are no settings.

    Yields:
      What `measure_scorer` yields.

    Raises:
      UsageError: an unknown method or dtype, an impossible size, or k outside 1..P.
    """
    from badloss_jax.benchmarks.scoring_methods import KERNELS, PEERS
    from badloss_jax.benchmarks.scoring_speed import measure_scorer

    sizes = sizes_of(arguments.sizes)
    dtypes = names_of("dtypes", arguments.dtypes, ("float32", "float16"))
    if not 1 <= arguments.k <= arguments.probes:
        raise UsageError(f"--k {arguments.k} with --probes {arguments.probes}: expected 1 <= k <= P")
    every = (*KERNELS, *PEERS)
    methods = names_of("methods", arguments.methods, every) or every

    yield from measure_scorer(
        sizes,
        arguments.epochs,
        arguments.probes,
        arguments.k,
        dtypes,
        methods,
        arguments.repeats,
    )


def table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: per N, dtype and method seconds, rates, memory and errors."""
    rows = [["N", "method", "dtype", "seconds", "vs numba", "examples/s", "GB/s", "GFLOP/s", "MiB", "error", "offset"]]

    # What others are compared with, at the same N and dtype.
    numba_seconds = {
        (figure["examples"], figure["dtype"]): figure["seconds"]["median"]
        for figure in figures
        if figure["method"] == "numba"
    }
    for figure in figures:
        seconds = figure["seconds"]["median"]
        numba = numba_seconds.get((figure["examples"], figure["dtype"]))
        rows.append(
            [
                f"{figure['examples']:,}",
                figure["method"],
                figure["dtype"],
                f"{seconds:.4f}",
                f"{seconds / numba:.1f}" if numba else "",
                f"{figure['examples_per_second']:,.0f}",
                f"{figure['bytes_per_second'] / 1e9:.2f}",
                f"{figure['flops_per_second'] / 1e9:.1f}",
                f"{figure['memory_bytes'] / 2**20:.0f}",
                f"{figure['error']:.0e}",
                f"{figure['offset_error']:.0e}",
            ]
        )

    # The same for all: they were measured once, at the beginning.
    limits = figures[0]["limits"]
    copied = f"{limits['copy_bytes_per_second'] / 1e9:.2f}"
    multiplied = f"{limits['matmul_flops_per_second'] / 1e9:.1f}"
    rows.append(["", "limit: copy, matmul", "float32", "", "", "", copied, multiplied, "", "", ""])
    return rows


def save_picture(path: Path, figures: Sequence[Mapping[str, Any]]) -> None:
    """Plots seconds against N, both logarithmic: a straight line of slope one is linear.

    Args:
      path: of the PNG file.
      figures: what `measure` yields.
    """
    from matplotlib.figure import Figure

    from badloss_jax.benchmarks.scoring_methods import KERNELS
    from badloss_jax.core.files import write_atomically

    lines: dict[str, list[tuple[int, float]]] = {}
    for entry in figures:
        name = entry["method"]
        if entry["dtype"] != "float32":
            name += f", {entry['dtype']}"
        lines.setdefault(name, []).append((entry["examples"], entry["seconds"]["median"]))

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for (name, points), marker in zip(lines.items(), _MARKERS, strict=False):
        is_ours = name.split(",")[0] in KERNELS
        axis.plot(*zip(*sorted(points), strict=True), marker=marker, linewidth=2.5 if is_ours else 1.2, label=name)

    shape = figures[0]
    title = f"T = {shape['epochs']}, P = {shape['probes']}, k = {shape['k']}, {shape['threads']} CPU cores"
    axis.set(xscale="log", yscale="log", xlabel="trajectories N", ylabel="seconds (median)", title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    write_atomically(path, lambda aside: figure.savefig(aside, dpi=110))
