"""Two processes of two devices each score what one does, each by what it reads of its own rows."""

import json

import jax
import numpy as np
import pytest

from badloss_jax import knn_distances
from badloss_jax.core.mesh import make_mesh
from tests.cluster.test_processes import finish, free_address, python

KERNELS = ("numba", "xla")
COUNTS = {"many": 1001, "alternating": 1001, "labelled": 1001, "huge": 101, "few": 3, "one": 1}
# The rows of each process: a device has a quarter of them, rounded up, and the last ones have what is left.
OWN = {
    "many": ([[0, 502]], [[502, 1001]]),
    "alternating": ([[0, 251], [502, 753]], [[251, 502], [753, 1001]]),
    "labelled": ([[0, 502]], [[502, 1001]]),
    "huge": ([[0, 52]], [[52, 101]]),
    "few": ([[0, 2]], [[2, 3]]),
    "one": ([[0, 1]], []),
}

# What each process runs: it scores every case, and says how often it gathered, and which rows it read.
_SCORE = """
import json
import sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from badloss_jax import knn_distances
from badloss_jax.core.mesh import make_mesh
from badloss_jax.core.processes import connect
from badloss_jax.scoring import distances, rows

folder, address, process = sys.argv[1:4]
connect(address, 2, int(process))
rows.CPU_DISTANCES = 50 * 9
rows.CHUNK_VALUES = 200 * 8

class Watched:
    def __init__(self, values):
        self.values = values
        self.shape = values.shape
        self.dtype = values.dtype
        self.chunks = []
        self.ids = []

    def __getitem__(self, wanted):
        if isinstance(wanted, slice):
            self.chunks.append((wanted.start, wanted.stop))
        else:
            self.ids += wanted.tolist()
        return self.values[wanted]

gathers = []
gather = multihost_utils.process_allgather

def counted(*arguments, **how):
    gathers.append(arguments)
    return gather(*arguments, **how)

multihost_utils.process_allgather = counted
devices = jax.devices()
said = {}
for kernel in ("numba", "xla"):
    for name in sys.argv[4:]:
        gathers.clear()
        case = dict(np.load(f"{folder}/{name}.npz"))
        watched = Watched(case.pop("trajectories"))
        mesh = make_mesh(devices[::2] + devices[1::2] if name == "alternating" else devices)
        got = knn_distances(watched, k=3, mesh=mesh, kernel=kernel, exclude_non_finite=True, **case)
        np.save(f"{folder}/{kernel}-{name}-{process}.npy", got)
        said[f"{kernel}-{name}"] = {"gathers": len(gathers), "chunks": watched.chunks, "ids": watched.ids}
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Scorings by two processes: their folder, what is scored by its name, and what each says of each scoring."""
    folder = tmp_path_factory.mktemp("scored")
    rng = np.random.default_rng(0)
    cases = {}
    for name, count in COUNTS.items():
        rows = rng.random((count, 8)).astype(np.float32)
        # Of each process a row whose squares overflow, and one without a distance.
        rows[[0, -1]] *= 1e25
        if count > 3:
            rows[[7, -7], 3] = np.nan
        cases[name] = {"trajectories": rows, "probes": rng.random((9, 8)).astype(np.float32)}
        if name in ("labelled", "huge"):
            cases[name] |= {"labels": rng.integers(0, 3, count), "probe_labels": np.arange(9) % 3}

    # The squares of all rows overflow, also beside their probes.
    cases["huge"]["trajectories"][1:-1] *= 1e20
    cases["huge"]["probes"] *= 1e20
    for name, case in cases.items():
        np.savez(folder / f"{name}.npz", **case)

    address = free_address()
    ends = finish([python("-c", _SCORE, str(folder), address, str(process), *COUNTS) for process in range(2)])
    for code, _, err in ends:
        assert code == 0, err
    return folder, cases, [json.loads(out.splitlines()[-1]) for _, out, _ in ends]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", COUNTS)
def test_two_processes_have_the_distances_of_one(scored, monkeypatch, kernel, name):
    """Bit by bit, and both of all rows."""
    folder, cases, _ = scored
    monkeypatch.setattr("badloss_jax.scoring.rows.CPU_DISTANCES", 50 * 9)
    mesh = make_mesh(jax.devices()[:1])
    of_one = knn_distances(k=3, mesh=mesh, kernel=kernel, exclude_non_finite=True, **cases[name])
    for process in range(2):
        np.testing.assert_array_equal(np.load(folder / f"{kernel}-{name}-{process}.npy"), of_one)
    assert np.isnan(of_one).sum() == (2 if COUNTS[name] > 3 else 0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", COUNTS)
def test_processes_read_their_own_rows_in_order_and_gather_once(scored, kernel, name):
    _, _, said = scored
    for own, of_process in zip(OWN[name], said, strict=True):
        scoring = of_process[f"{kernel}-{name}"]
        assert scoring["gathers"] == 1

        ranges = []
        for start, stop in scoring["chunks"]:
            if ranges and ranges[-1][1] == start:
                ranges[-1][1] = stop
            else:
                ranges.append([start, stop])
        assert ranges == own

        # What overflowed is read once more.
        assert all(any(begin <= number < end for begin, end in own) for number in scoring["ids"])
