"""What one session of tests compiles, the next one reads, if it is whole."""

import os

import pytest

from tests import compiled


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder of kept programs, for a session that finds none in its environment."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    return tmp_path / "cache" / "tests"


def begun(kept, monkeypatch):
    """Begins a session; returns its folder."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    own = compiled.begin(kept)
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(own)
    return own


def test_what_was_compiled_is_there_again(kept, monkeypatch):
    first = begun(kept, monkeypatch)
    (first / "jit_step-1-cache").write_bytes(b"one")
    compiled.keep(first, kept)

    second = begun(kept, monkeypatch)
    assert second != first
    assert (second / "jit_step-1-cache").read_bytes() == b"one"

    # Only what is new is added; a file of that name is the same program.
    (second / "jit_step-1-cache").write_bytes(b"torn")
    (second / "jit_step-2-cache").write_bytes(b"two")
    compiled.keep(second, kept)
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == {
        "jit_step-1-cache": b"one",
        "jit_step-2-cache": b"two",
    }
    assert [path.name for path in kept.parent.iterdir()] == ["tests"]


def test_workers_have_the_folder_of_their_session(kept, monkeypatch):
    own = begun(kept, monkeypatch)
    assert compiled.begin(kept) is None
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(own)


def test_at_some_size_all_begins_anew(kept, monkeypatch):
    kept.mkdir(parents=True)
    with open(kept / "jit_old-cache", "wb") as file:
        file.truncate(compiled.MOST + 1)
    assert not list(begun(kept, monkeypatch).iterdir())
    assert not kept.exists()


@pytest.fixture
def finish(kept, monkeypatch):
    """Ends a session that compiled one program: exit status -> None."""
    own = begun(kept, monkeypatch)
    (own / "jit_step-1-cache").write_bytes(b"one")
    monkeypatch.setattr(compiled, "_own", own)
    monkeypatch.setattr(compiled.keep, "__defaults__", (kept,))
    return compiled.pytest_sessionfinish


def test_only_a_session_that_passes_adds_to_it(kept, finish):
    finish(pytest.ExitCode.TESTS_FAILED)
    finish(pytest.ExitCode.INTERRUPTED)
    assert not kept.exists()
    finish(pytest.ExitCode.OK)
    assert kept.exists()


def test_where_nothing_can_be_kept_all_goes_on(kept, finish, monkeypatch, capsys):
    kept.parent.write_bytes(b"no folder")
    assert not list(begun(kept, monkeypatch).iterdir())
    finish(pytest.ExitCode.OK)
    assert "what was compiled is not kept" in capsys.readouterr().out
