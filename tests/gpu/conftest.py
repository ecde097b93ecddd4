"""On which device tests/gpu runs, and that all of it does where a GPU is wanted."""

import os

import jax
import pytest

from badloss_jax.core.mesh import make_mesh

WANTED = bool(os.environ.get("BADLOSS_TEST_GPU"))


@pytest.fixture
def device():
    """The first GPU if one is wanted, else the first CPU device: nothing is to run for the first time on a GPU."""
    if WANTED and jax.default_backend() != "gpu":
        pytest.fail(f"BADLOSS_TEST_GPU=1 wants a GPU, and jax runs on {jax.default_backend()}", pytrace=False)
    return make_mesh(jax.devices()[:1])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A test that is skipped says nothing of the GPU that was asked about: pytest alone would end with 0."""
    report = yield
    if WANTED and report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped, and BADLOSS_TEST_GPU=1 wants {item.nodeid}"
    return report
