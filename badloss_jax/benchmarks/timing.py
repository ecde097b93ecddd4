"""Seconds, and how sure one can be of them: medians, quartiles, and the ratio of paired measurements."""

import datetime
import os
import shlex
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from badloss_jax.core.environment import environment

_RESAMPLES = 2000

Result = TypeVar("Result")


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """Returns what the work returns, and the seconds until the devices had finished it."""
    started = time.perf_counter()
    result = jax.block_until_ready(work())
    return result, time.perf_counter() - started


def seconds_of(work: Callable[[], Any]) -> float:
    """Returns how long the work took until the devices had finished what it returns."""
    _, seconds = timed(work)
    return seconds


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Returns median, quartiles and number of measurements."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "quartiles": [float(low), float(high)], "count": len(values)}


def ratio(reference: Sequence[float], compared: Sequence[float]) -> dict[str, Any]:
    """Estimates how many times as long something takes as something else, from pairs measured beside each other.

    The median over the pairs of compared / reference: what slows both halves of a pair, such as other work on the
    machine, cancels, and what hits one half leaves the median where it is.

    Args:
      reference: seconds [R] of what is compared with.
      compared: seconds [R], the i-th of both measured at about the same time.

    Returns:
      median, interval (95 % percentile bootstrap of the median over the pairs), count.
    """
    ratios = np.asarray(compared) / np.asarray(reference)

    draws = np.random.default_rng(0).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), (2.5, 97.5))

    return {"median": float(np.median(ratios)), "interval": [float(low), float(high)], "count": len(ratios)}


def overhead(plain: Sequence[float], changed: Sequence[float]) -> dict[str, Any]:
    """Estimates what a change costs, in percent, from pairs that were measured beside each other.

    Args:
      plain: seconds [R] without the change.
      changed: seconds [R] with it, the i-th of both measured at about the same time.

    Returns:
      percent, interval, count: `ratio` of changed to plain, of which 100 % are left out.
    """
    times = ratio(plain, changed)

    return {
        "percent": 100 * (times["median"] - 1),
        "interval": [100 * (bound - 1) for bound in times["interval"]],
        "count": times["count"],
    }


def header(benchmark: str, command: Sequence[str]) -> dict[str, Any]:
    """Returns what every benchmark's file begins with: what, when, by which command, where, and how busy it was.

    Args:
      benchmark: its name.
      command: the command line after `badloss`, without paths.

    Returns:
      Entries that JSON can hold.
    """
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["badloss", *command]),
        # Runnable processes over 1, 5 and 15 minutes, before it began.
        "load_average": list(os.getloadavg()),
        "environment": environment(),
    }
