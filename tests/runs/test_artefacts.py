import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from badloss_jax.core.errors import BusyError
from badloss_jax.runs.artefacts import Artefacts


def test_places_are_names_in_a_run_and_hashes_where_they_are_shared(tmp_path):
    own, shared = Artefacts(tmp_path), Artefacts(tmp_path, shared=True)
    assert own.path_of("models", "loss/fraction@0.1", "0123") == tmp_path / "models" / "loss-fraction@0.1"
    assert own.path_of("trajectories", "", "0123") == tmp_path / "trajectories"
    assert shared.path_of("models", "loss/fraction@0.1", "0123") == tmp_path / "models" / "0123"
    assert shared.path_of("trajectories", "", "0123") == tmp_path / "trajectories" / "0123"


def test_what_two_want_is_made_once_and_the_other_waits(tmp_path):
    told, made, path = [], [], tmp_path / "models" / "0123"
    together = threading.Barrier(2)

    def want(number):
        artefacts = Artefacts(tmp_path, shared=True, wait=told.append)
        together.wait()
        with artefacts.held(path):
            if not path.exists():
                time.sleep(0.3)
                made.append(number)
                path.mkdir(parents=True)

    threads = [threading.Thread(target=want, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert told == [f"waiting for process {os.getpid()}, which makes 0123"]


def test_one_that_is_not_to_wait_is_told(tmp_path):
    artefacts, path = Artefacts(tmp_path, shared=True), tmp_path / "models" / "0123"
    with artefacts.held(path):
        with pytest.raises(BusyError, match=f"process {os.getpid()}"), artefacts.held(path):
            pass
        with artefacts.held(path / "observed"), artefacts.held(tmp_path / "defenses" / "0123"):
            pass  # others are free
    with pytest.raises(RuntimeError), artefacts.held(path):
        raise RuntimeError
    with artefacts.held(path):
        pass  # and so is this one, however it was left


def test_a_runs_own_are_not_locked(tmp_path):
    artefacts = Artefacts(tmp_path)
    with artefacts.held(tmp_path / "models" / "a"), artefacts.held(tmp_path / "models" / "a"):
        pass
    assert not list(tmp_path.iterdir())


_HOLDER = """
import sys, time
from pathlib import Path
from badloss_jax.runs.artefacts import Artefacts
folder = Path(sys.argv[1])
with Artefacts(folder, shared=True).held(folder / "models" / "0123"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_holds_nothing(tmp_path):
    environment = {"JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"], "PYTHONPATH": "."}
    with subprocess.Popen([sys.executable, "-c", _HOLDER, tmp_path], env=environment, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            path, told = tmp_path / "models" / "0123", []
            with pytest.raises(BusyError, match=f"process {holder.pid}"), Artefacts(tmp_path, True).held(path):
                pass

            def wait(message):
                told.append(message)
                holder.send_signal(signal.SIGKILL)

            with Artefacts(tmp_path, True, wait).held(path):
                assert told == [f"waiting for process {holder.pid}, which makes 0123"]
        finally:
            holder.kill()
