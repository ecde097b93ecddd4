"""launch/slurm on a real Slurm: a controller and two nodes, all on this machine, started and ended by these tests.

It needs Debian's slurm-wlm and munge, and root: for munge, and for the nodes' names in /etc/hosts.
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import overrides

# Of this process alone: another worker may run some of these tests at the same time, and ends before or after.
NODES = tuple(f"badloss-{os.getpid()}-n{number}" for number in (1, 2))
HOSTS = Path("/etc/hosts")
BIN = Path(sys.executable).parent

# cred_expire is also how long a requeued job waits; linuxproc and none do without cgroups; the tests' nodes may claim
# more CPUs than there are.
CONFIGURATION = """\
ClusterName=badloss
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
MessageTimeout=60
KillWait=120
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={nodes[0]} Port={ports[1]} CPUs=8
NodeName={nodes[1]} Port={ports[2]} CPUs=8
PartitionName=main Nodes=ALL Default=YES
"""


def missing():
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
    yield from (program for program in programs if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin"))
    if os.geteuid() != 0:
        yield "root"
    if not (BIN / "badloss").exists():
        yield f"{BIN / 'badloss'} (pip install .)"


pytestmark = pytest.mark.skipif(any(missing()), reason=f"missing: {', '.join(missing())}")


class Slurm:
    """Two running nodes; what runs on them finds badloss, and two CPU devices a process."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder}/bin:{BIN}:{os.environ['PATH']}:/usr/sbin",
            "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2",
        }  # fmt: skip

    def __call__(self, *command):
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments, file="run", options=("--ntasks-per-node=1",)):
        """Submits one of launch/slurm as its first lines say, for nodes without a GPU."""
        options = ("--gres=none", "--cpus-per-task=2", f"--output={self.folder}/%j.log", *options)
        return self("sbatch", "--parsable", *options, f"launch/slurm/{file}.sbatch", *map(str, arguments)).strip()

    def show(self, job):
        return dict(word.partition("=")[::2] for word in self("scontrol", "show", "job", job).split())

    def log(self, job):
        file = self.folder / f"{job}.log"
        return file.read_text() if file.exists() else ""

    def ended(self, job):
        return self.show(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def wait_in(self, job, condition, seconds=300):
        """Waits for something that the job does before it ends."""
        wait_until(lambda: condition() or self.ended(job), seconds, lambda: self.log(job))
        assert not self.ended(job), self.log(job)

    def wait(self, job, seconds=600):
        """Returns how the job ended, and after how many restarts."""
        wait_until(lambda: self.ended(job), seconds, lambda: self.log(job))
        shown = self.show(job)
        return shown["JobState"], shown["ExitCode"], int(shown["Restarts"])


def wait_until(condition, seconds, explanation=lambda: ""):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s\n{explanation()}"
        time.sleep(0.1)


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def daemon(slurm, *command):
    """Runs in the foreground, so that it ends with the test, with a log of its own."""
    name = f"{Path(command[0]).name}{len(list(slurm.folder.glob('*.out')))}"
    with (slurm.folder / f"{name}.out").open("w") as log:
        process = subprocess.Popen(command, env=slurm.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def names_of_the_nodes():
    """Adds lines to /etc/hosts, and takes these away again."""
    lines = "".join(f"127.0.0.1 {node}\n" for node in NODES)

    def rewrite(change):
        """In place, as in a container the file is a mount, and never empty, as others read it."""
        with HOSTS.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = change(file.read())
            file.seek(0)
            file.write(text)
            file.truncate()

    rewrite(lambda text: f"{text.rstrip()}\n{lines}")
    try:
        yield
    finally:
        rewrite(lambda text: text.replace(lines, ""))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    slurm = Slurm(folder)
    for name in ("bin", "state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, nodes=NODES, ports=free_ports(3)))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]

    def logs():
        return "\n".join(f"{file}\n{file.read_text()[-3000:]}" for file in folder.glob("*.out"))

    with ExitStack() as stack:
        stack.enter_context(names_of_the_nodes())
        stack.enter_context(
            # --force: pytest's folder is closed to other users, who need no access here.
            daemon(slurm, "/usr/sbin/munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge)
        )
        wait_until((folder / "munge.socket").exists, 30, logs)
        stack.enter_context(daemon(slurm, "/usr/sbin/slurmctld", "-D", "-c"))
        for node in NODES:
            stack.enter_context(daemon(slurm, "/usr/sbin/slurmd", "-D", "-N", node))

        def states():
            command = ["sinfo", "--noheader", "--Node", "--format=%T"]
            done = subprocess.run(command, env=slurm.environment, capture_output=True, text=True, check=False)
            return done.stdout.split()

        def cancel_all():
            slurm("scancel", "--user=root")
            wait_until(lambda: states() == ["idle"] * 2, 150, logs)

        wait_until(lambda: states() == ["idle"] * 2, 60, logs)
        stack.callback(cancel_all)
        yield slurm


PSUM = """\
import jax
jax.distributed.initialize()
from jax.sharding import NamedSharding, PartitionSpec
sharding = NamedSharding(jax.make_mesh((4,), ("device",)), PartitionSpec("device"))
ids = jax.make_array_from_callback((4,), sharding, lambda index: jax.numpy.arange(4)[index])
total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "device"), mesh=sharding.mesh,
                              in_specs=PartitionSpec("device"), out_specs=PartitionSpec()))(ids)
print(f"process {jax.process_index()} of {jax.process_count()} sees {total[0]}", flush=True)
"""


def test_jax_finds_its_processes_on_two_nodes(slurm):
    printed = slurm("srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-c", PSUM)
    assert "process 0 of 2 sees 6" in printed
    assert "process 1 of 2 sees 6" in printed


@pytest.fixture
def badloss(slurm):
    """Puts a program of the test's own in badloss's place; it is run with the times that Slurm restarted the job."""
    file = slurm.folder / "bin" / "badloss"

    def write(code):
        file.write_text(f"#!/usr/bin/env bash\nrestarts=${{SLURM_RESTART_COUNT:-0}} id=$SLURM_PROCID\n{code}\n")
        file.chmod(0o755)

    yield write
    file.unlink()


@pytest.mark.parametrize(("code", "restarts"), [(0, 0), (1, 0), (2, 0), (75, 1)])
def test_only_a_preempted_job_starts_again(code, restarts, slurm, badloss):
    badloss(f'echo "$SLURM_NODEID: $*"; sleep "$id"; exit $((restarts ? 0 : {code}))')
    job = slurm.submit("--config", "a b")
    ended = ("COMPLETED", "0:0") if code in (0, 75) else ("FAILED", f"{code}:0")
    assert slurm.wait(job) == (*ended, restarts), slurm.log(job)
    assert slurm.log(job).count("0: run --distributed --config a b\n") == restarts + 1
    assert slurm.log(job).count("1: run --distributed --config a b\n") == restarts + 1


WAITS = """\
trap 'sleep "$id"; echo "$id wrote"; exit 75' TERM
if ((restarts)); then exit; fi
echo "$id waits"
for ((i = 0; i < 1000; i++)); do sleep 0.1; done
"""


@pytest.mark.parametrize("how", ["scancel --signal=TERM", "scontrol requeue", "scancel"])
def test_a_stopped_job_has_time_to_write(how, slurm, badloss):
    badloss(WAITS)
    job = slurm.submit()
    slurm.wait_in(job, lambda: slurm.log(job).count("waits") == 2)
    slurm(*how.split(), job)
    ended = ("CANCELLED", 0) if how == "scancel" else ("COMPLETED", 1)
    state, _, restarts = slurm.wait(job)
    wait_until(lambda: slurm.log(job).count("wrote") == 2, 60, lambda: slurm.log(job))
    assert (state, restarts) == ended, slurm.log(job)


# Long enough to be stopped in its middle.
SHRUNK = [
    "--config",
    "configs/digits.py",
    *overrides(
        recording__batch_size=100,  # few steps, as each waits for messages of the nodes to one another
        recording__epochs=30,
        recording__schedule_epochs=30,
        recording__kinds="()",
        scoring__kinds="('loss',)",
        retraining__enabled=False,
        retraining__variants="()",
        controls="()",
    ),
]


def epochs(workdir):
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def unbroken(slurm):
    workdir = slurm.folder / "unbroken"
    job = slurm.submit(*SHRUNK, "--workdir", workdir)
    return workdir, slurm.wait(job), slurm.log(job)


@pytest.mark.slow
def test_a_run_on_two_nodes(unbroken):
    workdir, ended, log = unbroken
    assert ended == ("COMPLETED", "0:0", 0), log
    assert "loss/fraction" in json.loads((workdir / "results.json").read_text())["variants"]
    assert log.count("Report: ") == 1
    assert "on 4 cpu devices" in log


@pytest.mark.slow
def test_a_preempted_run_ends_as_if_it_had_not_been(slurm, unbroken):
    """By one of the ways that `test_a_stopped_job_has_time_to_write` shows to be alike: they end in one trap."""
    workdir = slurm.folder / "preempted"
    job = slurm.submit(*SHRUNK, "--workdir", workdir)
    slurm.wait_in(job, lambda: len(epochs(workdir)) > 1)
    slurm("scontrol", "requeue", job)
    slurm.wait_in(job, lambda: slurm.show(job)["Restarts"] == "1")
    assert len(epochs(workdir)) < len(epochs(unbroken[0])), "it was over before it was stopped"
    assert slurm.wait(job) == ("COMPLETED", "0:0", 1), slurm.log(job)
    assert len(epochs(workdir)) == len(epochs(unbroken[0])), "epochs were trained twice"
    assert (workdir / "scores.parquet").read_bytes() == (unbroken[0] / "scores.parquet").read_bytes()


@pytest.mark.slow
def test_a_sweep_runs_as_an_array(slurm):
    folder = slurm.folder / "sweep"
    arguments = ["--config", "configs/sweeps/paper_table.py:digits", "--attacks", "all", "--seeds", "0", "--defenses",
                 "none,badloss", *overrides(), "--workdir", str(folder)]  # fmt: skip
    items = slurm("badloss", "sweep", *arguments, "--list").splitlines()
    assert len(items) == 2
    job = slurm.submit(*arguments, file="sweep", options=("--array=0-1", "--mem=0"))

    def states():
        return slurm("squeue", "--noheader", f"--job={job}", "--states=all", "--array", "--format=%T").split()

    wait_until(lambda: set(states()) <= {"COMPLETED", "FAILED", "CANCELLED"}, 300)
    logs = "\n".join(file.read_text() for file in slurm.folder.glob("*.log"))
    listed = slurm("badloss", "sweep", *arguments, "--list").splitlines()
    assert [line.split()[1] for line in listed] == ["done"] * 2, logs
    assert len(list((folder / "shared" / "models").iterdir())) == 3  # recording, undefended, badloss
    slurm("badloss", "report", "--sweep", str(folder))
    assert "2 of 2 runs are done" in (folder / "report.md").read_text()
