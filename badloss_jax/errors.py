"""Errors that a user can act on, and the exit code that the command line gives for each."""


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
