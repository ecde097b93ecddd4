"""`badloss summary`."""

import argparse
from pathlib import Path

SUMMARY = "mean and spread over several seeds"
ABOUT = """\
Print a Markdown table over finished runs that differ in their seed alone: of each trained model the mean, and the
standard deviation of the sample, in percent (AUROC: 0 to 1).
"""
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="OUT", help="folders of finished runs, or copies of their results.json"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints the table.

    Args:
      arguments: of the command line, parsed.
      overrides: none: this command has no settings.

    Returns:
      The exit code.
    """
    from badloss_jax.report.results import read_results
    from badloss_jax.report.tables import as_markdown, summary

    files = [path if path.suffix == ".json" else path / "results.json" for path in arguments.runs]
    print(as_markdown(summary([read_results(file) for file in files])))
    return 0
