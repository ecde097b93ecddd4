import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from badloss_jax.core.errors import DataError
from badloss_jax.core.mesh import make_mesh
from badloss_jax.trajectories.buffer import (
    column_bytes,
    column_of,
    create_buffer,
    create_column,
    local_runs,
    make_write,
    padding_id,
    write,
    write_epoch,
)
from badloss_jax.trajectories.kinds import Kinds
from badloss_jax.trajectories.store import TrajectoryStore

ALL = Kinds(("prob", "logits", "ranked", "features"), 7, 12, feature_dim=4, ranked_others=3)


def test_kinds_agree_with_float64(rng):
    logits, features, labels = 5 * rng.normal(size=(20, 7)), rng.normal(size=(20, 12)), rng.integers(0, 7, 20)
    seen = ALL.observe(jnp.asarray(logits, jnp.float32), jnp.asarray(features, jnp.float32), jnp.asarray(labels))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    own = log_p[np.arange(20), labels]
    np.testing.assert_allclose(seen["loss"], -own, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen["prob"], np.exp(own), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(seen["logits"], logits, rtol=1e-6)
    others = np.sort([np.delete(row, label) for row, label in zip(log_p, labels, strict=True)])[:, ::-1][:, :3]
    np.testing.assert_allclose(seen["ranked"], np.column_stack([own, others]), rtol=1e-5, atol=1e-5)
    matrix = np.asarray(jax.random.normal(jax.random.key(0), (12, 4))) / 2
    np.testing.assert_allclose(seen["features"], features @ matrix, rtol=1e-4, atol=1e-5)
    for name, (shape, dtype) in ALL.layout().items():
        assert seen[name].shape == (20, *shape)
        assert dtype == (np.float32 if name in ("loss", "prob") else np.float16)


def test_only_what_is_to_be_observed_is_computed_and_written(rng):
    kinds = Kinds(("step", "prob"), 7, 12)
    mesh = make_mesh(jax.devices()[:1])
    column = create_column(kinds, tuple(kinds.layout()), 5, mesh)
    logits, features, labels = jnp.asarray(rng.normal(size=(5, 7))), jnp.zeros((5, 12)), jnp.arange(5)
    step = replace(kinds, observed=("step",)).observe(logits, features, labels)
    sweep = replace(kinds, observed=("loss", "prob")).observe(logits, features, labels)
    assert (step.keys(), sweep.keys()) == ({"step"}, {"loss", "prob"})
    assert kinds.observe(logits, features, labels).keys() == kinds.layout().keys() == {"loss", "step", "prob"}
    np.testing.assert_array_equal(step["step"], sweep["loss"])
    written = write(column, jnp.arange(5), step)
    assert np.isfinite(written["step"][:5]).all()
    assert all(np.isnan(written[kind]).all() for kind in ("loss", "prob"))
    both = write(written, jnp.arange(5), sweep)
    np.testing.assert_array_equal(both["step"], written["step"])
    np.testing.assert_allclose(both["loss"][:5], sweep["loss"], rtol=1e-6)


def test_few_classes_give_few_ranks_and_huge_values_stay_finite():
    kinds = Kinds(("ranked", "logits"), 2, 4)
    assert kinds.layout()["ranked"][0] == (2,)
    seen = kinds.observe(jnp.array([[1e6, -1e6]]), jnp.zeros((1, 4)), jnp.array([1]))
    assert all(np.isfinite(np.asarray(seen[name], np.float16)).all() for name in ("ranked", "logits"))


@pytest.mark.parametrize("num_devices", [1, 4, 8])
def test_buffer_holds_what_was_written(num_devices, rng):
    mesh, kinds = make_mesh(jax.devices()[:num_devices]), Kinds(("features",), 10, 16, feature_dim=5)
    buffer = create_buffer(kinds, 101, 6, mesh)
    assert len(buffer["loss"]) % num_devices == 0
    assert np.isnan(buffer["features"]).all()
    shards = {shard.data.shape[0] for shard in buffer["loss"].addressable_shards}
    assert shards == {len(buffer["loss"]) // num_devices}
    ids = np.append(rng.permutation(101)[:39], padding_id(101, mesh)).astype(np.int32)
    values = {"loss": rng.random(40), "features": rng.random((40, 5))}
    buffer = jax.jit(write_epoch, donate_argnums=0)(buffer, ids, np.int32(4), values)
    assert np.isfinite(buffer["loss"]).sum() == 39  # padding wrote nothing, and nothing else was touched
    alone = create_column(kinds, ("loss", "features"), 101, mesh)
    for column in (column_of(buffer, np.int32(4)), make_write(mesh)(alone, ids, values)):
        runs = {kind: run for kind, (run,) in local_runs(column, 101, mesh).items()}
        assert len(runs["loss"]) == 101
        np.testing.assert_array_equal(runs["loss"][ids[:39]], values["loss"][:39].astype(np.float32))
        np.testing.assert_array_equal(runs["features"][ids[:39]], values["features"][:39].astype(np.float16))
        assert np.isfinite(runs["loss"]).sum() == 39


def test_a_column_holds_what_it_is_for_and_its_size_is_known(mesh):
    column = create_column(ALL, ("loss", "features"), 101, mesh)
    assert {kind: array.shape for kind, array in column.items()} == {"loss": (101,), "features": (101, 4)}
    everything = create_column(ALL, tuple(ALL.layout()), 101, mesh)
    assert column_bytes(ALL, 101, mesh) == sum(array.nbytes for array in everything.values())


@pytest.fixture
def store(tmp_path):
    made = TrajectoryStore.create(tmp_path / "t", "hash", np.arange(5), np.arange(5) < 2, 3, ALL.layout())
    for epoch in range(3):
        columns = {k: np.full((5, *s), epoch, d) for k, (s, d) in ALL.layout().items()}
        made.write_epoch(epoch, columns)
    return made


def test_store_round_trip(store):
    opened = TrajectoryStore.open(store.folder)
    assert opened == store
    assert opened.complete
    assert opened.read("logits").shape == (5, 3, 7)
    np.testing.assert_array_equal(opened.read("loss", np.array([0, 2])), [[0, 2]] * 5)
    assert opened.labels().tolist() == [0, 1, 2, 3, 4]
    assert opened.probe_ids().tolist() == [0, 1]


def test_store_reads_ranges_and_ids_from_any_sharding(tmp_path, rng, monkeypatch):
    monkeypatch.setattr("badloss_jax.trajectories.store._BLOCK", 7)
    values = rng.random((3, 40, 4)).astype(np.float16)
    made = TrajectoryStore.create(
        tmp_path / "t", "", np.arange(40), np.arange(40) < 2, 3, {"features": ((4,), "float16")}
    )
    for epoch, bounds in enumerate([[0, 40], [0, 13, 40], [0, 5, 6, 31, 40]]):
        assert not made.complete
        for shard, (begin, end) in enumerate(itertools.pairwise(bounds)):
            made.write_epoch(epoch, {"features": values[epoch, begin:end]}, shard, len(bounds) - 1)
    rows, whole = made.rows("features"), values.swapaxes(0, 1)
    assert (made.complete, rows.shape, rows.dtype) == (True, (40, 3, 4), np.float16)
    np.testing.assert_array_equal(rows[:], whole)
    for start, stop in ((0, 1), (3, 33), (12, 14), (39, 99), (5, 5)):
        np.testing.assert_array_equal(rows[start:stop], whole[start:stop])
    ids = np.array([0, 4, 5, 13, 14, 30, 31, 39])
    np.testing.assert_array_equal(rows[ids], whole[ids])
    np.testing.assert_array_equal(made.rows("features", np.array([2, 0]))[20:25], whole[20:25, [2, 0]])
    (tmp_path / "t" / "features" / "epoch_0002-00002-of-00004.npy").unlink()
    assert not made.complete
    with pytest.raises(DataError, match=r"epoch_0002-.*not all of its shards are there"):
        made.rows("features")


def test_store_keeps_the_first_epochs(store, tmp_path):
    half = {kind: np.zeros((2, *shape), dtype) for kind, (shape, dtype) in ALL.layout().items()}
    store.write_epoch(2, half, 0, 2)  # as a process wrote it whose peer was killed
    store.keep_first(3)
    assert store.complete
    store.keep_first(2)
    assert store.finished().num_epochs == 2
    assert not list(store.folder.glob("*/epoch_0002*"))
    next((store.folder / "prob").glob("epoch_0000*")).unlink()
    with pytest.raises(DataError, match=r"lacks epoch 0$"):
        store.keep_first(2)
    store.keep_first(0)
    assert not list(store.folder.glob("*/epoch*"))


def test_store_says_what_is_wrong(store):
    with pytest.raises(DataError, match="no trajectories of kind 'aum', only loss, prob"):
        store.read("aum")
    (store.folder / "prob" / "epoch_0001-00000-of-00001.npy").unlink()
    assert not store.complete
    with pytest.raises(DataError, match=r"prob/epoch_0001-\*.npy is missing"):
        store.read("prob")
    path = store.folder / "loss" / "epoch_0002-00000-of-00001.npy"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"epoch_0002-00000-of-00001.npy is missing or damaged"):
        store.read("loss")
    np.save(path, np.zeros(6, np.float32))
    with pytest.raises(DataError, match="has 6 rows, expected 5"):
        store.read("loss")
    np.save(path, np.zeros((5, 2), np.float32))
    with pytest.raises(DataError, match=r"is float32 \(5, 2\), expected float32 \('N',\)"):
        store.read("loss")
    np.save(path, np.array([0, 1, np.nan, np.inf, 0], np.float32))
    with pytest.raises(DataError, match=r"0002-00000-of-00001.npy: some .* not finite, first id 2"):
        store.read("loss")
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(DataError, match="damaged"):
        store.read("loss")


@pytest.mark.parametrize("ids", [np.array([1, 0]), np.array([1, 5]), np.array([1, 1]), np.array([-1]), np.zeros(2)])
def test_probes_that_are_none(store, ids):
    np.save(store.folder / "probes.npy", ids)
    with pytest.raises(DataError, match=r"probes.npy does not hold ids, ascending, of 5 examples"):
        store.probe_ids()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', "null"])
def test_damaged_store(store, text):
    (store.folder / "about.json").write_text(text)
    with pytest.raises(DataError, match=r"about.json is damaged|format 'other'"):
        TrajectoryStore.open(store.folder)


def test_no_store(tmp_path):
    with pytest.raises(DataError, match="holds no recorded trajectories"):
        TrajectoryStore.open(tmp_path)
