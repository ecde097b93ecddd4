"""`badloss bench`: what all benchmarks have in common. What each measures is in `badloss_jax.benchmarks`."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from badloss_jax.benchmarks import BENCHMARKS, Benchmark, Pictured, Resumable, SetsUpDevices, find_benchmark
from badloss_jax.cli.start import set_up_jax, without_paths
from badloss_jax.core.errors import UsageError

SUMMARY = "measure speed and memory on this machine"
ABOUT = "Measure speed and memory on this machine, on synthetic data unless a data set is named."
EPILOG = None

# Options that have to be positive wherever a benchmark has them.
_POSITIVE = (
    "examples",
    "classes",
    "image_size",
    "epochs",
    "batch_size",
    "cpu_devices",
    "feature_dim",
    "seconds",
    "repeats",
)

# What two files of the same benchmark have in common.
_SAME = ("benchmark", "command", "environment")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all benchmarks, each with its own options and the common ones."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, title="benchmarks", metavar="BENCHMARK")
    for name, summary in BENCHMARKS.items():
        benchmark = find_benchmark(name)
        of_benchmark = benchmarks.add_parser(
            name,
            help=summary,
            description=benchmark.ABOUT,
            epilog=benchmark.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        benchmark.add_arguments(of_benchmark)
        of_benchmark.add_argument("--out", type=Path, metavar="FILE.json", help="keeps all figures")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs the benchmark, prints its table and writes its file, which is complete after each row of the table.

    Args:
      arguments: of the benchmark; `argv` is the command line.
      overrides: changed settings, where the benchmark has any.

    Returns:
      The exit code, 0.

    Raises:
      UsageError: a wrong option or setting.
    """
    _check(arguments)
    benchmark = find_benchmark(arguments.benchmark)
    set_up_jax()
    if isinstance(benchmark, SetsUpDevices):
        benchmark.before_jax_starts(arguments)

    # What follows asks for the devices, and so starts JAX.
    from badloss_jax.benchmarks.timing import header
    from badloss_jax.report.tables import as_text

    heading = header(arguments.benchmark, without_paths(arguments.argv))
    figures = []
    for figure in _measure(benchmark, arguments, overrides, heading):
        figures.append(figure)
        # After each, so that what is interrupted has not been in vain.
        if arguments.out:
            _write(arguments.out, heading, figures)

    print(f"{as_text(benchmark.table(figures))}\n")
    print(_machine(heading))
    if arguments.out:
        print(f"Figures: {arguments.out}")
    if arguments.out and isinstance(benchmark, Pictured):
        picture = arguments.out.with_suffix(".png")
        benchmark.save_picture(picture, figures)
        print(f"Picture: {picture}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Checks the options that mean the same in all benchmarks."""
    for name in _POSITIVE:
        value = getattr(arguments, name, None)
        # Written so that "nan" is refused, too.
        if value is not None and not value > 0:
            raise UsageError(f"--{name} {value}: expected a positive number")

    if arguments.out:
        from badloss_jax.core.files import check_writable

        check_writable(arguments.out, ".json")


def _measure(
    benchmark: Benchmark,
    arguments: argparse.Namespace,
    overrides: Sequence[str],
    heading: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Starts the benchmark, or goes on with it where it can and was interrupted."""
    if isinstance(benchmark, Resumable):
        return benchmark.resume(arguments, overrides, _kept(arguments.out, heading))
    return benchmark.measure(arguments, overrides)


def _kept(path: Path | None, heading: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the figures that this command, of this version, left in its file when it was interrupted."""
    from badloss_jax.core.files import read_json

    if path is None or not path.is_file():
        return []

    written = read_json(path)
    if any(written.get(key) != heading[key] for key in _SAME):
        return []
    return list(written["figures"])


def _write(path: Path, heading: Mapping[str, Any], figures: Sequence[Mapping[str, Any]]) -> None:
    from badloss_jax.core.files import write_text

    # NaN is refused: no other reader of JSON would take the file.
    content = {**heading, "figures": figures}
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _machine(heading: Mapping[str, Any]) -> str:
    """Returns a line on what was measured on, and how busy it was."""
    environment = heading["environment"]
    devices = environment["devices"]
    cores = environment["cpu_count"]
    load = heading["load_average"][0]
    return f"{len(devices)} x {devices[0]}, {cores} CPU cores, load average before {load:.1f}"
