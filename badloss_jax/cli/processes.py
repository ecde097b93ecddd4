"""What commands share that can run as many processes: options that say which this one is, joining and leaving."""

import argparse
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from badloss_jax.cli.start import explain, out_of_memory
from badloss_jax.core.errors import BadlossError, UsageError


def add_arguments_of_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which process this is, of how many."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="as one of many processes that share the work and OUT; Slurm, Open MPI, GKE and Cloud TPUs say the rest,"
        " elsewhere give the three below",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 runs, and a free port of it")
    parser.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    parser.add_argument("--process_id", type=int, metavar="I", help="which of them this is, from 0")
    parser.add_argument(
        "--timeout", type=int, default=300, metavar="SECONDS", help="to wait for the others (default 300)"
    )


@contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes, if there are to be any, and leaves them to themselves if this one fails alone.

    Args:
      arguments: of the command line, parsed.

    Raises:
      UsageError: the options contradict each other, or the others do not come in time.
    """
    from badloss_jax.core.processes import connect, leave

    address = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if not arguments.distributed:
        if any(value is not None for value in address):
            raise UsageError("--coordinator, --num_processes and --process_id need --distributed")
        yield
        return

    # One that fails alone must not wait for the others at the end, nor they for it.
    connect(*address, arguments.timeout)
    try:
        yield
    except BadlossError as error:
        leave(error, explain(error))
    except Exception as error:
        exhausted = out_of_memory(error)
        if exhausted is not None:
            leave(exhausted, explain(exhausted))
        traceback.print_exc()
        leave(None, 1)
