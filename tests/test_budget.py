"""A test that takes too much CPU time fails, whether it is the process's own or its children's."""

from pathlib import Path

pytest_plugins = ["pytester"]

HOOKS = Path(__file__).with_name("budget.py").read_text("utf-8")

TESTS = """
import subprocess
import sys
import time

import pytest

BUSY = "import time; end = time.process_time() + 1\\nwhile time.process_time() < end: pass"


@pytest.fixture(scope="module")
def shared():
    exec(BUSY)


@pytest.fixture
def own():
    exec(BUSY)


def test_quick(shared):
    pass


def test_waiting():
    time.sleep(1)


def test_busy():
    exec(BUSY)


def test_busy_in_setup(own):
    pass


def test_busy_child():
    subprocess.run([sys.executable, "-c", BUSY], check=True)


@pytest.mark.slow
def test_slow():
    exec(BUSY)
"""


def test_tests_have_a_limit_of_cpu_time(pytester):
    # A tenth of what busy tests take, as the limit grows where the machine is slow, at times more than three times.
    pytester.makeini("[pytest]\ncpu_seconds = 0.1\nmarkers = slow")
    pytester.makeconftest(HOOKS)
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--durations=2")
    result.assert_outcomes(passed=3, failed=3)
    for name in ("test_busy", "test_busy_in_setup", "test_busy_child"):
        said = rf".*::{name} took [12]\.\d CPU seconds, .* and 0\.\d+ are allowed: make it smaller.*"
        result.stdout.re_match_lines([said])
    result.stdout.re_match_lines([r"=+ most CPU seconds, of [4-9] in all", r" +[12]\.\d s  .*", r" +[12]\.\d s  .*"])
