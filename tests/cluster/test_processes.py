"""Several processes on this machine, over gloo: they give the run of one, stop together, and name what differs."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from badloss_jax.trajectories.store import TrajectoryStore
from tests.conftest import ENVIRONMENT, overrides, without_cost

SMALL = {"controls": "('oracle',)", "retraining__variants": "()", "scoring__kinds": "('loss','features')",
         "recording__kinds": "('features',)"}  # fmt: skip


def start(workdir, process, count, address, *extra, devices=2, environment=(), **changed):
    """Starts one of `count` processes of a run."""
    arguments = [sys.executable, "-m", "badloss_jax", "run", "--config", "configs/digits.py", "--workdir", str(workdir),
                 *overrides(**SMALL | changed), *extra]  # fmt: skip
    if count > 1:
        arguments += ["--distributed", "--coordinator", address, "--num_processes", str(count),
                      "--process_id", str(process)]  # fmt: skip
    settings = ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(devices)} | dict(environment)
    return subprocess.Popen(arguments, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def free_address():
    return f"localhost:{free_port()}"


def finish(processes, seconds=240):
    """Returns (exit code, stdout, stderr) of each."""
    ends = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            out, err = process.communicate()
            pytest.fail(f"a process did not end: {err[-2000:]}")
        ends.append((process.returncode, out, err))
    return ends


def run(workdir, count, *extra, **changed):
    address = free_address()
    return finish([start(workdir, i, count, address, *extra, **changed) for i in range(count)])


def wait_for_epoch(workdir, model, processes):
    """Waits until the model has been trained for an epoch."""
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.is_file() and f'"model": "{model}"' in metrics.read_text()):
        assert time.monotonic() < deadline, "the training never began"
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.02)


def stop_in(workdir, model, processes, which):
    """Sends SIGTERM to some of the processes once the model has been trained for an epoch."""
    wait_for_epoch(workdir, model, processes)
    for process in which:
        processes[process].send_signal(signal.SIGTERM)
    return finish(processes)


def whole(workdir):
    """What must not depend on how often a run was stopped."""
    results = json.loads((workdir / "results.json").read_text())
    kept = {key: results[key] for key in ("undefended", "recording_model", "epochs_kept")}
    kept["variants"] = without_cost(results["variants"])
    return (workdir / "scores.parquet").read_bytes(), kept


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run by two processes of two devices each that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    ends = run(workdir, 2)
    assert [code for code, *_ in ends] == [0, 0], ends
    return workdir, ends


def test_two_processes_give_the_run_of_one(pair, tmp_path):
    workdir, ((_, out, err), (_, quiet_out, quiet_err)) = pair
    assert "undefended" in out
    assert "4 cpu devices of 2 processes" in err
    assert "undefended" not in quiet_out  # gloo itself prints there
    assert "examples/s" not in quiet_err
    ((code, *_, err),) = run(tmp_path / "one", 1, devices=1)
    assert code == 0, err
    ours, theirs = (
        TrajectoryStore.open(folder / "trajectories").read("loss") for folder in (workdir, tmp_path / "one")
    )
    assert ours.shape == (300, 3)
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=0, atol=1e-5)  # ten steps, and Adam magnifies from there
    names = pq.read_table(workdir / "scores.parquet").column_names
    assert names == pq.read_table(tmp_path / "one" / "scores.parquet").column_names


@pytest.mark.slow
def test_two_processes_stream_what_is_theirs(pair, tmp_path):
    ends = run(tmp_path / "run", 2, data__input="streamed")
    assert [code for code, *_ in ends] == [0, 0], ends
    ours, theirs = (
        TrajectoryStore.open(folder / "trajectories").read("loss") for folder in (tmp_path / "run", pair[0])
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_sigterm_to_one_process_stops_both_at_the_same_step(pair, tmp_path):
    workdir, address = tmp_path / "run", free_address()
    longer = {"recording__epochs": 40, "recording__schedule_epochs": 40}
    processes = [start(workdir, i, 2, address, **longer) for i in range(2)]
    ends = stop_in(workdir, "recording", processes, [1])
    assert [code for code, *_ in ends] == [75, 75], ends
    told = {err.split("after step ")[1].split(";")[0] for *_, err in ends}
    assert len(told) == 1
    assert int(told.pop()) > 0
    assert not (workdir / "results.json").exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_bit_by_bit_like_one_that_was_not(pair, tmp_path):
    workdir, address = tmp_path / "run", free_address()
    processes = [start(workdir, i, 2, address) for i in range(2)]
    ends = stop_in(workdir, "recording", processes, [1])
    assert {code for code, *_ in ends} <= {0, 75}, ends
    ends = run(workdir, 2)
    assert [code for code, *_ in ends] == [0, 0], ends
    assert whole(workdir) == whole(pair[0])
    resumes = json.loads((workdir / "results.json").read_text())["resumes"]
    assert all(resume["step"] > 0 for resume in resumes)


def test_processes_that_disagree_all_say_on_what(tmp_path):
    address = free_address()
    processes = [start(tmp_path / "run", i, 2, address, seed=i) for i in range(2)]
    for code, _, err in finish(processes):
        assert code == 2
        assert "processes disagree on config.seed: process 0 has 0, process 1 has 1" in err
        assert "Traceback" not in err


def test_processes_with_other_code_are_told(tmp_path):
    other = shutil.copytree("badloss_jax", tmp_path / "other" / "badloss_jax")
    with open(other / "seeding.py", "a") as file:
        file.write("# another version\n")
    address = free_address()
    processes = [start(tmp_path / "run", i, 2, address, environment={"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}.items())
                 for i, path in enumerate((os.getcwd(), str(tmp_path / "other")))]  # fmt: skip
    for code, _, err in finish(processes):
        assert code == 2, err
        assert re.search(
            r"disagree on the code of badloss_jax \(a hash\): process 0 has \w{16}, process 1 has \w{16}", err
        )


def test_processes_with_other_data_are_told(tmp_path, rng):
    address, processes = free_address(), []
    for i in range(2):
        images = rng.integers(0, 256, (400, 12, 12, 1), np.uint8)
        labels = np.arange(400) % 10
        np.savez(tmp_path / f"{i}.npz", x_train=images, y_train=labels, x_test=images[:60], y_test=labels[:60])
        changed = {"data__source": "arrays", "data__dir": tmp_path / f"{i}.npz", "data__pad": 0}
        processes.append(start(tmp_path / "run", i, 2, address, **changed))
    for code, _, err in finish(processes):
        assert code == 2, err
        assert "processes disagree on the test images and labels" in err


def test_a_process_that_hangs_ends_the_others_with_their_stacks(tmp_path):
    """One of two is stopped in its tracks, so that the other waits for it in a collective."""
    workdir, address = tmp_path / "run", free_address()
    longer = {"recording__epochs": 90, "recording__schedule_epochs": 90, "checkpoint__stall_minutes": 0.5}
    processes = [start(workdir, i, 2, address, **longer) for i in range(2)]
    wait_for_epoch(workdir, "recording", processes)
    processes[1].send_signal(signal.SIGSTOP)
    ((code, _, err),) = finish(processes[:1], 55)
    processes[1].kill()
    processes[1].communicate()
    assert code == 1, err
    assert "Timeout" in err
    assert "training/loop.py" in err


def test_processes_without_a_shared_folder_are_told(tmp_path):
    address = free_address()
    processes = [start(tmp_path / f"run{i}", i, 2, address) for i in range(2)]
    for code, _, err in finish(processes):
        assert code == 2
        assert "processes disagree on" in err
        assert "one folder that all processes share" in err


def test_an_error_of_the_first_process_ends_all(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("not a run")
    for code, _, err in run(tmp_path / "run", 2):
        assert code == 2
        assert "holds other files and no run" in err


@pytest.mark.parametrize("host", ["localhost", "nowhere.invalid"])
def test_a_wrong_coordinator_is_named_in_time(tmp_path, host):
    address = f"{host}:{free_port()}"
    process = start(tmp_path, 1, 2, address, "--timeout", "3")
    ((code, _, err),) = finish([process], 60)
    assert code == 2, err
    assert f"--coordinator {address}: process 0 did not answer there within 3 s" in err
    assert "Check that the coordinator is the machine of process 0" in err
    assert not (Path(tmp_path) / "config.json").exists()


def test_a_taken_port_is_named(tmp_path):
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        ((code, _, err),) = finish([start(tmp_path, 0, 2, address)], 60)
    assert code == 2
    assert f"--coordinator {address}: process 0 cannot listen at this port" in err


def test_process_0_alone_says_what_to_check(tmp_path):
    ((code, _, err),) = finish([start(tmp_path, 0, 2, free_address(), "--timeout", "3")], 60)
    assert code != 0
    assert "Check that the coordinator is the machine of process 0" in err


def test_addresses_without_distributed_are_refused(tmp_path):
    process = start(tmp_path, 0, 1, "", "--coordinator", "localhost:1234")
    ((code, _, err),) = finish([process], 60)
    assert code == 2
    assert "need --distributed" in err


_SHARED = """
import sys
from pathlib import Path
from badloss_jax.core.processes import connect
connect(sys.argv[1], 2, int(sys.argv[2]), 120)
from badloss_jax.config import load_config
from badloss_jax.runs.experiment import run_experiment
folder = Path(sys.argv[3])
config = load_config("configs/digits.py", sys.argv[4:])
results = run_experiment(config, folder / "run", shared=folder / "shared")
print(sorted(results["variants"]))
"""


@pytest.mark.slow
def test_two_processes_share_artefacts_and_look_at_one_network(tmp_path):
    """The locks of artefacts are the run's: were they each process's own, the two would wait for each other."""
    changed = SMALL | {"scoring__kinds": "()", "controls": "()", "retraining__enabled": False,
                       "defenses__names": "('mean_loss_low','spectral_signatures')"}  # fmt: skip
    environment = ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": "."}
    address = free_address()
    arguments = [[sys.executable, "-c", _SHARED, address, str(i), tmp_path, *overrides(**changed)] for i in range(2)]
    ends = finish([subprocess.Popen(told, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                   for told in arguments])  # fmt: skip
    assert [code for code, *_ in ends] == [0, 0], ends
    assert all("'spectral_signatures/own'" in out.splitlines()[-1] for _, out, _ in ends)
    assert len(list((tmp_path / "shared" / "models").iterdir())) == 2  # recording and undefended
    (folder,) = (tmp_path / "shared" / "models").glob("*/observed")
    assert np.load(folder / "features.npy").shape == (300, 8)
