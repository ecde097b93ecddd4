import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import false_discovery_control

from badloss_jax import (
    anomaly_scores,
    benjamini_hochberg,
    conformal_p_values,
    filter_epochs,
    knn_distances,
    leave_one_out_distances,
    reject,
)
from badloss_jax.core.errors import UsageError
from badloss_jax.core.mesh import make_mesh
from badloss_jax.scoring import mean_standardised


def reference(trajectories, probes, k):
    """The definition, in float64."""
    rows, others = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (trajectories, probes))
    distances = np.sqrt(((rows[:, None] - others[None]) ** 2).sum(-1))
    return np.sort(distances, axis=1)[:, :k].mean(1)


KERNELS = ("numba", "xla")


def assert_exact(trajectories, probes, k):
    expected = reference(trajectories, probes, k)
    for kernel in KERNELS:
        got = knn_distances(trajectories, probes, k, kernel=kernel)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=kernel)


ADVERSARIAL = {
    "ordinary": lambda r: (r.random((500, 30)), r.random((250, 30)), 50),
    "huge offset, tiny differences": lambda r: (1e4 + 1e-2 * r.random((200, 30)), 1e4 + 1e-2 * r.random((60, 30)), 7),
    "outlying probes": lambda r: (r.random((200, 30)), np.concatenate([r.random((50, 30)), np.full((3, 30), 1e6)]), 51),
    "ties": lambda r: (r.integers(0, 2, (300, 4)).astype(float), r.integers(0, 2, (40, 4)).astype(float), 9),
    "duplicates of probes": lambda r: ((p := r.random((40, 30))), np.concatenate([p, p, p]), 3),
    "k = 1": lambda r: (r.random((100, 30)), r.random((20, 30)), 1),
    "k = P": lambda r: (r.random((100, 30)), r.random((20, 30)), 20),
    "T = 1": lambda r: (r.random((100, 1)), r.random((20, 1)), 5),
    "N = 1": lambda r: (r.random((1, 30)), r.random((20, 30)), 5),
    "k = 1 of 1": lambda r: (r.random((100, 30)), r.random((1, 30)), 1),
    "a block of columns, exactly": lambda r: (r.random((50, 64)), r.random((20, 64)), 5),
    "long": lambda r: (r.random((50, 30, 100)), r.random((20, 30, 100)), 5),
    "long, with an offset": lambda r: (1e3 + 1e-2 * r.random((50, 3000)), 1e3 + 1e-2 * r.random((20, 3000)), 5),
    "one row far off": lambda r: (np.r_[r.random((50, 30)), np.full((1, 30), -1e20)], r.random((20, 30)), 5),
    "logits": lambda r: (r.normal(size=(100, 12, 10)), r.normal(size=(20, 12, 10)), 5),
    "probes at 1e30": lambda r: (r.random((50, 30)), np.concatenate([r.random((9, 30)), np.full((3, 30), 1e30)]), 12),
    "rows at 1e25": lambda r: (1e25 * r.random((50, 30)), r.random((9, 30)), 5),
    "tiny": lambda r: (1e-7 * r.random((100, 30)), 1e-7 * r.random((20, 30)), 5),
}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_knn_distances_are_exact(case, rng):
    trajectories, probes, k = ADVERSARIAL[case](rng)
    assert_exact(trajectories.astype(np.float32), probes.astype(np.float32), k)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(40, 30), (40, 30, 7)])
def test_duplicates_of_probes_are_at_distance_zero(rng, kernel, shape):
    probes = rng.random(shape).astype(np.float32)
    assert (knn_distances(probes, np.concatenate([probes] * 3), 3, kernel=kernel) == 0).all()


def test_knn_distances_take_jax_arrays_and_float16(rng):
    rows, probes = rng.random((50, 8)).astype(np.float16), rng.random((9, 8)).astype(np.float16)
    assert_exact(jnp.asarray(rows), jnp.asarray(probes), 3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_chunks_do_not_show(rng, monkeypatch, tmp_path, kernel, devices, where):
    rows, probes = rng.random((1001, 8)).astype(np.float32), rng.random((9, 8)).astype(np.float32)
    whole = knn_distances(rows, probes, 3, kernel=kernel)
    monkeypatch.setattr("badloss_jax.scoring.rows.CHUNK_VALUES", 8 * 104)
    if where == "disk":
        np.save(tmp_path / "rows.npy", rows)
        rows = np.load(tmp_path / "rows.npy", mmap_mode="r")
    mesh = make_mesh(jax.devices()[:devices])
    np.testing.assert_allclose(knn_distances(rows, probes, 3, mesh, kernel=kernel), whole, rtol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_are_not_finite_are_left_out_on_request(rng, kernel):
    rows, probes = rng.random((300, 8)).astype(np.float32), rng.random((9, 8)).astype(np.float32)
    whole = knn_distances(rows, probes, 3, kernel=kernel)
    rows[[7, 299], 3], rows[12, 0] = np.nan, -np.inf
    left = knn_distances(rows, probes, 3, kernel=kernel, exclude_non_finite=True)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(left)), [7, 12, 299])
    np.testing.assert_allclose(left[~np.isnan(left)], np.delete(whole, [7, 12, 299]), rtol=1e-6)
    with pytest.raises(UsageError, match="3 trajectories are NaN or infinite, rows 7, 12, 299"):
        knn_distances(rows, probes, 3, kernel=kernel)


def test_kernels_agree_in_float64(rng):
    rows, probes = rng.normal(size=(300, 30)), rng.normal(size=(40, 30))
    with jax.enable_x64(True):
        for kernel in KERNELS:
            got = knn_distances(rows, probes, 7, kernel=kernel)
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, reference(rows, probes, 7), rtol=1e-13)


def test_unknown_kernel(rng):
    with pytest.raises(UsageError, match="unknown kernel 'cuda': expected auto, numba, xla"):
        knn_distances(np.zeros((2, 3)), np.zeros((2, 3)), 1, kernel="cuda")


@settings(deadline=None, max_examples=40)
@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(-1e3, 1e3, width=32)
    ),
    st.integers(1, 6),
    st.data(),
)
def test_knn_distances_property(trajectories, num_probes, data):
    elements = st.floats(-1e3, 1e3, width=32)
    probes = data.draw(hnp.arrays(np.float32, (num_probes, trajectories.shape[1]), elements=elements))
    assert_exact(trajectories, probes, data.draw(st.integers(1, num_probes)))


def test_leave_one_out_ignores_only_itself(rng):
    probes = rng.random((20, 6)).astype(np.float32)
    probes[7] = probes[3]
    expected = [reference(probes[[i]], np.delete(probes, i, 0), 4)[0] for i in range(20)]
    for kernel in KERNELS:
        np.testing.assert_allclose(leave_one_out_distances(probes, 4, kernel=kernel), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(6,), (5, 40)])
def test_reference_sets_of_the_same_label(rng, kernel, shape):
    rows, probes = (rng.random((count, *shape)).astype(np.float32) for count in (200, 40))
    labels, probe_labels = rng.choice([-3, 0, 8], 200), rng.permutation(np.repeat([8, 0, 5, -3], [9, 6, 12, 13]))
    expected = [
        reference(row[None], probes[probe_labels == label], 5)[0] for row, label in zip(rows, labels, strict=True)
    ]
    given = {"kernel": kernel, "labels": labels, "probe_labels": probe_labels}
    np.testing.assert_allclose(knn_distances(rows, probes, 5, **given), expected, rtol=1e-5)
    mesh = make_mesh(jax.devices()[:8])
    np.testing.assert_allclose(knn_distances(rows, probes, 5, mesh, **given), expected, rtol=1e-5)
    rows[3] *= 1e25  # its squares overflow
    expected[3] = reference(rows[3:4], probes[probe_labels == labels[3]], 5)[0]
    np.testing.assert_allclose(knn_distances(rows, probes, 5, **given), expected, rtol=1e-5)
    others = [np.flatnonzero((probe_labels == label) & (np.arange(40) != i)) for i, label in enumerate(probe_labels)]
    expected = [reference(probes[[i]], probes[other], 5)[0] for i, other in enumerate(others)]
    left_out = leave_one_out_distances(probes, 5, kernel=kernel, labels=probe_labels)
    np.testing.assert_allclose(left_out, expected, rtol=1e-5)


def test_labels_with_too_few_probes(rng):
    rows, probes = rng.random((4, 3)), rng.random((5, 3))
    with pytest.raises(UsageError, match="label 1 has 2 probes, and k = 3"):
        knn_distances(rows, probes, 3, labels=np.array([0, 0, 1, 0]), probe_labels=np.array([0, 0, 0, 1, 1]))
    with pytest.raises(UsageError, match="label 7 has 0 probes, and k = 1"):
        knn_distances(rows, probes, 1, labels=np.array([0, 0, 7, 0]), probe_labels=np.array([0, 0, 0, 1, 9]))
    with pytest.raises(UsageError, match="label 1 has 2 probes, and k = 2 others are needed"):
        leave_one_out_distances(probes, 2, labels=np.array([0, 0, 0, 1, 1]))
    with pytest.raises(UsageError, match="go together"):
        knn_distances(rows, probes, 1, labels=np.zeros(4, int))
    with pytest.raises(UsageError, match=r"labels are \(3,\) and probe_labels \(5,\): expected \(4,\) and \(5,\)"):
        knn_distances(rows, probes, 1, labels=np.zeros(3, int), probe_labels=np.zeros(5, int))


@pytest.mark.parametrize(
    ("trajectories", "probes", "k", "message"),
    [
        (np.zeros((5, 3)), np.zeros((4, 3)), 5, "k = 5 with 4 probes"),
        (np.zeros((5, 3)), np.zeros((4, 3)), 0, "k = 0"),
        (np.zeros((5, 3)), np.zeros((4, 2)), 1, r"\(5, 3\) and probes \(4, 2\)"),
        (np.zeros(5), np.zeros(4), 1, r"\(5,\)"),
        (np.array([[0.0], [np.nan], [np.inf]]), np.zeros((4, 1)), 1, "2 trajectories are NaN or infinite, rows 1, 2"),
        (np.zeros((5, 1)), np.array([[np.nan]]), 1, "1 probes are NaN"),
    ],
)
def test_knn_distances_refuse(trajectories, probes, k, message):
    with pytest.raises(UsageError, match=message):
        knn_distances(trajectories, probes, k)


@pytest.mark.parametrize(
    ("means", "kept"),
    [
        ([3, 2, 1, 0.5], [0, 1, 2, 3]),
        ([3, 2, 1, 3.9, 4.1], [0, 1, 2, 3, 4]),  # below 2 x 2; then below 2 x mean(2, 1, 3.9) = 4.6
        ([3, 2, 1, 4.0, 1], [0, 1, 2, 4]),  # 4.0 is not below 2 x 2
        ([1, 1, 1, 9, 9, 1.5, 2.3, 2.4], [0, 1, 2, 5, 6, 7]),  # the limit comes from kept epochs only
    ],
)
def test_filter_epochs_by_hand(means, kept):
    losses = np.array(means)[None] + np.array([[-0.25], [0.25]])
    np.testing.assert_array_equal(filter_epochs(losses), kept)


@pytest.mark.parametrize("losses", [np.zeros((4, 2)), np.zeros((0, 5)), np.full((4, 5), np.nan), np.zeros(5)])
def test_filter_epochs_refuses(losses):
    with pytest.raises(UsageError):
        filter_epochs(losses)


def test_anomaly_scores():
    scores = anomaly_scores(np.array([0.0, 0.99, 0.09]))
    np.testing.assert_allclose(scores, [0, 1, 0.5])  # log 0.01, log 1, log 0.1
    np.testing.assert_allclose(anomaly_scores(np.array([1.0, 3.0, 2.0]), transform="linear"), [0, 1, 0.5])
    np.testing.assert_array_equal(anomaly_scores(np.ones(3)), 0)
    with pytest.raises(UsageError, match="unknown transform 'Log'"):
        anomaly_scores(np.ones(3), transform="Log")


def test_mean_standardised_by_hand():
    probes = np.exp(np.linspace(-1, 1, 101))  # log: median 0, 16th to 84th percentile from -0.68 to 0.68
    ours = np.exp(np.array([0.68, 1.36]))
    z, z_probes = mean_standardised([ours, ours**2], [probes, probes**3])
    np.testing.assert_allclose(z, [(1 + 2 / 3) / 2, (2 + 4 / 3) / 2])
    np.testing.assert_allclose(z_probes, np.linspace(-1, 1, 101) / 0.68, atol=1e-12)


def test_conformal_p_values_by_hand():
    p = conformal_p_values(np.array([0.0, 1.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(p, [1, 1, 0.75, 0.25])


def test_conformal_p_values_are_calibrated_on_clean_data():
    """Over many draws the share of clean examples with p <= alpha is alpha, up to sampling error and the finite P."""
    generator, shares = np.random.default_rng(0), []
    for _ in range(200):
        distances = generator.gamma(2.0, size=300)
        shares.append((conformal_p_values(distances[:200], distances[200:]) <= 0.1).mean())
    expected = np.floor(0.1 * 101) / 101
    assert abs(np.mean(shares) - expected) < 3 * np.std(shares) / np.sqrt(len(shares))


@settings(deadline=None)
@given(hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1)), st.floats(0.001, 0.999))
def test_benjamini_hochberg_agrees_with_scipy(p_values, q):
    adjusted = false_discovery_control(p_values)
    certain = np.abs(adjusted - q) > 1e-12
    np.testing.assert_array_equal(benjamini_hochberg(p_values, q)[certain], (adjusted <= q)[certain])


def test_rejection_rules():
    distances = np.array([5.0, 9.0, 1.0, 7.0, 7.0, 0.0])
    p_values = np.array([0.2, 0.01, 0.9, 0.1, 0.1, 1.0])
    probe = np.array([False, True, False, False, False, False])
    assert reject("fraction", 0.4, distances, p_values, probe).tolist() == [False, False, False, True, True, False]
    assert reject("fraction", 0.2, distances, p_values, probe).tolist() == [False, False, False, True, False, False]
    assert reject("alpha", 0.1, distances, p_values, probe).tolist() == [False, False, False, True, True, False]
    assert reject("fdr", 0.25, distances, p_values, probe).tolist() == [False, False, False, True, True, False]
    assert not reject("fdr", 0.1, distances, p_values, probe).any()
    with pytest.raises(UsageError, match="unknown rejection rule 'best'"):
        reject("best", 0.1, distances, p_values, probe)
