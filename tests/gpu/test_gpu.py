"""What a GPU could do otherwise than a CPU. `BADLOSS_TEST_GPU=1 pytest tests/gpu` takes a GPU, and fails without one.

Otherwise all of it runs on the CPU, where a comparison with the CPU tells nothing but that the test itself works.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from badloss_jax.core.mesh import make_mesh
from badloss_jax.runs.experiment import run_experiment
from badloss_jax.scoring import knn_distances, leave_one_out_distances
from badloss_jax.training.objective import MeanLoss
from badloss_jax.training.state import AdamW, create_state
from badloss_jax.training.step import make_train_step
from badloss_jax.trajectories.buffer import create_column, local_runs, make_write
from badloss_jax.trajectories.kinds import Kinds
from tests.training.test_training import SPEC, record, resident

KINDS = Kinds(("prob", "logits", "ranked", "features"), 10, SPEC.num_features, feature_dim=4)


@pytest.fixture
def cpu():
    return make_mesh(jax.devices("cpu")[:1])


@pytest.mark.parametrize("shape", [(30,), (30, 8)])
def test_distances_are_those_of_float64(device, cpu, rng, shape):
    """Trajectories that nearly agree, where products in TF32, or |a|^2 - 2ab + |b|^2, would give nonsense."""
    rows = (5 + 1e-3 * rng.standard_normal((700, *shape))).astype(np.float32)
    probes, exact = rows[:40], rows.astype(np.float64).reshape(700, -1)
    pairs = np.sort(np.sqrt(((exact[:, None] - exact[None, :40]) ** 2).sum(-1)), axis=1)
    distances = knn_distances(rows, probes, 7, device)
    np.testing.assert_allclose(distances, pairs[:, :7].mean(1), rtol=1e-5)
    np.testing.assert_allclose(distances, knn_distances(rows, probes, 7, cpu), rtol=1e-5)
    others = pairs[:40, 1:8]  # the nearest probe of a probe is itself
    np.testing.assert_allclose(leave_one_out_distances(probes, 7), others.mean(1), rtol=1e-5)


def test_the_first_steps_are_those_of_the_cpu(device, cpu):
    """In full float32: by default GPUs multiply in TF32, whose losses differ in the third digit."""
    seen = []
    with jax.default_matmul_precision("highest"):
        for mesh in (device, cpu):
            data, state = resident(mesh), create_state(SPEC, AdamW(), 0, mesh)
            column = create_column(KINDS, tuple(KINDS.layout()), len(data), mesh)
            step = make_train_step(SPEC, AdamW(), MeanLoss(), "none", KINDS, mesh)
            for batch in data.batches(np.arange(96, dtype=np.int32).reshape(3, 32)):
                state, *_, values = step(state, batch, np.int32(0), np.float32(1e-3), np.uint32(0), None)
                column = make_write(mesh)(column, batch.ids, values)
            seen.append({kind: run for kind, (run,) in local_runs(column, 96, mesh).items()})
    for kind in KINDS.layout():
        np.testing.assert_allclose(seen[0][kind], seen[1][kind], rtol=0, atol=1e-2, err_msg=kind)
        assert np.isfinite(seen[0][kind]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_step_sees_is_written_into_the_column_where_it_is(device, dtype):
    spec = replace(SPEC, dtype=dtype)
    data, state = resident(device), create_state(spec, AdamW(), 0, device)
    column = create_column(KINDS, tuple(KINDS.layout()), len(data), device)
    step = make_train_step(spec, AdamW(), MeanLoss(), "crop_flip", KINDS, device)
    (batch,) = data.batches(np.arange(32, dtype=np.int32)[None])
    _, loss, _, values = step(state, batch, np.int32(1), np.float32(1e-3), np.uint32(0), None)
    before = {kind: (array, array.unsafe_buffer_pointer()) for kind, array in column.items()}
    column = make_write(device)(column, batch.ids, values)
    for kind, (array, address) in before.items():
        assert array.is_deleted()
        assert column[kind].unsafe_buffer_pointer() == address
    assert np.isfinite(float(loss))
    (losses,) = local_runs(column, len(data), device)["loss"]
    assert losses.dtype == np.float32
    assert np.isfinite(losses[:32]).all()
    assert np.isnan(losses[32:]).all()


@pytest.mark.parametrize("capture", ["step", "sweep"])
def test_bfloat16_learns(device, tmp_path, capture):
    store, _ = record(tmp_path, 1, capture=capture, epochs=3, spec=replace(SPEC, dtype="bfloat16"))
    losses = store.read("loss")
    assert losses[:, 2].mean() < losses[:, 0].mean() < 3


def test_a_whole_run(device, tmp_path, tiny):
    results = run_experiment(tiny(), tmp_path / "run", mesh=device)
    assert results["environment"]["devices"][0].startswith(jax.default_backend())
    assert 0.5 < results["variants"]["combined/alpha"]["detection"]["auroc"]["overall"] <= 1
    assert (tmp_path / "run" / "report.html").is_file()
