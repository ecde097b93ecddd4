"""`badloss bench detectors`: every detector, on the files of a finished run."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from badloss_jax.benchmarks.options import add_repeats

ABOUT = (
    "Time every detector from a run's stored trajectories to its removal"
    " lists, and say what float16 in place of float32 trajectories would change."
)

EXAMPLES = ""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the benchmark's own options."""
    parser.add_argument("--workdir", type=Path, required=True, metavar="OUT", help="folder of a finished run")
    add_repeats(parser)


def measure(arguments: Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures one detector after the other.

    Args:
      arguments: those of `add_arguments`.
      overrides: none, the settings are the run's.

    Yields:
      What `measure_detectors` yields.

    Raises:
      UsageError: there is no finished run in the folder.
      DataError: it is damaged.
    """
    from badloss_jax.benchmarks.detection_speed import measure_detectors

    yield from measure_detectors(arguments.workdir, arguments.repeats)


def table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: per detector seconds, AUROC, and what storing float16 in place of float32 changes."""
    rows = [["detector", "examples", "seconds", "examples/s", "AUROC", "as float16", "rank corr.", "removed, changed"]]
    for figure in figures:
        rows.append(
            [
                figure["detector"],
                f"{figure['examples']:,}",
                f"{figure['seconds']['median']:.4f}",
                f"{figure['examples_per_second']:,.0f}",
                _auroc_cell(figure),
                *_float16_cells(figure["float16"]),
            ]
        )
    return rows


def _float16_cells(changes: Mapping[str, Any] | None) -> list[str]:
    """Returns AUROC, correlation of the ranks and the removed that change; empty where float16 is what is stored."""
    if changes is None:
        return ["", "", ""]
    return [
        _auroc_cell(changes),
        f"{changes['rank_correlation']:.7f}",
        f"{100 * changes['removed_changed']:.3f} %",
    ]


def _auroc_cell(figure: Mapping[str, Any]) -> str:
    if figure["auroc"] is None:
        return ""
    return f"{figure['auroc']:.4f}"
