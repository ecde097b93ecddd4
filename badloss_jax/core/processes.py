"""The processes of one run: how they find each other, agree, and share what the first one alone may do.

Everything here is a no-op with one process, so that a run is written once for any number. Collectives stand outside of
`if first()`: every process comes by, and only writing and printing are the first one's.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from badloss_jax.core.errors import BadlossError, DataError, UsageError

T = TypeVar("T")

_ADVICE = (
    "Check that the coordinator is the machine of process 0 and can be reached from all others at this port, and that"
    " all processes were started. Outside of Slurm, Open MPI, GKE and Cloud TPUs, --coordinator HOST:PORT,"
    " --num_processes and --process_id say what JAX cannot find out"
)


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int = 300) -> None:
    """Joins the other processes; to be called before anything asks JAX for its devices.

    Args:
      coordinator: HOST:PORT of process 0; None on Slurm, Open MPI, GKE and Cloud TPUs, where JAX finds out by itself.
      num_processes, process_id: likewise.
      timeout: seconds to wait for all of them.

    Raises:
      UsageError: no cluster was found, or the others did not come in time.
    """
    given = [coordinator is not None, num_processes is not None, process_id is not None]
    if any(given) and not all(given):
        raise UsageError("--coordinator, --num_processes and --process_id belong together: give all three or none")
    if coordinator is not None and process_id is not None:
        _check_coordinator(coordinator, process_id == 0, timeout)

    # Where not all come in time, XLA ends the process without a chance to say more than it does.
    advice = threading.Timer(0.9 * timeout, lambda: print(f"badloss: warning: {_ADVICE}", file=sys.stderr, flush=True))
    advice.daemon = True
    advice.start()

    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=timeout, heartbeat_timeout_seconds=60
        )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise UsageError(f"the processes did not find each other: {str(error).splitlines()[0]}. {_ADVICE}") from error
    finally:
        advice.cancel()

    # Connects the devices while all are here: later, gloo gives whoever is first half a minute.
    all_of(True)
    multihost_utils.sync_global_devices("connected")


def _check_coordinator(address: str, here: bool, timeout: float) -> None:
    """Raises UsageError unless the port of process 0 is free, `here`, or answers in time, elsewhere."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UsageError(f"--coordinator {address!r}: expected HOST:PORT, such as node1:12345")

    if here:
        _check_port_is_free(address, int(port))
    else:
        _wait_for_answer(address, host.strip("[]"), int(port), timeout)


def _check_port_is_free(address: str, port: int) -> None:
    family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
    try:
        with socket.socket(family) as listener:
            # Else a port that was just left would count as taken for a minute.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
    except OSError as error:
        raise UsageError(f"--coordinator {address}: process 0 cannot listen at this port: {error}") from error


def _wait_for_answer(address: str, host: str, port: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, timeout / 10)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UsageError(
                    f"--coordinator {address}: process 0 did not answer there within {timeout} s ({error}). {_ADVICE}"
                ) from error
        time.sleep(0.2)


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def on_first(work: Callable[[], T]) -> T:
    """Does work in the first process while the others wait; all return its result and raise its error.

    With several processes the result is passed on as JSON.
    """
    if jax.process_count() == 1:
        return work()

    mine = work if first() else None
    return _shared(mine)[0]


def on_all(work: Callable[[], object]) -> None:
    """Does work in every process, and waits for all; if it fails in one, all raise its error."""
    if jax.process_count() == 1:
        work()
        return

    def silently() -> None:  # what it returns may be no JSON
        work()

    _shared(silently)


def _shared(work: Callable[[], Any] | None) -> list[Any]:
    """Does this process's work, if it has any, and returns what all of them returned; or raises the first error."""
    answer: dict[str, Any] = {}
    if work:
        # Whoever fails has to come by all the same, for the others wait for what it says.
        try:
            answer = {"result": work()}
        except BadlossError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
        except OSError as error:
            answer = {"error": str(error), "exit_code": DataError.exit_code}

    answers = [json.loads(text) for text in _gather(json.dumps(answer))]
    for theirs in answers:
        if "error" in theirs:
            kind = UsageError if theirs["exit_code"] == UsageError.exit_code else DataError
            raise _together(kind(theirs["error"]))
    return [theirs.get("result") for theirs in answers]


def all_of(fact: bool) -> bool:
    """Whether it is so in every process."""
    if jax.process_count() == 1:
        return fact
    return bool(np.all(multihost_utils.process_allgather(np.int32(fact))))


def agree(facts: Mapping[str, str]) -> None:
    """Compares what the processes know.

    Args:
      facts: name -> value, as a user would recognise them.

    Raises:
      UsageError: in every process, if one differs from the first; process, name and both values are given.
    """
    if jax.process_count() == 1:
        return

    everyone = [json.loads(text) for text in _gather(json.dumps(facts))]
    expected = everyone[0]
    for process, theirs in enumerate(everyone):
        for name in sorted(expected.keys() | theirs.keys()):
            first_value = expected.get(name, "nothing")
            value = theirs.get(name, "nothing")
            if value != first_value:
                raise _together(
                    UsageError(
                        f"processes disagree on {name}: process 0 has {first_value}, process {process} has {value}. All"
                        " of them need the same code, the same config and the same data"
                    )
                )


def leave(error: BadlossError | None, exit_code: int) -> NoReturn:
    """Ends this process after an error, without waiting for others that may wait for this one for ever.

    If all raised the error, all come to the end of the program as usual. Process 0, on whose service the others depend,
    leaves a little later, so that they can say what is wrong with them.

    Args:
      error: that ends it; None if it is none of ours.
      exit_code: of the process.
    """
    if error is not None and error.together:
        raise SystemExit(exit_code)

    if first():
        time.sleep(2)
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: what Python does at its end would wait for the others.
    os._exit(exit_code)


def _together(error: BadlossError) -> BadlossError:
    """Marks an error that every process raises."""
    error.together = True
    return error


def _gather(text: str) -> list[str]:
    """Returns every process's text, in the order of their numbers."""
    ours = np.frombuffer(text.encode(), np.uint8)

    # Arrays of one shape in all processes are what can be gathered.
    lengths = multihost_utils.process_allgather(np.int32(len(ours))).ravel()
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(ours)] = ours

    rows = multihost_utils.process_allgather(padded)
    return [rows[i, :length].tobytes().decode() for i, length in enumerate(lengths)]
