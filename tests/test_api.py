"""The public names: listed, documented in full, and every example of their docstrings runs."""

import doctest
import inspect
import warnings
from pathlib import Path

import numpy as np
import pytest

import badloss_jax
from badloss_jax.core.errors import UsageError

PUBLIC = [name for name in badloss_jax.__all__ if name not in ("__version__", "attacks")]
METHODS = ("update", "score", "save", "load", "merge", "write", "init", "adopt")
OBJECTS = {name: getattr(badloss_jax, name) for name in PUBLIC}
OBJECTS |= {f"TrajectoryRecorder.{name}": getattr(badloss_jax.TrajectoryRecorder, name) for name in METHODS}
OBJECTS |= {"attacks.make_trigger": badloss_jax.attacks.make_trigger}


def test_names_are_listed():
    assert set(badloss_jax.__all__) <= set(dir(badloss_jax))
    with pytest.raises(AttributeError, match="no attribute 'skan'"):
        _ = badloss_jax.skan


def test_types_ship():
    assert (Path(badloss_jax.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", OBJECTS)
def test_docstrings_are_whole(name):
    parameters = [one for one in inspect.signature(OBJECTS[name]).parameters if one not in ("self", "cls")]
    text = inspect.getdoc(OBJECTS[name])
    for parameter in parameters:
        assert f"{parameter}" in text, f"{name} says nothing of {parameter}"
    if len(parameters) > 1 and inspect.isroutine(OBJECTS[name]):
        assert "Args:" in text
        assert "Raises:" in text


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", OBJECTS)
def test_examples_run(name, finished):
    """`finished` is the folder of a run, for those that need one."""
    globs = {"finished": finished[0], "np": np}
    (example,) = doctest.DocTestFinder(recurse=False).find(OBJECTS[name], name, globs=globs) or [None]
    if name in PUBLIC and name != "TrajectoryRecorder":
        assert example.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few probes support little, and say so
        runner.run(example)
    assert not runner.failures, f"an example of {name} fails, see above"


def test_errors_are_told_apart():
    assert issubclass(UsageError, ValueError)
