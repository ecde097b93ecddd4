"""Errors that a user can act on, with the exit code that the command line gives for each, and naming the nearest."""

import difflib
from collections.abc import Sequence
from typing import Any


class BadlossError(Exception):
    """A failure with an explanation; the command line prints it without a traceback and exits with `exit_code`.

    Attributes:
      together: whether every process of the run raises it.
    """

    exit_code = 1
    together = False


class UsageError(BadlossError, ValueError):
    """A setting or an argument is wrong: nothing was started. Exit code 2."""

    exit_code = 2


class BusyError(UsageError):
    """Another process holds what this one needs. Exit code 2."""


class DataError(BadlossError, ValueError):
    """A file or an array does not hold what it should. Exit code 1."""


class NonFiniteLossError(BadlossError, FloatingPointError):
    """A training loss became NaN or infinite. Exit code 1."""

    together = True


class PreemptedError(BadlossError):
    """The run was told to stop and saved all: the same command goes on. Exit code 75 (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75
    together = True


def one_of(key: str, value: Any, choices: Sequence[Any]) -> None:
    """Checks that a setting's value is one of the choices.

    Args:
      key: of the setting, as the user writes it.
      value: that it has.
      choices: that there are.

    Raises:
      UsageError: it is none of them; the nearest one is named.
    """
    if value not in choices:
        raise UsageError(f"{key} has {value!r}: expected one of {listed(choices)}{nearest(value, choices)}")


def listed(names: Sequence[Any]) -> str:
    """Returns names as a message lists them."""
    return ", ".join(str(name) for name in names)


def nearest(value: Any, known: Sequence[Any]) -> str:
    """Names what comes nearest to a value, to go at the end of a message.

    Args:
      value: that is none of the known ones.
      known: what it could have been.

    Returns:
      "; did you mean ...?", or "" if nothing comes near.
    """
    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(value), names, 1, cutoff=0.5)
    if not close:
        # A right last part under a wrong group.
        last = str(value).rpartition(".")[2]
        close = [name for name in names if name.rpartition(".")[2] == last]

    if not close:
        return ""
    return f"; did you mean {close[0]!r}?"
