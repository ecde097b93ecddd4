"""Several processes on this machine, over gloo: they give the run of one, stop together, and name what differs."""

import json
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

from badloss_jax.runs.experiment import run_experiment
from badloss_jax.trajectories.store import TrajectoryStore
from tests.conftest import ENVIRONMENT, overrides, without_cost

# Few steps, as each of them waits for messages of many processes to one another.
SMALL = {
    "controls": "('oracle',)",
    "recording__batch_size": 100,
    "recording__kinds": "('features',)",
    "retraining__batch_size": 100,
    "retraining__variants": "()",
    "scoring__kinds": "('loss','features')",
}
RECORDED = SMALL | {"controls": "()", "retraining__enabled": False}
# Long enough to be stopped in its middle.
LONG = RECORDED | {"recording__epochs": 15, "recording__schedule_epochs": 15}


def command(workdir, process, count, address, *extra, **changed):
    """What one of `count` processes of a run is told."""
    arguments = ["run", "--config", "configs/digits.py", "--workdir", str(workdir), *overrides(**SMALL | changed)]
    if count > 1:
        arguments += ["--distributed", "--coordinator", address, "--num_processes", str(count),
                      "--process_id", str(process)]  # fmt: skip
    return [*arguments, *extra]


def python(*arguments):
    """Starts a Python with two devices."""
    environment = ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": "."}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start(*arguments, **changed):
    """Starts one process of a run."""
    return python("-m", "badloss_jax", *command(*arguments, **changed))


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
    kept = {key: results[key] for key in ("recording_model", "epochs_kept")}
    kept["variants"] = without_cost(results["variants"])
    return (workdir / "scores.parquet").read_bytes(), kept


def losses_in(workdir):
    return TrajectoryStore.open(workdir / "trajectories").read("loss")


# One run from the command line, and what is no matter of it: many runs by the same two processes, which tests look at.
_NEXT = "-- the next runs --"
_RUNS = """
import json
import sys
from pathlib import Path
from badloss_jax.cli import main
assert main(json.loads(sys.argv[1])) == 0
for stream in (sys.stdout, sys.stderr):
    print(sys.argv[2], file=stream, flush=True)
from badloss_jax.config import load_config
from badloss_jax.core import hashing
from badloss_jax.core.errors import UsageError
from badloss_jax.runs.experiment import run_experiment
own_code = hashing.__file__
for case in json.loads(sys.argv[3]):
    hashing.__file__ = case.get("code", own_code)
    shared = Path(case["shared"]) if "shared" in case else None
    try:
        config = load_config("configs/digits.py", case["overrides"])
        results = run_experiment(config, Path(case["workdir"]), shared=shared)
        print(case["name"], "done", sorted(results["variants"]), flush=True)
    except UsageError as error:
        print(case["name"], "refused", error, flush=True)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Many runs by two processes of two devices each: their folder, what was said of each by name, and of the first."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "mine.txt").write_text("not a run")
    other_code = shutil.copytree("badloss_jax", folder / "other" / "badloss_jax")
    with open(other_code / "core" / "seeding.py", "a") as file:
        file.write("# another version\n")

    # In the order in which both go through them, as every run waits for both.
    def case(name, *, workdir="run", **changed):
        return {"name": name, "workdir": str(folder / workdir), "overrides": overrides(**RECORDED | changed)}

    processes = []
    address = free_address()
    for i in range(2):
        images = np.random.default_rng(i).integers(0, 256, (400, 12, 12, 1), np.uint8)
        labels = np.arange(400) % 10
        np.savez(folder / f"{i}.npz", x_train=images, y_train=labels, x_test=images[:60], y_test=labels[:60])
        defended = {"scoring__kinds": "()", "defenses__names": "('mean_loss_low','spectral_signatures')"}
        cases = [
            case("data", data__source="arrays", data__dir=folder / f"{i}.npz", data__pad=0),
            case("code") | ({"code": str(other_code / "core" / "hashing.py")} if i else {}),
            case("folder", workdir=f"of-{i}"),
            case("foreign", workdir="foreign"),
            case("streamed", workdir="streamed", data__input="streamed"),
            case("long", workdir="long", **LONG),
            case("shared", workdir="item", **defended) | {"shared": str(folder / "shared")},
        ]
        first = command(folder / "pair", i, 2, address)
        processes.append(python("-c", _RUNS, json.dumps(first), _NEXT, json.dumps(cases)))

    said = {}
    shown = []
    for code, out, err in finish(processes):
        assert code == 0, err
        shown += [out.partition(_NEXT)[0], err.partition(_NEXT)[0]]
        for line in out.partition(_NEXT)[2].splitlines():
            name, _, what = line.partition(" ")
            said.setdefault(name, []).append(what)
    return folder, said, shown


@pytest.mark.usefixtures("unrendered")
def test_two_processes_give_the_run_of_one(runs, tmp_path, tiny, mesh):
    folder, _, (out, err, quiet_out, quiet_err) = runs
    assert "undefended" in out
    assert "4 cpu devices of 2 processes" in err
    assert "undefended" not in quiet_out  # gloo itself prints there
    assert "examples/s" not in quiet_err

    run_experiment(tiny(**RECORDED), tmp_path / "one", mesh=mesh)
    ours, theirs = (losses_in(workdir) for workdir in (folder / "pair", tmp_path / "one"))
    assert ours.shape == (300, 3)
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=0, atol=1e-5)  # Adam magnifies from there
    names = pq.read_table(folder / "pair" / "scores.parquet").column_names
    assert names == pq.read_table(tmp_path / "one" / "scores.parquet").column_names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data", "processes disagree on the test images and labels"),
        ("code", r"on the code of badloss_jax \(a hash\): process 0 has \w{16}, process 1 has \w{16}"),
        ("folder", "processes disagree on .*one folder that all processes share"),
        ("foreign", "holds other files and no run"),  # which only the first looks for
    ],
)
def test_what_processes_do_not_share_is_told_by_all(runs, name, message):
    _, said, _ = runs
    assert len(said[name]) == 2
    for what in said[name]:
        assert re.match(f"refused .*{message}", what)


def test_two_processes_stream_what_is_theirs(runs):
    folder, said, _ = runs
    assert [what.split()[0] for what in said["streamed"]] == ["done"] * 2
    np.testing.assert_allclose(losses_in(folder / "streamed"), losses_in(folder / "pair"), rtol=0, atol=1e-5)


def test_two_processes_share_artefacts_and_look_at_one_network(runs):
    """The locks of artefacts are the run's: were they each process's own, the two would wait for each other."""
    folder, said, _ = runs
    assert len(said["shared"]) == 2
    assert all("'spectral_signatures/own'" in what for what in said["shared"])
    assert len(list((folder / "shared" / "models").iterdir())) == 2  # recording and undefended
    (observed,) = (folder / "shared" / "models").glob("*/observed")
    assert np.load(observed / "features.npy").shape == (300, 8)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_bit_by_bit_like_one_that_was_not(runs, tmp_path):
    """SIGTERM to one process stops both, at the same step."""
    workdir, address = tmp_path / "run", free_address()
    processes = [start(workdir, i, 2, address, **LONG) for i in range(2)]
    ends = stop_in(workdir, "recording", processes, [1])
    assert [code for code, *_ in ends] == [75, 75], ends
    (told,) = {err.split("after step ")[1].split(";")[0] for *_, err in ends}
    assert int(told) > 0
    assert not (workdir / "results.json").exists()

    ends = run(workdir, 2, **LONG)
    assert [code for code, *_ in ends] == [0, 0], ends
    assert whole(workdir) == whole(runs[0] / "long")
    resumes = json.loads((workdir / "results.json").read_text())["resumes"]
    assert resumes == [{"phase": "recording", "step": int(told)}]


def test_processes_that_disagree_all_say_on_what(tmp_path):
    address = free_address()
    processes = [start(tmp_path / "run", i, 2, address, seed=i) for i in range(2)]
    for code, _, err in finish(processes):
        assert code == 2
        assert "processes disagree on config.seed: process 0 has 0, process 1 has 1" in err
        assert "Traceback" not in err


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
