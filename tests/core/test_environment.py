"""What is said of where a result was made: the commit, in a checkout, in a copy of one, and without git."""

import shutil
import subprocess

import jax
import pytest

from badloss_jax.core import environment as module


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The root of a checkout, as far as badloss_jax knows."""
    monkeypatch.setattr(module, "__file__", str(tmp_path / "badloss_jax" / "core" / "environment.py"))
    return tmp_path


@pytest.mark.parametrize(
    ("told", "said"),
    [("0123456789ab-dirty", "0123456789ab-dirty"), (None, None), ("", None), (" \n", None),
     (" v1\x1b[31m\n<b>\n", "v1[31m<b>"), ("\udcff" + "é" * 100, "é" * 80)],
)  # fmt: skip
def test_a_copy_without_git_is_told_its_commit(root, monkeypatch, told, said):
    monkeypatch.delenv("BADLOSS_COMMIT", raising=False)
    if told is not None:
        monkeypatch.setenv("BADLOSS_COMMIT", told)
    assert module.environment()["git_commit"] == said


@pytest.mark.skipif(not shutil.which("git"), reason="missing: git")
def test_a_checkout_knows_its_commit_and_needs_git_for_it(root, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
        return subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout

    git("init")
    git("commit", "--allow-empty", "--message=subject")
    monkeypatch.setenv("BADLOSS_COMMIT", "told")
    assert module.environment()["git_commit"] == git("rev-parse", "--short=12", "HEAD").strip()
    monkeypatch.setenv("PATH", str(root))
    assert module.environment()["git_commit"] == "told"


@pytest.mark.parametrize(
    ("installed", "told", "maker", "taken"),
    [
        (("libtpu",), "", "0x8086", "cpu"),
        (("libtpu",), "", "0x1ae0", ""),
        (("libtpu",), "tpu", "0x8086", "tpu"),
        (("libtpu", "jax_plugins"), "", "0x8086", ""),
        ((), "", "0x8086", ""),
    ],
)
def test_tpus_that_are_not_there_are_not_looked_for(tmp_path, monkeypatch, installed, told, maker, taken):
    device = tmp_path / "sys/bus/pci/devices/0000:00:01.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{maker}\n")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name if name in installed else None)
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", told)
    try:
        module.leave_out_absent_tpus(tmp_path)
        assert jax.config.values["jax_platforms"] == taken
    finally:
        jax.config.update("jax_platforms", before)
