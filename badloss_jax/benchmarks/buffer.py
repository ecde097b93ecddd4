"""`badloss bench buffer`: what is recorded of an epoch, on the devices, at any size."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from badloss_jax.benchmarks.options import add_integer, names_of

ABOUT = """\
Allocate what is recorded of an epoch, fill it, read it back and compare, epoch by epoch, and score all of them; by
default in the shape of ImageNet-1k.
Bytes per device stand beside what arithmetic expects. All GPUs or TPU chips share it, or else so many CPU devices.
"""

EXAMPLES = """\
examples:
  badloss bench buffer --out OUT.json
  badloss bench buffer --kinds ranked,features --feature_dim 32
  badloss bench buffer --examples 50000 --cpu_devices 1
"""

_NUM_CLASSES = 1000  # ImageNet-1k's, of the kinds whose width depends on it
_NUM_FEATURES = 1  # not used: nothing is projected here


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the benchmark's own options."""
    add_integer(parser, "examples", 1_281_167, "N, rows")
    add_integer(parser, "epochs", 30, "T, columns")
    add_integer(parser, "batch_size", 256, "written at a time")
    add_integer(parser, "probes", 250, "P, of the scoring")
    add_integer(parser, "k", 50, "nearest probes")
    add_integer(parser, "feature_dim", 32, "width of the features, if recorded")
    add_integer(parser, "cpu_devices", 8, "where there is no accelerator")
    parser.add_argument("--kinds", default="", metavar="A,B", help="recorded beside the loss: ranked, features, prob")


def before_jax_starts(arguments: Namespace) -> None:
    """Sets how many devices a CPU is taken for, which JAX fixes when it starts."""
    import jax

    if jax.config.values["jax_num_cpu_devices"] != arguments.cpu_devices:
        jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)


def measure(arguments: Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures one buffer over all devices.

    Args:
      arguments: those of `add_arguments`.
      overrides: none, there are no settings.

    Yields:
      What `measure_buffer` returns.

    Raises:
      UsageError: an unknown kind, or numbers that do not go together.
      DataError: the buffer does not hold what was written into it.
    """
    from badloss_jax.benchmarks.buffer_memory import measure_buffer
    from badloss_jax.core.mesh import make_mesh
    from badloss_jax.settings import RECORDED_KINDS
    from badloss_jax.trajectories.kinds import Kinds

    names = names_of("kinds", arguments.kinds, RECORDED_KINDS)
    yield measure_buffer(
        Kinds(tuple(names), _NUM_CLASSES, _NUM_FEATURES, arguments.feature_dim),
        arguments.examples,
        arguments.epochs,
        make_mesh(),
        batch_size=arguments.batch_size,
        num_probes=arguments.probes,
        k=arguments.k,
    )


def table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: sizes, memory against the arithmetic, seconds of each part."""
    (figure,) = figures
    layout = [[name, f"{dtype} {shape}"] for name, (shape, dtype) in figure["layout"].items()]
    resident = [[f"peak RSS, {when}", f"{size / 2**20:,.0f} MiB"] for when, size in figure["peak_rss_bytes"].items()]
    return [["part", "measured"], *layout, *_memory_rows(figure), *resident, *_second_rows(figure)]


def _memory_rows(figure: Mapping[str, Any]) -> list[list[str]]:
    """Returns what each device holds, and what it needs beside that."""
    bytes_per_device = figure["bytes_per_device"]
    low = min(bytes_per_device["measured"])
    high = max(bytes_per_device["measured"])
    measured = f"{low:,}" if low == high else f"{low:,} to {high:,}"

    temporary = "unknown"
    if figure["write_temporary_bytes"] is not None:
        temporary = f"{figure['write_temporary_bytes']:,}"

    return [
        ["devices", str(figure["devices"])],
        ["bytes on each device", measured],
        ["bytes expected", f"{bytes_per_device['expected']:,}"],
        [f"bytes beside it to write {figure['batch_size']} ids", temporary],
    ]


def _second_rows(figure: Mapping[str, Any]) -> list[list[str]]:
    """Returns the seconds of each part."""
    seconds = figure["seconds"]
    return [
        ["allocate", f"{seconds['allocate']:.3f} s"],
        [f"write {figure['batch_size']} ids (median)", f"{1000 * seconds['write_batch']['median']:.3f} ms"],
        ["write an epoch in such batches", f"{seconds['write_epoch']:.2f} s"],
        ["read a column (median)", f"{seconds['read_column']['median']:.3f} s"],
        [f"score, P = {figure['probes']}, k = {figure['k']} (median)", f"{seconds['score']['median']:.2f} s"],
        ["rows scored a second", f"{figure['rows_per_second']:,.0f}"],
    ]
