"""How many steps are waited for together, by a clock of the test's own."""

from itertools import pairwise

import jax
import pytest

from badloss_jax.training import in_flight


@pytest.fixture
def clock(monkeypatch):
    """Seconds; a list of one."""
    now = [100.0]
    monkeypatch.setattr(in_flight.time, "monotonic", lambda: now[0])
    return now


def waits(clock, seconds, steps):
    """After how many started steps some were waited for, and which; each takes so many seconds, or one of a list."""
    settled, history = [], []

    def settle(step):
        clock[0] += seconds[step] if isinstance(seconds, list) else seconds
        settled.append(step)

    flight = in_flight.InFlight(settle)
    for step in range(steps):
        before = len(settled)
        flight.append(step)
        assert len(settled) <= step, "the devices have nothing to do"
        if settled[before:]:
            history.append((step + 1, settled[before:]))
    flight.settle_all()
    assert settled == list(range(steps)), "each one once, and in order"
    return history


def test_slow_steps_are_waited_for_one_at_a_time(clock):
    assert waits(clock, 0.2, 4) == [(2, [0]), (3, [1]), (4, [2])]


def test_fast_ones_together_and_there_are_as_many_left(clock):
    first, *others = waits(clock, 0.001, 60)
    assert first == (2, [0])
    for (begun, together), (later, _) in pairwise(others):
        assert len(together) == 8
        assert begun - together[-1] - 1 == 8
        assert later == begun + 8


def test_where_they_become_slow_the_host_is_soon_no_longer_ahead(clock):
    *_, last = waits(clock, [0.001] * 30 + [1.0] * 30, 60)
    assert last == (60, [58])


def test_a_clock_may_stand_still(clock):
    *_, last = waits(clock, 0.0, 60)
    assert len(last[1]) == 8


def test_those_between_by_their_length(clock):
    assert {len(together) for _, together in waits(clock, 0.03, 30)} == {1, 3}


def test_several_processes_find_out_at_the_same_step(clock, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert waits(clock, 0.001, 4) == [(2, [0]), (3, [1]), (4, [2])]
