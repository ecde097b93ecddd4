"""The kernel for the CPU at every width of a row, and that a row's bits do not depend on what is computed beside it."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from badloss_jax import knn_distances, leave_one_out_distances
from badloss_jax.scoring import kernels
from badloss_jax.scoring.numba_kernel import LINE, ROWS, TOGETHER, Workspace, columns_of, mean_of_nearest


def reference(rows, probes, k):
    """The definition, in float64."""
    distances = cdist(np.asarray(rows, np.float64), np.asarray(probes, np.float64))
    return np.sort(distances, axis=1)[:, :k].mean(1)


def draw_floats(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(
    width=st.one_of(st.integers(1, 9), st.integers(TOGETHER - 5, TOGETHER + 5), st.integers(2 * TOGETHER - 1, 300)),
    num_probes=st.integers(1, 3 * LINE + 1),
    count=st.integers(1, 2 * ROWS + 3),
    seed=st.integers(0, 2**32 - 1),
)
@example(width=TOGETHER, num_probes=LINE, count=ROWS, seed=0)
@example(width=TOGETHER + 1, num_probes=LINE + 1, count=ROWS + 1, seed=0)
@example(width=960, num_probes=250, count=50, seed=0)
def test_distances_of_any_shape_are_exact(width, num_probes, count, seed):
    rng = np.random.default_rng(seed)
    rows = draw_floats(rng, count, width)
    probes = draw_floats(rng, num_probes, width)
    k = rng.integers(1, num_probes, endpoint=True)
    np.testing.assert_allclose(knn_distances(rows, probes, k, kernel="numba"), reference(rows, probes, k), rtol=1e-6)


# Where a product of matrices would cancel: (how far from zero everything lies, how far rows lie from probes).
@pytest.mark.parametrize(("offset", "distance"), [(0, 1e-4), (0, 1e-6), (1e3, 1e-2), (1e4, 1e-1), (-1e6, 1e2)])
@pytest.mark.parametrize("width", [TOGETHER - 1, TOGETHER + 2, 960])
def test_rows_close_to_probes_are_exact(rng, width, offset, distance):
    probes = (offset + draw_floats(rng, 40, width)).astype(np.float32)
    rows = (probes[rng.integers(0, 40, 100)] + distance * draw_floats(rng, 100, width)).astype(np.float32)
    for k in (1, 7):
        got = knn_distances(rows, probes, k, kernel="numba")
        np.testing.assert_allclose(got, reference(rows, probes, k), rtol=1e-6)


@pytest.mark.parametrize("width", [TOGETHER + 1, 960])
def test_wide_probes_themselves_are_at_distance_zero(rng, width):
    probes = draw_floats(rng, 30, width) + np.float32(1000)
    assert (knn_distances(probes, np.concatenate([probes] * 3), 3, kernel="numba") == 0).all()
    expected = [reference(probes[[i]], np.delete(probes, i, 0), 4)[0] for i in range(30)]
    np.testing.assert_allclose(leave_one_out_distances(probes, 4, kernel="numba"), expected, rtol=1e-6)


@pytest.mark.parametrize("width", [5, TOGETHER + 3, 960])
def test_labels_of_any_size(rng, width):
    """Ranges of probes that begin and end anywhere in a line, and rows of all labels in any order."""
    sizes = [LINE - 1, 6, LINE, 1 + LINE, 2 * LINE + 5]
    probe_labels = rng.permutation(np.repeat(np.arange(5), sizes))
    labels = rng.integers(0, 5, 150)
    probes = draw_floats(rng, len(probe_labels), width)
    rows = draw_floats(rng, 150, width)
    got = knn_distances(rows, probes, 5, labels=labels, probe_labels=probe_labels, kernel="numba")
    for label in range(5):
        expected = reference(rows[labels == label], probes[probe_labels == label], 5)
        np.testing.assert_allclose(got[labels == label], expected, rtol=1e-6)

    got = leave_one_out_distances(probes, 5, labels=probe_labels, kernel="numba")
    for i, label in enumerate(probe_labels):
        others = (probe_labels == label) & (np.arange(len(probes)) != i)
        np.testing.assert_allclose(got[i], reference(probes[[i]], probes[others], 5)[0], rtol=1e-6)


@pytest.mark.parametrize("width", [7, TOGETHER + 3, 960])
def test_rows_that_are_not_finite_or_overflow_do_not_spread(rng, width):
    rows = draw_floats(rng, 70, width)
    probes = draw_floats(rng, 20, width)
    expected = reference(rows, probes, 3)

    # The last columns, the first, and rows before and after in the same group of four.
    rows[2, -1] = np.nan
    rows[5, 0] = np.inf
    rows[67, -1] = -np.inf
    rows[68] *= 1e25
    expected[[2, 5, 67]] = np.nan
    expected[68] = reference(rows[[68]], probes, 3)[0]
    got = knn_distances(rows, probes, 3, kernel="numba", exclude_non_finite=True)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_rows_without_columns_are_at_distance_zero():
    assert (knn_distances(np.zeros((5, 0)), np.zeros((4, 0)), 2, kernel="numba") == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 30, TOGETHER, TOGETHER + 1, 960])
def test_the_bits_of_a_row_do_not_depend_on_those_beside_it(rng, width, dtype):
    rows = rng.normal(size=(53, width)).astype(dtype)
    columns = columns_of(rng.normal(size=(37, width)).astype(dtype))
    choice = np.tile(np.array([-1, 0, 37], np.int32), (53, 1))
    choice[::3] = 9, 5, 22  # of another label, the ninth probe left out

    def scores(ids):
        out = np.full(53, np.nan, dtype)
        mean_of_nearest(rows, np.asarray(ids), columns, choice, 4, Workspace.for_columns(columns), out)
        return out[ids]

    whole = scores(np.arange(53))
    assert np.isfinite(whole).all()
    for _ in range(5):
        order = rng.permutation(53)
        np.testing.assert_array_equal(scores(order), whole[order])
    np.testing.assert_array_equal(np.concatenate([scores(np.array([i])) for i in range(53)]), whole)


@pytest.mark.parametrize("width", [30, 200])
def test_the_bits_do_not_depend_on_threads_or_chunks(rng, monkeypatch, width):
    rows = draw_floats(rng, 3001, width)
    probes = draw_floats(rng, 33, width)
    labels = {"labels": rng.integers(0, 2, 3001), "probe_labels": np.arange(33) % 2}
    whole = knn_distances(rows, probes, 5, kernel="numba")
    of_label = knn_distances(rows, probes, 5, kernel="numba", **labels)

    for num_threads in (1, 2, 5):
        for chunk in (2**22, 501 * width, 77 * width):
            monkeypatch.setattr("badloss_jax.scoring.rows.CHUNK_VALUES", chunk)
            monkeypatch.setattr(kernels, "_num_threads", lambda count=num_threads: count)
            with ThreadPoolExecutor(num_threads) as threads:
                monkeypatch.setattr(kernels, "_threads", lambda threads=threads: threads)
                np.testing.assert_array_equal(knn_distances(rows, probes, 5, kernel="numba"), whole)
                np.testing.assert_array_equal(knn_distances(rows, probes, 5, kernel="numba", **labels), of_label)
