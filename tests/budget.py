"""Hooks of pytest by which a test fails that takes more CPU time than tests may, so that the suite stays fast.

What counts are the seconds of the process and of its children that have ended, in setup and call. Fixtures of a wider
scope than a function do not count: whichever test comes first would pay for all. The limit is the ini setting
`cpu_seconds`; tests that are marked `slow` may take longer. It holds for the machine that it was set on, idle: where a
fixed piece of work takes longer than there, tests may, too.
"""

import resource
import time

import numpy as np
import pytest

_RULER = 0.08  # seconds that `_measure` takes where the limit was set

_PROPERTY = "cpu_seconds"  # of a report, by which workers tell the first process
_begun = pytest.StashKey[float]()


class _Meter:
    """Counts the CPU seconds of this process and of its children that have ended, without those of shared fixtures."""

    def __init__(self):
        self._shared = 0.0

    def __call__(self):
        return self._all() - self._shared

    def leave_out(self, since):
        """Does not count what was taken since the meter stood there."""
        self._shared += self() - since

    def _all(self):
        ours = resource.getrusage(resource.RUSAGE_SELF)
        theirs = resource.getrusage(resource.RUSAGE_CHILDREN)
        return ours.ru_utime + ours.ru_stime + theirs.ru_utime + theirs.ru_stime


_meter = _Meter()


def _measure():
    """Returns the CPU seconds of some work of NumPy's and some of Python's."""
    begun = time.process_time()
    values = np.random.default_rng(0).random(2_000_000)
    values.sort()
    total = 0
    for number in range(1_500_000):
        total += number * number % 7
    return time.process_time() - begun


def pytest_addoption(parser):
    parser.addini("cpu_seconds", "that a test may take, with its children, unless it is marked slow", "string", "20")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[_begun] = _meter()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    since = _meter()
    try:
        return (yield)
    finally:
        if fixturedef.scope != "function":
            _meter.leave_out(since)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    result = yield

    taken = _meter() - item.stash[_begun]
    item.user_properties.append((_PROPERTY, taken))
    allowed = float(item.config.getini("cpu_seconds"))
    if taken > allowed and item.get_closest_marker("slow") is None:
        allowed *= max(1.0, _measure() / _RULER)
    if taken > allowed and item.get_closest_marker("slow") is None:
        pytest.fail(
            f"{item.nodeid} took {taken:.1f} CPU seconds, its children included, and {allowed:.2g} are allowed: make it"
            " smaller, share what it builds, or mark it slow",
            pytrace=False,
        )
    return result


def pytest_terminal_summary(terminalreporter, config):
    """Lists the tests that took most, as many as `--durations` asks for; unlike those, whatever others do."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    calls = [report for report in reports if getattr(report, "when", "") == "call"]
    taken = {report.nodeid: dict(report.user_properties).get(_PROPERTY, 0.0) for report in calls}
    wanted = config.getoption("durations") or 0
    if wanted and taken:
        terminalreporter.section(f"most CPU seconds, of {sum(taken.values()):.0f} in all but shared fixtures")
        for name in sorted(taken, key=taken.get, reverse=True)[:wanted]:
            terminalreporter.line(f"{taken[name]:7.1f} s  {name}")
