"""Options that several benchmarks have: whole numbers with a default, lists of names, lists of sizes."""

from argparse import ArgumentParser
from collections.abc import Sequence

from badloss_jax.core.errors import UsageError


def add_integer(parser: ArgumentParser, name: str, default: int, meaning: str) -> None:
    """Adds an option --NAME N, whose help ends with its default.

    Args:
      parser: of the benchmark.
      name: of the option, without its dashes.
      default: its value where it is not given.
      meaning: what the help says of it.
    """
    parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} (default {default})")


def add_repeats(parser: ArgumentParser) -> None:
    """Adds the option --repeats N."""
    add_integer(parser, "repeats", 5, "of which the median counts")


def names_of(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Takes a list of names apart.

    Args:
      option: that has it, without its dashes, for the message.
      text: names with commas between; "" are none.
      known: the names that there are.

    Returns:
      The names, as they were given.

    Raises:
      UsageError: one of them is unknown.
    """
    names = [name for name in text.split(",") if name]

    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--{option} has {unknown[0]!r}: expected some of {', '.join(known)}")

    return names


def sizes_of(text: str) -> list[int]:
    """Takes the option --sizes apart; raises UsageError where it holds anything but positive numbers."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = [0]

    if min(sizes) < 1:
        raise UsageError(f"--sizes {text!r}: expected numbers of trajectories, such as 10000,50000")
    return sizes
