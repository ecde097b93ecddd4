"""How many steps are waited for together, by a clock of the test's own."""

import subprocess
import sys
from itertools import pairwise

import jax
import pytest

from badloss_jax.core.mesh import make_mesh
from badloss_jax.training import in_flight
from tests.conftest import ENVIRONMENT


@pytest.fixture
def clock(monkeypatch):
    """Seconds; a list of one."""
    now = [100.0]
    monkeypatch.setattr(in_flight.time, "monotonic", lambda: now[0])
    return now


def waits(clock, seconds, steps, devices=1):
    """After how many started steps some were waited for, and which; each takes so many seconds, or one of a list."""
    settled, history = [], []

    def settle(step):
        clock[0] += seconds[step] if isinstance(seconds, list) else seconds
        settled.append(step)

    flight = in_flight.InFlight(settle, make_mesh(jax.devices()[:devices]))
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


@pytest.mark.parametrize("seconds", [0.001, 0.2])
@pytest.mark.parametrize("devices", [1, 8])
def test_accelerators_have_four_steps_before_them_however_long_these_are(clock, monkeypatch, seconds, devices):
    """By their number alone, so that all processes find out at the same step."""
    monkeypatch.setattr(in_flight, "on_cpus", lambda mesh: False)
    assert waits(clock, seconds, 8, devices) == [(5, [0]), (6, [1]), (7, [2]), (8, [3])]


def test_several_cpus_have_few_programs_before_them(clock):
    assert waits(clock, 0.001, 4, devices=2) == [(2, [0]), (3, [1]), (4, [2])]


_SWEEP = """
import sys, numpy as np
from dataclasses import replace
from pathlib import Path
from badloss_jax.core.mesh import make_mesh
from badloss_jax.training.loop import Passengers, Recipe, train
from badloss_jax.training.recorder import Recorder
from badloss_jax.trajectories.store import TrajectoryStore
from tests.data.test_streamed import COUNT, KINDS, SPEC, make_poisoning, resident
mesh, labels = make_mesh(), np.zeros(COUNT, np.int32)
store = TrajectoryStore.create(Path(sys.argv[1]), "", labels, labels > 0, 1, KINDS.layout())
recorder = Recorder(KINDS, "sweep", store, mesh, batch_size=8)
data = resident(make_poisoning(), mesh)
wide = replace(SPEC, stages=(64,))  # slow enough that the host would be far ahead
train(wide, Recipe(1, 1, 400), data, np.arange(COUNT), seed=0, phase="test", mesh=mesh, passengers=Passengers(recorder))
print(np.isfinite(store.read("loss")).all())
"""


@pytest.mark.slow
def test_a_sweep_of_a_hundred_batches_ends_on_eight_cpus(tmp_path):
    """In a program of its own: where nothing goes on XLA ends the process, after a minute."""
    environment = ENVIRONMENT | {"PYTHONPATH": "."}
    run = subprocess.run(
        [sys.executable, "-c", _SWEEP, str(tmp_path / "store")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "True"
