"""The scorer on a mesh: what each device takes, how far ahead the host is, and that nothing of it shows."""

import threading

import jax
import numpy as np
import pytest

from badloss_jax import knn_distances
from badloss_jax.core.mesh import by_rows, make_mesh, replicated
from badloss_jax.scoring import distances
from badloss_jax.scoring.kernels import on_devices

K = 3
DEVICES = 8


@pytest.fixture
def probes(rng):
    return rng.random((9, 8)).astype(np.float32)


@pytest.fixture
def few_at_a_time(monkeypatch, probes):
    """Lets a device take 50 rows at a time."""
    monkeypatch.setattr("badloss_jax.scoring.rows.CPU_DISTANCES", 50 * len(probes))


@pytest.fixture
def watched(monkeypatch):
    """Notes of every chunk its shape, how many of that shape lie on devices, and how many are not waited for."""
    chunks = []
    waited = []
    to_host = distances.to_host

    def watched_kernel(k, mesh):
        kernel = on_devices(k, mesh)

        def call(rows, probes, choice):
            there = sum(array.shape == rows.shape for array in jax.live_arrays())
            chunks.append((rows.sharding.shard_shape(rows.shape), there, len(chunks) - len(waited)))
            return kernel(rows, probes, choice)

        return call

    def watched_wait(array):
        waited.append(array)
        return to_host(array)

    monkeypatch.setattr(distances, "on_devices", watched_kernel)
    monkeypatch.setattr(distances, "to_host", watched_wait)
    return chunks


def mesh_of(count):
    return make_mesh(jax.devices()[:count])


@pytest.mark.parametrize(("count", "labelled"), [(1, False), (9, False), (9, True), (401, False), (1001, True)])
@pytest.mark.usefixtures("few_at_a_time")
def test_the_number_of_devices_does_not_show(rng, probes, count, labelled):
    """Not in a single bit, also of rows without distances and of those whose squares overflow."""
    rows = rng.random((count, 8)).astype(np.float32)
    rows[count // 2] *= 1e25
    if count > 1:
        rows[-1, 5] = np.nan
    how = {"kernel": "xla", "exclude_non_finite": True}
    if labelled:
        how |= {"labels": rng.integers(0, 3, count), "probe_labels": np.arange(9) % 3}

    of_one = knn_distances(rows, probes, K, mesh_of(1), **how)
    of_all = knn_distances(rows, probes, K, mesh_of(DEVICES), **how)
    np.testing.assert_array_equal(of_all, of_one)
    assert np.isnan(of_one).sum() == (count > 1)
    assert of_one[count // 2] > 1e24


@pytest.mark.parametrize("devices", [1, 2, DEVICES])
@pytest.mark.usefixtures("few_at_a_time")
def test_a_device_takes_as_many_rows_whatever_the_number_of_devices(rng, probes, watched, devices):
    knn_distances(rng.random((1001, 8)).astype(np.float32), probes, K, mesh_of(devices), kernel="xla")
    assert [shape for shape, *_ in watched] == [(50, 8)] * -(-1001 // (50 * devices))


def test_devices_take_no_more_rows_than_there_are(rng, probes, watched):
    knn_distances(rng.random((9, 8)).astype(np.float32), probes, K, mesh_of(DEVICES), kernel="xla")
    assert [shape for shape, *_ in watched] == [(2, 8)]


@pytest.mark.parametrize("devices", [1, DEVICES])
@pytest.mark.usefixtures("few_at_a_time")
def test_devices_have_two_chunks_before_them_at_most(rng, probes, watched, devices):
    """XLA's CPU client stands still at 32, and more would only take memory."""
    knn_distances(rng.random((40 * 50 * devices, 8)).astype(np.float32), probes, K, mesh_of(devices), kernel="xla")
    assert len(watched) == 40
    assert {there for _, there, _ in watched} == {1}  # those before were given up once they were under way
    assert {not_waited_for for *_, not_waited_for in watched[1:]} == {1}


@pytest.mark.parametrize("kernel", ["on_cpu", "on_devices"])
def test_the_next_chunk_is_read_while_one_is_computed(rng, probes, monkeypatch, kernel):
    """The kernel waits for the reading that follows, which never came if it was read by the same thread."""
    monkeypatch.setattr("badloss_jax.scoring.rows.CHUNK_VALUES", 50 * 8)
    values = rng.random((501, 8)).astype(np.float32)
    reading = [threading.Event() for _ in range(11)]
    computed = []
    ours = getattr(distances, kernel)

    class Rows:
        shape = values.shape
        dtype = values.dtype

        def __getitem__(self, rows):
            reading[rows.start // 50].set()
            return values[rows]

    def wait_for_the_next():
        computed.append(len(computed))
        assert all(event.wait(10) for event in reading[: len(computed) + 1])

    def on_devices_that_waits(k, mesh):
        compute = ours(k, mesh)

        def call(*arguments):
            wait_for_the_next()
            return compute(*arguments)

        return call

    def on_cpu_that_waits(*arguments):
        wait_for_the_next()
        return ours(*arguments)

    waits = {"on_cpu": on_cpu_that_waits, "on_devices": on_devices_that_waits}
    monkeypatch.setattr(distances, kernel, waits[kernel])
    knn_distances(Rows(), probes, K, kernel={"on_cpu": "numba", "on_devices": "xla"}[kernel])
    assert len(computed) == 11


@pytest.mark.parametrize("chosen", [False, True])
def test_devices_exchange_nothing(chosen):
    mesh = mesh_of(DEVICES)
    shapes = [jax.ShapeDtypeStruct((80, 40), np.float32, sharding=by_rows(mesh))]
    shapes.append(jax.ShapeDtypeStruct((9, 40), np.float32, sharding=replicated(mesh)))
    choice = jax.ShapeDtypeStruct((80, 3), np.int32, sharding=by_rows(mesh)) if chosen else None
    compiled = on_devices(K, mesh).lower(*shapes, choice).compile()

    assert "num_partitions=8" in compiled.as_text()
    for operation in ("all-", "collective-", "reduce-scatter", "send", "recv"):
        assert operation not in compiled.as_text()
    assert compiled.output_shardings == by_rows(mesh)
