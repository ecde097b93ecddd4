"""`TrajectoryRecorder`: the same buffer in any order, batching, framework and number of parts; scores as by hand."""

import json
from functools import cache, partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet as pq
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from badloss_jax import TrajectoryRecorder
from badloss_jax.cli import main
from badloss_jax.core.errors import DataError, NonFiniteLossError, UsageError
from badloss_jax.core.mesh import make_mesh
from badloss_jax.scoring import class_scales
from badloss_jax.trajectories import batches
from badloss_jax.trajectories.kinds import Kinds

N, T, K, F = 40, 4, 5, 7
SIZES = {"num_classes": K, "num_features": F, "feature_dim": 3, "ranked_others": 2}
PROBES = np.arange(12)


def draw(seed=0):
    """A whole recording: name -> [T, N, ...]."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(T, N, K)).astype(np.float32), np.tile(rng.integers(0, K, N), (T, 1))
    return {"losses": rng.gamma(2, size=(T, N)).astype(np.float32), "logits": logits, "labels": labels,
            "features": rng.normal(size=(T, N, F)).astype(np.float32)}  # fmt: skip


def feed(recorder, seen, cells, batch_size=16, take=lambda array: array):
    """Updates with (epoch, id) cells, in their order."""
    for epoch in range(T):
        ids = np.array([i for e, i in cells if e == epoch], int)
        for start in range(0, len(ids), batch_size):
            some = ids[start : start + batch_size]
            batch = {name: take(array[epoch, some]) for name, array in seen.items()}
            recorder.update(batch.pop("losses"), take(some), epoch, **batch)
    return recorder


ALL = [(epoch, i) for epoch in range(T) for i in range(N)]


@cache
def whole(**changed):
    return feed(TrajectoryRecorder(N, T, **SIZES | changed), draw(), ALL)


def contents(recorder):
    return {kind: np.asarray(array)[:N] for kind, array in recorder.buffer.items()}


def assert_same(ours, theirs):
    ours, theirs = contents(ours), contents(theirs)
    assert ours.keys() == theirs.keys()
    for kind, array in ours.items():
        np.testing.assert_array_equal(array, theirs[kind], err_msg=kind)


@settings(deadline=None, max_examples=5)
@given(st.permutations(ALL), st.integers(5, 40))
def test_order_and_batches_do_not_show(cells, batch_size):
    assert_same(feed(TrajectoryRecorder(N, T, **SIZES), draw(), cells, batch_size), whole())


def test_the_buffer_holds_the_kinds_and_the_losses_of_the_loop():
    seen, held = draw(), contents(whole(keep_logits=True))
    np.testing.assert_array_equal(held["loss"], seen["losses"].T)  # not the cross-entropy of the logits
    kinds = Kinds(("ranked", "features", "logits"), K, F, feature_dim=3, ranked_others=2)
    for epoch in range(T):
        expected = kinds.observe(*(jnp.asarray(seen[name][epoch]) for name in ("logits", "features", "labels")))
        for kind in kinds.names:
            np.testing.assert_allclose(held[kind][:, epoch], expected[kind], rtol=2e-3, atol=1e-3)


@cache
def jitted(devices):
    recorder = TrajectoryRecorder(N, T, **SIZES, mesh=make_mesh(jax.devices()[:devices]))
    return recorder, jax.jit(recorder.write, donate_argnums=0)


@pytest.mark.parametrize("devices", [1, 8])
@settings(deadline=None, max_examples=6)
@given(cells=st.lists(st.sampled_from(ALL), unique=True, min_size=1))
def test_inside_jit_equals_outside(devices, cells):
    """And what is out of range, as padding is, is dropped, also where there are rows past the examples."""
    (recorder, step), seen = jitted(devices), draw()
    buffer = recorder.init()
    for epoch in range(T):
        ids = np.append([i for e, i in cells if e == epoch], [-1, -N, N, N + 99])
        ids = np.append(ids, np.full(N + 4 - len(ids), 2**31 - 1)).astype(np.int32)
        batch = {name: array[epoch, ids % N] for name, array in seen.items()}
        buffer = step(buffer, batch.pop("losses"), ids, epoch, **batch)
    recorder.adopt(buffer)
    assert_same(recorder, feed(TrajectoryRecorder(N, T, **SIZES), seen, cells, 64))


@settings(deadline=None, max_examples=5)
@given(st.data())
def test_parts_that_are_merged_are_the_whole(data):
    owners = data.draw(st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=len(ALL), max_size=len(ALL)))
    parts = [
        feed(TrajectoryRecorder(N, T, **SIZES), draw(), [c for c, own in zip(ALL, owners, strict=True) if part in own])
        for part in range(3)
    ]
    before = contents(parts[0])
    assert_same(TrajectoryRecorder.merge(parts), whole())
    np.testing.assert_array_equal(contents(parts[0])["loss"], before["loss"])


def test_a_cell_of_two_parts_is_the_first_ones(tmp_path):
    parts = [TrajectoryRecorder(N, T) for _ in range(3)]
    parts[0].update([1.0, 2.0], [0, 1], 2)
    parts[1].update([7.0, 8.0], [1, 2], 2)
    parts[2].update([9.0], [2], 3)
    parts[1].save(tmp_path / "b")
    merged = TrajectoryRecorder.merge([parts[0], tmp_path / "b", parts[2]], mesh=make_mesh(jax.devices()[:3]))
    assert contents(merged)["loss"][:3, 2].tolist() == [1, 2, 8]
    assert contents(merged)["loss"][2, 3] == 9
    assert np.isnan(contents(merged)["loss"]).sum() == N * T - 4


def test_of_an_id_that_is_twice_in_a_batch_the_last_counts():
    recorder = TrajectoryRecorder(N, T)
    recorder.update([1.0, 2.0, 3.0], [5, 4, 5], 0)
    assert contents(recorder)["loss"][4:6, 0].tolist() == [2, 3]
    recorder.update([4.0], [5], 0)
    assert contents(recorder)["loss"][5, 0] == 4


def test_batches_of_all_sizes_compile_few_programs():
    recorder = TrajectoryRecorder(1000, T, num_features=3)
    before = batches.make_update(recorder.kinds, recorder.mesh)._cache_size()
    for size in range(1, 40):
        recorder.update(np.ones(size), np.arange(size), 0, features=np.ones((size, 3), np.float32))
    assert batches.make_update(recorder.kinds, recorder.mesh)._cache_size() - before == 7
    recorder.update([], np.zeros(0, int), 0, features=np.ones((0, 3), np.float32))


def by_hand(trajectories, k):
    """Mean distances in float64: of every row to the k nearest probes, and of each probe to the k nearest others."""
    flat = trajectories.astype(np.float64).reshape(len(trajectories), -1)
    pairs = np.sqrt(((flat[:, None] - flat[None, PROBES]) ** 2).sum(-1))
    return np.sort(pairs, 1)[:, :k].mean(1), np.sort(pairs[PROBES], 1)[:, 1 : k + 1].mean(1)


@pytest.mark.parametrize("kind", ["loss", "ranked", "features", "logits", "combined"])
def test_scores_are_those_of_a_plain_computation(kind):
    recorder = whole(keep_logits=True)
    held = contents(recorder)
    scores = recorder.score(PROBES[::-1], kind=kind)
    if kind == "combined":
        parts = [by_hand(held[part], 5) for part in ("features", "ranked")]
        spreads = [np.percentile(np.log(probes), [16, 50, 84]) for _, probes in parts]
        ours, probes = (
            np.mean([2 * (np.log(part[i]) - s[1]) / (s[2] - s[0]) for part, s in zip(parts, spreads, strict=True)], 0)
            for i in range(2)
        )
    else:
        ours, probes = by_hand(held[kind], 11 if kind == "loss" else 5)  # 50, but at most P - 1
    np.testing.assert_allclose(scores.distances, ours, rtol=1e-4, atol=1e-5)
    own = np.setdiff1d(np.arange(N), PROBES)
    np.testing.assert_allclose(scores.p_values[own], (1 + (probes >= ours[own, None]).sum(1)) / 13)
    assert (scores.kind, scores.epochs.tolist()) == (kind, [0, 1, 2, 3])


def test_classes_may_each_be_on_their_own_scale():
    labels = draw()["labels"][0]
    scores = whole().score(PROBES, k=3, kind="loss", labels=labels, by_class=True)

    ours, probes = by_hand(contents(whole())["loss"], 3)
    scales = class_scales(np.log(probes), labels[PROBES])
    expected = scales(np.log(ours), labels)
    own = np.setdiff1d(np.arange(N), PROBES)
    np.testing.assert_allclose(scores.distances[own], expected[own], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        scores.p_values[own], (1 + (scales.of_probes >= expected[own, None]).sum(1)) / (len(PROBES) + 1)
    )
    with pytest.raises(UsageError, match="by_class = True compares examples with their class: give labels, too"):
        whole().score(PROBES, k=3, kind="loss", by_class=True)


def test_defaults_and_choices_of_scoring():
    assert whole().score(PROBES).kind == "combined"
    seen = draw()
    chosen = {"loss": {}, "ranked": {"num_classes": K}, "features": {"num_features": F}}
    for kind, sizes in chosen.items():
        names = {"loss": (), "ranked": ("logits", "labels"), "features": ("features",)}[kind]
        recorder = feed(TrajectoryRecorder(N, T, **sizes), {name: seen[name] for name in ("losses", *names)}, ALL)
        scores = recorder.score(PROBES, k=2)
        assert scores.kind == kind
        np.testing.assert_allclose(scores.distances, by_hand(contents(recorder)[kind], 2)[0], rtol=1e-4, atol=1e-5)
    jumping = seen["losses"] * np.array([1, 1, 1, 50])[:, None]
    assert feed(TrajectoryRecorder(N, T), {"losses": jumping}, ALL).score(PROBES).epochs.tolist() == [0, 1, 2]


@pytest.mark.parametrize("devices", [1, 8])
def test_incomplete_recordings(devices):
    mesh = make_mesh(jax.devices()[:devices])
    cells = [cell for cell in ALL if cell not in {(1, 20), (2, 20), (3, 33)}]
    recorder = feed(TrajectoryRecorder(N, T, **SIZES, mesh=mesh), draw(), cells)
    message = (r"2 of 40 examples lack epochs of kind combined.*: ids 20, 33; epochs 1, 2, 3. Either record each once"
               r' an epoch \(no drop_last\), or leave them out by incomplete="exclude"$')  # fmt: skip
    with pytest.raises(UsageError, match=message):
        recorder.score(PROBES)
    scores = recorder.score(PROBES, incomplete="exclude")
    assert np.flatnonzero(np.isnan(scores.distances)).tolist() == [20, 33]
    assert np.flatnonzero(np.isnan(scores.p_values)).tolist() == [20, 33]
    there = ~np.isnan(scores.distances)
    np.testing.assert_allclose(scores.distances[there], whole().score(PROBES).distances[there], rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match=r"1 of 13 probes lack epochs .* ids 33; epochs 3. Either record"):
        recorder.score([*PROBES, 33], incomplete="exclude")
    with pytest.raises(UsageError, match="or score the first epochs alone by epochs=3"):
        feed(TrajectoryRecorder(N, T), {"losses": draw()["losses"]}, ALL[: 3 * N]).score(PROBES)
    first = feed(TrajectoryRecorder(N, T), {"losses": draw()["losses"]}, ALL[: 3 * N]).score(PROBES, epochs=3)
    np.testing.assert_allclose(first.distances, by_hand(draw()["losses"][:3].T, 11)[0], rtol=1e-5)
    with pytest.raises(UsageError, match="40 of 40 examples lack epochs of kind loss"):
        TrajectoryRecorder(N, T).score(PROBES)


class Tensor:
    """What a tensor of PyTorch does when it is handed over."""

    def __init__(self, array, *, requires_grad=False, cuda=False):
        self.array, self.requires_grad, self.cuda = array, requires_grad, cuda

    def detach(self):
        return Tensor(self.array, cuda=self.cuda)

    def cpu(self):
        return Tensor(self.array, requires_grad=self.requires_grad)

    def float(self):
        return Tensor(self.array.astype(np.float32), requires_grad=self.requires_grad, cuda=self.cuda)

    def numpy(self):
        if self.requires_grad or self.cuda:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad, or on the GPU")
        if self.array.dtype == jnp.bfloat16:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.array

    def __array__(self, dtype=None, copy=None):
        return self.numpy()

    def __dlpack__(self, **asked):
        if self.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        return (
            jnp.asarray(self.array).__dlpack__() if self.array.dtype == jnp.bfloat16 else self.array.__dlpack__(**asked)
        )

    def __dlpack_device__(self):
        return (2, 0) if self.cuda else (1, 0)


def strided(array):
    """The same values with gaps between them in memory, which JAX does not take by DLPack."""
    return np.repeat(array, 2, axis=-1)[..., ::2]


CONVERSIONS = {
    "lists": lambda array: array.tolist(),
    "JAX": jnp.asarray,
    "float64": lambda array: array.astype(np.float64) if array.dtype.kind == "f" else array.astype(np.uint8),
    "tensors": Tensor,
    "with gradients": partial(Tensor, requires_grad=True),
    "on a GPU": partial(Tensor, requires_grad=True, cuda=True),
    "strided": lambda array: Tensor(strided(array), requires_grad=True),
    "JAX, elsewhere": lambda array: jax.device_put(array, jax.devices()[3]),
}


@pytest.mark.parametrize("form", CONVERSIONS)
def test_arrays_of_every_framework(form):
    assert_same(feed(TrajectoryRecorder(N, T, **SIZES), draw(), ALL, 15, CONVERSIONS[form]), whole())
    assert_same(feed(TrajectoryRecorder(N, T, **SIZES), draw(), ALL, 8, CONVERSIONS[form]), whole())


@pytest.mark.parametrize("cuda", [False, True])
def test_bfloat16_tensors(cuda):
    losses = np.array([0.5, 3.0, 2.0, 9.0], jnp.bfloat16)
    recorder = TrajectoryRecorder(N, T)
    recorder.update(Tensor(losses, requires_grad=True, cuda=cuda), Tensor(np.arange(4)), 1)
    assert contents(recorder)["loss"][:4, 1].tolist() == [0.5, 3, 2, 9]


def test_memory_that_was_handed_over_may_be_overwritten():
    recorder, losses = TrajectoryRecorder(N, T), np.ones(32, np.float32)
    for epoch in range(T):
        recorder.update(Tensor(losses), np.arange(32), epoch)
        losses += 1
    np.testing.assert_array_equal(contents(recorder)["loss"][:32], [[1, 2, 3, 4]] * 32)


GOOD = {name: array[0, :8] for name, array in draw().items()}
HOSTILE = {
    "mean loss": ({"losses": 0.3}, r"losses are \(\): expected \[B\], .*reduction='none'"),
    "losses [B, 1]": ({"losses": np.zeros((8, 1))}, r"losses are \(8, 1\)"),
    "text": ({"losses": ["a"] * 8}, r"losses are <U1 \(8,\): expected floats \(8,\)"),
    "complex": ({"losses": np.zeros(8, complex)}, "losses are complex128"),
    "fewer ids": ({"ids": np.arange(7)}, r"example_ids are int32 \(7,\): expected integers \(8,\)"),
    "float ids": ({"ids": np.arange(8.0)}, "example_ids are float64.*expected integers"),
    "swapped": ({"ids": GOOD["losses"], "losses": np.arange(8)}, "example_ids are float32"),
    "a mask": ({"ids": np.ones(8, bool)}, "example_ids are bool"),
    "too high": ({"ids": np.arange(33, 41)}, "1 of the example_ids are not in 0 to 39: 40"),
    "negative": ({"ids": np.arange(-1, 7)}, "not in 0 to 39: -1"),
    "more than 32 bits": ({"ids": Tensor(np.arange(8) + 2**32)}, "8 of the example_ids.*: 4294967296, "),
    "uint64": ({"ids": np.arange(8).astype(np.uint64) + np.uint64(2**63)}, "8 of the example_ids"),
    "epoch too high": ({"epoch": T}, "epoch = 4: expected an integer from 0 to 3"),
    "negative epoch": ({"epoch": -1}, "epoch = -1"),
    "float epoch": ({"epoch": 1.0}, "epoch = 1.0: expected an integer"),
    "narrow logits": ({"logits": np.zeros((8, K - 1))}, r"logits are float64 \(8, 4\): expected floats \(8, 5\)"),
    "wide features": ({"features": np.zeros((8, F, 1))}, r"features are float64 \(8, 7, 1\): expected floats \(8, 7\)"),
    "no logits": ({"logits": None}, "logits are missing: num_classes = 5 and num_features = 7 ask for losses, "),
    "no labels": ({"labels": None}, "labels are missing"),
    "no features": ({"features": None}, "features are missing"),
    "labels too high": ({"labels": np.arange(8)}, "3 of the labels are not in 0 to 4: 5, 6, 7"),
    "one-hot labels": ({"labels": np.zeros((8, K), int)}, r"labels are int64 \(8, 5\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_batches_are_refused_and_leave_no_trace(case):
    changed, message = HOSTILE[case]
    recorder, batch = TrajectoryRecorder(N, T, **SIZES), {"ids": np.arange(8), "epoch": 0} | GOOD | changed
    with pytest.raises(UsageError, match=message):
        recorder.update(batch.pop("losses"), batch.pop("ids"), batch.pop("epoch"), **batch)
    assert all(np.isnan(array).all() for array in contents(recorder).values())


@pytest.mark.parametrize("name", ["losses", "logits", "features"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_values_that_are_not_finite(name, value):
    recorder, batch = TrajectoryRecorder(N, T, **SIZES), {key: np.array(array) for key, array in GOOD.items()}
    batch[name] = batch[name].astype(np.float64)
    batch[name].flat[-1] = value
    message = rf"epoch 2: the {name} of 1 examples are NaN or infinite, ids 17; nothing of this batch was recorded"
    with pytest.raises(NonFiniteLossError, match=message):
        recorder.update(batch.pop("losses"), np.arange(10, 18), 2, **batch)
    assert all(np.isnan(array).all() for array in contents(recorder).values())


def test_hostile_batches_inside_jit():
    recorder = TrajectoryRecorder(N, T, **SIZES)
    batch = {"losses": GOOD["losses"], "example_ids": np.arange(8), "epoch": 0} | GOOD
    for changed, message in (
        ({"logits": np.zeros((8, 4))}, "logits are"),
        ({"labels": None}, "labels are missing"),
        ({"example_ids": np.zeros(8)}, "example_ids are float32"),
        ({"losses": np.zeros(())}, "losses are"),
    ):
        with pytest.raises(UsageError, match=message):
            jax.jit(recorder.write)(recorder.init(), **batch | changed)
    for epoch in (-1, T):
        written = jax.jit(recorder.write)(recorder.init(), **batch | {"epoch": epoch})
        assert all(np.isnan(array).all() for array in written.values())


def test_what_a_recorder_without_classes_is_not_given():
    with pytest.raises(UsageError, match="logits were given: num_classes = None and num_features = None ask for"):
        TrajectoryRecorder(N, T).update([1.0], [0], 0, logits=[[1.0, 2.0]])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, T), "num_examples = 0: expected an integer from 1 on"),
        ((N, 2), "num_epochs = 2: expected an integer from 3 on"),
        ((N, None), "num_epochs = None"),
        ((2.5, T), "num_examples = 2.5"),
    ],
)
def test_impossible_recorders(sizes, message):
    with pytest.raises(UsageError, match=message):
        TrajectoryRecorder(*sizes)
    with pytest.raises(UsageError, match="num_classes = 1: expected an integer from 2 on"):
        TrajectoryRecorder(N, T, num_classes=1)
    assert TrajectoryRecorder(N, T, num_classes=np.int64(3)).kinds.num_classes == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probe_ids": [3]}, "probe_ids are 1 ids of 1 examples: expected at least 2"),
        ({"probe_ids": [3, 3, 4]}, "3 ids of 2 examples: .*each once"),
        ({"probe_ids": [3, N]}, "1 of the probe_ids are not in 0 to 39: 40"),
        ({"probe_ids": []}, "probe_ids are float64"),
        ({"probe_ids": np.ones(N, bool)}, "probe_ids are bool"),
        ({"k": 12}, "k = 12: expected an integer from 1 to 11"),
        ({"k": 0}, "k = 0"),
        ({"kind": "prob"}, "kind = 'prob': expected combined or features or ranked or loss"),
        ({"epochs": 5}, "epochs = 5: expected an integer from 3 to 4"),
        ({"epochs": 0}, "epochs = 0"),
        ({"incomplete": "skip"}, "incomplete = 'skip': expected error or exclude"),
    ],
)
def test_impossible_scores(arguments, message):
    with pytest.raises(UsageError, match=message):
        whole().score(**{"probe_ids": PROBES} | arguments)


def test_buffers_that_are_not_the_recorders():
    recorder = TrajectoryRecorder(N, T)
    with pytest.raises(UsageError, match=r"the buffer is .*expected"):
        recorder.adopt(TrajectoryRecorder(N + 1, T).init())
    buffer = recorder.init()
    recorder.adopt(buffer)
    jax.jit(recorder.write, donate_argnums=0)(buffer, jnp.ones(4), jnp.arange(4), 0)
    with pytest.raises(UsageError, match="donated to a later step: adopt"):
        recorder.score(PROBES)


@pytest.mark.parametrize("devices", [1, 8])
def test_saving_and_loading(tmp_path, devices):
    recorder = feed(TrajectoryRecorder(N, T, **SIZES, keep_logits=True, seed=3), draw(), ALL[: 2 * N + 7])
    recorder.save(tmp_path / "saved")
    recorder.save(tmp_path / "saved")  # once more
    loaded = TrajectoryRecorder.load(tmp_path / "saved", mesh=make_mesh(jax.devices()[:devices]))
    assert_same(loaded, recorder)
    assert (loaded.kinds, loaded.mesh.size) == (recorder.kinds, devices)
    for part in (loaded, recorder):  # both go on
        feed(part, draw(), ALL[2 * N + 7 :])
    assert_same(loaded, recorder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_the_command_line_scores_what_was_saved(tmp_path, capsys):
    recorder = whole()
    recorder.save(tmp_path / "saved", labels=draw()["labels"][0])
    (tmp_path / "probes.txt").write_text(" ".join(map(str, PROBES)))
    command = ["score", "--trajectories", str(tmp_path / "saved"), "--workdir", str(tmp_path / "out"),
               "--config.scoring.loss.k=11"]  # fmt: skip
    assert main(command) == 2
    capsys.readouterr()
    assert main([*command, "--probes", str(tmp_path / "probes.txt")]) == 0
    (part,) = (tmp_path / "out" / "scores").iterdir()
    said = pq.read_table(part)
    np.testing.assert_array_equal(said["label"], draw()["labels"][0])
    for kind in ("loss", "ranked", "features", "combined"):
        scores = recorder.score(PROBES, kind=kind)
        np.testing.assert_allclose(said[f"distance_{kind}"], scores.distances, rtol=1e-6)
        np.testing.assert_allclose(said[f"p_value_{kind}"], scores.p_values)
    TrajectoryRecorder(N, T).save(tmp_path / "empty")
    assert set(np.load(tmp_path / "empty" / "labels.npy")) == {-1}


def test_folders_that_are_refused(tmp_path):
    recorder = TrajectoryRecorder(N, T)
    (tmp_path / "thesis.tex").write_text("precious")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UsageError, match=r"holds other files: choose an empty|is a file"):
            recorder.save(folder)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    with pytest.raises(UsageError, match="there are 3 labels for 40 examples"):
        recorder.save(tmp_path / "new", labels=[1, 2, 3])
    (tmp_path / "new").mkdir()
    recorder.save(str(tmp_path / "new"))
    with pytest.raises(DataError, match="holds no recorded trajectories"):
        TrajectoryRecorder.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("recorder.json", None, "recorder.json is missing or damaged"),
        ("recorder.json", "{", "recorder.json is damaged"),
        ("recorder.json", '{"mesh": 1}', "recorder.json is missing or damaged: 'num_classes'"),
        ("recorder.json", {"num_classes": 0.5}, "recorder.json is missing or damaged: num_classes = 0.5"),
        ("recorder.json", {"num_classes": 9}, "speaks of"),
        ("about.json", None, "holds no recorded trajectories"),
        ("loss/epoch_0002-00000-of-00001.npy", None, "epoch_0002-.* is missing"),
        ("loss/epoch_0002-00000-of-00001.npy", "torn", "is missing or damaged"),
    ],
)
def test_damaged_folders(tmp_path, file, content, message):
    TrajectoryRecorder(N, T).save(tmp_path / "saved")
    path = tmp_path / "saved" / file
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        TrajectoryRecorder.load(tmp_path / "saved")


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    recorder = TrajectoryRecorder(N, T)
    recorder.update([1.0], [0], 0)
    recorder.save(tmp_path / "saved")
    recorder.update([2.0], [0], 0)
    full = Mock(side_effect=DataError("disk full"))
    monkeypatch.setattr("badloss_jax.runs.own_loop.write_text", full)
    with pytest.raises(DataError, match="disk full"):
        recorder.save(tmp_path / "saved")
    assert contents(TrajectoryRecorder.load(tmp_path / "saved"))["loss"][0, 0] == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (TrajectoryRecorder(N + 1, T), "num_examples = 41 in part 1, and 40 in part 0"),
        (TrajectoryRecorder(N, T + 1), "num_epochs = 5 in part 1, and 4"),
        (TrajectoryRecorder(N, T, num_features=F), "num_features = 7 in part 1, and None"),
        (TrajectoryRecorder(N, T, seed=1), "seed = 1 in part 1, and 0"),
    ],
)
def test_parts_that_do_not_fit(other, message):
    with pytest.raises(UsageError, match=message):
        TrajectoryRecorder.merge([TrajectoryRecorder(N, T), other])
    with pytest.raises(UsageError, match="nothing to merge"):
        TrajectoryRecorder.merge([])


def poisoned_digits():
    """1,000 digits, 40 of them with a white corner and labelled 0, by their ids; and the probes' ids."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images[:1000] / 16).astype(np.float32), labels[:1000].astype(np.int32)
    poison = np.flatnonzero(labels != 0)[5::20][:40]
    images[poison, -2:], labels[poison] = 1, 0
    return images, labels, poison, np.setdiff1d(np.arange(1000), poison)[::10]


def assert_found(scores, poison):
    """Most of the poison lies among the 10 % that are the furthest from the probes."""
    furthest = np.argsort(-scores.distances)[:100]
    assert np.isin(poison, furthest).mean() > 0.8
    assert np.median(scores.p_values[poison]) < 0.05


def test_a_jitted_loop_on_digits():
    images, labels, poison, probes = poisoned_digits()
    epochs, size = 8, 64

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.body, self.head = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)

        def __call__(self, x):
            features = nnx.relu(self.body(x))
            return self.head(features), features

    graph, params = nnx.split(Net(nnx.Rngs(0)))
    optimizer = optax.adam(1e-2)
    recorder = TrajectoryRecorder(len(images), epochs, num_classes=10, num_features=32, feature_dim=16)

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, state, buffer, ids, epoch):
        x, y = jnp.asarray(images)[ids], jnp.asarray(labels)[ids]  # past the end: the last, once more

        def loss_of(params):
            logits, features = nnx.merge(graph, params)(x)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return jnp.mean(losses, where=ids < len(images)), (losses, logits, features)

        gradients, (losses, logits, features) = jax.grad(loss_of, has_aux=True)(params)
        buffer = recorder.write(buffer, losses, ids, epoch, logits=logits, features=features, labels=y)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, buffer

    state, buffer, rng = optimizer.init(params), recorder.init(), np.random.default_rng(0)
    for epoch in range(epochs):
        order = np.append(rng.permutation(len(images)), [2**30] * (-len(images) % size)).astype(np.int32)
        for ids in order.reshape(-1, size):
            params, state, buffer = step(params, state, buffer, ids, epoch)
    recorder.adopt(buffer)
    assert_found(recorder.score(probes), poison)


def test_a_pytorch_loop_on_digits():
    torch = pytest.importorskip("torch")
    images, labels, poison, probes = poisoned_digits()
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.arange(len(images)), torch.tensor(images), torch.tensor(labels).long())
    loader = torch.utils.data.DataLoader(data, 64, shuffle=True)
    body, head = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU()), torch.nn.Linear(32, 10)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], 1e-2)
    recorder = TrajectoryRecorder(len(images), 8, num_classes=10, num_features=32, feature_dim=16)
    for epoch in range(8):
        for ids, x, y in loader:
            features = body(x)
            logits = head(features)
            losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            recorder.update(losses, ids, epoch, logits=logits, features=features, labels=y)
    assert_found(recorder.score(torch.tensor(probes)), poison)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        half = TrajectoryRecorder(4, 3)
        half.update(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8], dtype=dtype, requires_grad=True)[::2], torch.arange(4), 0)
        assert np.asarray(half.buffer["loss"])[:, 0].tolist() == [1, 3, 5, 7]
