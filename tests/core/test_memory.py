"""How much memory there is, by the machine, by control groups as Slurm and containers set them, and by JAX."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from badloss_jax.cli import main, report
from badloss_jax.core import memory
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.mesh import make_mesh
from badloss_jax.training import resident
from badloss_jax.training.recorder import Recorder
from badloss_jax.training.resident import ResidentData
from badloss_jax.trajectories.kinds import Kinds
from badloss_jax.trajectories.store import TrajectoryStore
from tests.conftest import unpack

GIB = 2**30
MEMINFO = (
    b"MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\nSwapFree: 1048576 kB\nHugePages_Free: 0\n"  # 32 GiB, 1 of swap
)


def system(tmp_path, groups, files):
    """A /proc and a /sys that have these groups, and these files of theirs."""
    unpack(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups.encode()})
    return unpack(tmp_path / "sys/fs/cgroup", {name: str(value).encode() for name, value in files.items()}).parents[2]


def of_two(folder, limit, used, files=0):
    """The files of a group of version 2."""
    stat = f"anon 5\ninactive_file {files}\nactive_file 0\n"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat}


def of_one(folder, limit, used, files=0):
    """The files of a group of version 1."""
    stat = f"cache 5\ntotal_inactive_file {files}\ntotal_active_file 0\n"
    folder = f"memory/{folder}"
    return {f"{folder}/memory.limit_in_bytes": limit, f"{folder}/memory.usage_in_bytes": used,
            f"{folder}/memory.stat": stat}  # fmt: skip


def test_this_machine_has_memory():
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    meminfo = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    assert 2**20 < memory.free_on_host() <= 1024 * (meminfo["MemTotal"] + meminfo["SwapTotal"])


@pytest.mark.parametrize(
    ("groups", "files", "gib"),
    [
        ("0::/\n", {}, 32),
        ("0::/job/step\n", of_two("job/step", "max", GIB), 32),
        ("0::/job/step\n", of_two("job/step", 8 * GIB, 2 * GIB, GIB), 7),  # cached files make way
        ("0::/job/step\n", of_two("job/step", "max", GIB) | of_two("job", 4 * GIB, 3 * GIB), 1),  # Slurm limits both
        ("0::/on/the/host\n", of_two(".", 2 * GIB, GIB), 1),  # a container, in which its own group is the root
        ("0::/job\n", of_two("job", GIB, 2 * GIB), 0),
        ("4:memory:/slurm/job\n1:cpu:/\n", of_one("slurm/job", 6 * GIB, GIB), 5),
        ("4:hugetlb,memory:/slurm/job\n0::/\n", of_one("slurm/job", 2**63 - 4096, GIB) | of_one("slurm", GIB, 0), 1),
        ("4:memory:/slurm\n", of_one("slurm", 64 * GIB, GIB), 32),
    ],
)
def test_control_groups_have_less(tmp_path, groups, files, gib):
    assert memory.free_on_host(system(tmp_path, groups, files)) == (gib + 1) * GIB  # and swap


def test_without_proc_it_is_all_memory(tmp_path):
    assert memory.free_on_host(tmp_path) >= memory.free_on_host()


def test_the_host_is_refused_with_both_numbers(monkeypatch):
    memory.check_host_memory(2**20, "12 images", "take fewer")
    monkeypatch.setattr(memory, "free_on_host", lambda: 3 * GIB)
    memory.check_host_memory(3 * GIB, "12 images", "take fewer")
    with pytest.raises(
        DataError, match=r"^12 images take 6,442,450,944 bytes, .* \(6\.00 GiB and 3\.00 GiB\): take fewer"
    ):
        memory.check_host_memory(6 * GIB, "12 images", "take fewer")


@pytest.mark.parametrize(("devices", "needs"), [(1, r"0\.01 GiB"), (8, r"0\.08 GiB on 8 CPU devices")])
def test_the_resident_data_set_counts_every_device(monkeypatch, devices, needs):
    images = np.zeros((10_001, 32, 32, 1), np.uint8)[1:]  # 10 MiB, and rows to be replaced of a 16th of that
    arrays = (images, np.zeros(10_000, np.int32), np.zeros(0, int), np.zeros((0, 32, 32, 1), np.float32))
    monkeypatch.setattr(resident, "placed_bytes", lambda array, _: array.nbytes)
    mesh = make_mesh(jax.devices()[:devices])

    monkeypatch.setattr(memory, "free_on_host", lambda: devices * 13 * 10**6)
    assert len(ResidentData.place(mesh, *arrays)) == 10_000
    monkeypatch.setattr(memory, "free_on_host", lambda: devices * 10**7)
    said = rf"data set of 10,000 images of 32 x 32 x 1 takes at least {needs}, .* 0\.0. GiB free: --config\.data\.input"
    with pytest.raises(UsageError, match=said):
        ResidentData.place(mesh, *arrays)


def test_what_a_device_takes_as_it_is_is_not_counted(mesh):
    room = np.zeros(2**16 + 64, np.uint8)
    begin = -room.ctypes.data % 64
    aligned = room[begin:][: 2**16]
    assert memory.placed_bytes(aligned, mesh) == 0
    assert memory.placed_bytes(aligned[1:], mesh) == 2**16 - 1
    pointer = jax.device_put(aligned, mesh.devices.flat[0]).unsafe_buffer_pointer()
    assert pointer == aligned.ctypes.data  # so it is: no copy was made


def test_devices_say_what_they_have(monkeypatch):
    class Device:
        platform, process_index = "gpu", jax.process_index()

        def __init__(self, **stats):
            self.memory_stats = lambda: stats

    class Mesh:
        def __init__(self, *devices):
            self.devices = np.array(devices)

    full = Device(bytes_limit=8 * GIB, bytes_in_use=7 * GIB)
    assert memory.free_on_devices(Mesh(Device(bytes_limit=8 * GIB), full)) == GIB
    assert memory.free_on_devices(Mesh(full, Device())) is None
    memory.check_device_memory(2**60, Mesh(Device()), "a step", "take less")
    with pytest.raises(
        UsageError, match=r"a step takes at least 2\.00 GiB on each device, and one has 1\.00 GiB free: take less"
    ):
        memory.check_device_memory(2 * GIB, Mesh(full), "a step", "take less")


def test_a_recording_that_cannot_fit_is_refused(tmp_path, monkeypatch, mesh):
    kinds = Kinds((), 10, 8)
    store = TrajectoryStore.create(
        tmp_path / "store", "", np.zeros(10**7, int), np.zeros(10**7, bool), 50, kinds.layout()
    )
    monkeypatch.setattr(memory, "free_on_host", lambda: 2 * 10**7)  # 4 bytes an example are 40 million
    with pytest.raises(
        UsageError, match=r"recorded of 10,000,000 examples in an epoch takes at least 0\.04 GiB.* has 0\.02 GiB"
    ):
        Recorder(kinds, "sweep", store, mesh, 100)


@pytest.mark.parametrize(
    ("work", "number"),
    [(lambda: jnp.zeros(2**50, jnp.float32), "4503599627370496 bytes"), (lambda: np.zeros(2**50), "8.00 PiB")],
    ids=["JAX", "NumPy"],
)
def test_memory_that_is_exhausted_is_an_error_with_both_numbers(monkeypatch, capsys, tmp_path, work, number):
    """What JAX and NumPy really raise."""
    monkeypatch.setattr(report, "run", lambda *_: work())
    assert main(["report", "--workdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("badloss: error: out of memory: ")
    assert number in error
    assert "the machine has " in error
    assert "--config.recording.batch_size" in error


def test_other_errors_stay_what_they_are(monkeypatch, tmp_path):
    def work(*_):
        raise RuntimeError("INTERNAL: something else")

    monkeypatch.setattr(report, "run", work)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        main(["report", "--workdir", str(tmp_path)])


# Pages that the system had to give for memory of 64 MiB, asked for and given back again and again.
PAGES = """
import resource, sys
from badloss_jax.core.memory import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
for _ in range(3):
    b"x" * 2**26
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    b"x" * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(memory.ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
@pytest.mark.parametrize(
    ("how", "platforms", "kept"), [("keep", "cpu", True), ("keep", "cuda,cpu", False), ("leave", "cpu", False)]
)
def test_memory_is_kept_where_jax_has_only_cpus(how, platforms, kept):
    command = [sys.executable, "-c", PAGES, how]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": platforms}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    pages = 4 * 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert (int(done.stdout) < pages / 100) == kept


# How many threads there are when a command keeps memory: NumPy begins one a core, and JAX far more, which keep none.
THREADS = """
import os, sys
from badloss_jax.cli import main
from badloss_jax.core import memory
memory.keep_memory = lambda: sys.exit(str(len(os.listdir("/proc/self/task"))))
main(sys.argv[1:])
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are not seen in /proc")
@pytest.mark.parametrize(
    "arguments",
    [
        "run --config configs/digits.py --workdir W",
        "sweep --config configs/sweeps/paper_table.py:digits --workdir W",
        "scan --data D --probes P --workdir W",
        "bench train",
    ],
)
def test_memory_is_kept_before_jax_begins_its_threads(arguments):
    done = subprocess.run([sys.executable, "-c", THREADS, *arguments.split()], capture_output=True, text=True)
    assert int(done.stderr) <= os.cpu_count()
