"""That XLA adds up rightly on CPUs is made so, and checked."""

import os
import subprocess
import sys

import jaxlib
import pytest

from badloss_jax.core.compiler import _NAME, avoid_ynnpack, check_sums, check_sums_of
from badloss_jax.core.errors import UsageError
from tests.conftest import ENVIRONMENT

USED_BEFORE = "import jax; jax.devices(); "
SCORE = "import numpy; from badloss_jax import knn_distances; knn_distances(numpy.eye(5), numpy.eye(5), 1)"


def score(program, **environment):
    return subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT | {"PYTHONPATH": os.getcwd()} | environment,
                          capture_output=True, text=True, check=False)  # fmt: skip


def test_this_process_adds_up_rightly():
    check_sums()


def test_sums_that_are_wrong_are_an_error_that_says_what_to_do():
    def without_the_last(rows):
        sums = rows.sum(1)
        sums[-1] = 32_736  # what jaxlib 0.10.2 gives
        return sums

    with pytest.raises(UsageError, match=r"1 of 32769 sums wrong .* XLA_FLAGS=--xla_cpu.* or install another version"):
        check_sums_of(without_the_last)
    check_sums_of(lambda rows: rows.sum(1))


@pytest.mark.skipif(not jaxlib.__version__.startswith("0.10."), reason="only jaxlib 0.10 computes sums wrong")
@pytest.mark.parametrize(("before", "flags"), [("", f"{_NAME}=dot"), (USED_BEFORE, "")])
def test_wrong_sums_of_xla_itself_are_found(before, flags):
    """With the library that is at fault: as somebody asked for it, or as JAX was used before badloss_jax came."""
    done = score(before + SCORE, XLA_FLAGS=flags)
    assert done.returncode == 1
    assert "UsageError: jaxlib 0.10" in done.stderr


def test_nothing_has_to_be_set():
    done = score(SCORE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("before", "after"), [
    (None, f"{_NAME}="),
    ("--xla_a=1", f"--xla_a=1 {_NAME}="),
    (f"{_NAME}=dot --xla_a=1", f"{_NAME}=dot --xla_a=1"),
])  # fmt: skip
def test_flags_that_are_set_stay(before, after, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if before is not None:
        monkeypatch.setenv("XLA_FLAGS", before)
    avoid_ynnpack()
    assert os.environ["XLA_FLAGS"] == after
