"""`badloss report`."""

import argparse
from pathlib import Path

from badloss_jax.core.errors import UsageError

SUMMARY = "render the report of a run again"
ABOUT = """\
Render report.html, report.md and the plots again from the files of a finished run, or of one of its rescorings
(OUT/rescored/HASH). Nothing is trained or scored, and the data set is not needed.

With --sweep, tabulate and plot what is done of a sweep: DIR/report.html (look at this), report.md, results.csv, *.png.
"""
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", type=Path, metavar="OUT", help="folder of a finished run")
    what.add_argument("--sweep", type=Path, metavar="DIR", help="folder of a sweep, done or not")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Renders the report of a run or of a sweep.

    Args:
      arguments: of the command line, parsed.
      overrides: none: this command has no settings.

    Returns:
      The exit code.
    """
    if arguments.sweep:
        report_sweep(arguments.sweep)
        return 0

    from badloss_jax.core.files import locked
    from badloss_jax.report.page import write_reports

    if not (arguments.workdir / "results.json").is_file():
        raise UsageError(f"--workdir {arguments.workdir} holds no finished run (no results.json in it)")
    # A run that goes on in the folder may write the same files.
    with locked(arguments.workdir):
        print(f"Report: {write_reports(arguments.workdir)}")
    return 0


def report_sweep(folder: Path) -> None:
    """Renders what is done of a sweep, and prints its short tables."""
    from badloss_jax.report.sweep import write_sweep_report
    from badloss_jax.report.tables import as_text

    for title, table in write_sweep_report(folder):
        print(f"\n{title}\n\n{as_text(table)}")
    print(f"\nReport: {folder / 'report.html'}")
