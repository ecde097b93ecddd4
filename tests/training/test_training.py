import io
import json
import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from badloss_jax.core.errors import NonFiniteLossError, UsageError
from badloss_jax.core.mesh import by_columns, by_rows, check_batch_size, jit_on, make_mesh, pass_batch_size, place
from badloss_jax.core.order import epoch_batches
from badloss_jax.core.progress import Progress
from badloss_jax.core.seeding import derived_seed
from badloss_jax.data import digits
from badloss_jax.models import ModelSpec
from badloss_jax.training.loop import Passengers, Recipe, train
from badloss_jax.training.objective import Ascent, Flooding, Forward, MeanLoss
from badloss_jax.training.passes import map_examples
from badloss_jax.training.recorder import Recorder
from badloss_jax.training.resident import ResidentData, make_take
from badloss_jax.training.saved_model import load_model, save_model
from badloss_jax.training.state import Adadelta, AdamW, create_state, merged
from badloss_jax.training.step import make_observe_step, make_sweep_step, make_train_step
from badloss_jax.trajectories.buffer import create_column, make_write
from badloss_jax.trajectories.kinds import Kinds
from badloss_jax.trajectories.store import TrajectoryStore

SPEC = ModelSpec("resnet_small", (8, 8, 1), 10, (8,), 1)
WIDER = replace(SPEC, stages=(8, 16))  # with a step from one resolution to the next
KINDS = Kinds((), 10, 8)


def resident(mesh, count=797):
    """The first digits on the mesh, one of them replaced by a black image."""
    train_set = digits.load({}).train
    black = np.zeros((1, 8, 8, 1), np.float32)
    return ResidentData.place(mesh, train_set.images[:count], train_set.labels[:count], np.array([3]), black)


def record(folder, num_devices, *, capture="step", count=797, epochs=2, kinds=KINDS, spec=SPEC, **recipe):
    """Records trajectories of digits; no batch and no device count divides 797."""
    mesh = make_mesh(jax.devices()[:num_devices])
    data = resident(mesh, count)
    nobody = np.zeros(len(data), bool)
    store = TrajectoryStore.create(folder, "", np.asarray(data.labels), nobody, epochs, kinds.layout())
    recorder = Recorder(kinds, capture, store, mesh, 64)
    plan = Recipe(**{"epochs": epochs, "schedule_epochs": 30, "batch_size": 32} | recipe)
    state = train(spec, plan, data, np.arange(len(data)), seed=0, phase="test", mesh=mesh,
                  passengers=Passengers(recorder))  # fmt: skip
    return store, state


@pytest.mark.slow
def test_fifty_steps_agree_on_any_number_of_devices(tmp_path):
    """Both in what the step sees of each loss and in what the sweep after it does."""
    both = Kinds(("step",), 10, 8)
    one, *others = (record(tmp_path / str(n), n, capture="sweep", kinds=both, spec=WIDER)[0] for n in (1, 4, 8))
    for kind in ("step", "loss"):
        assert one.read(kind).std() > 0.1
        for other in others:
            np.testing.assert_allclose(other.read(kind), one.read(kind), rtol=0, atol=1e-5)


def test_same_seed_gives_the_same_bits(tmp_path):
    first, _ = record(tmp_path / "a", 1)
    second, _ = record(tmp_path / "b", 1)
    np.testing.assert_array_equal(first.read("loss"), second.read("loss"))


def test_a_recording_by_sweeps_needs_no_step_of_its_own(tmp_path):
    mesh, recipe = make_mesh(jax.devices()[:1]), Recipe(1, 30, 32)
    step = make_train_step(SPEC, recipe.optimizer, recipe.objective, recipe.augment, None, mesh)
    record(tmp_path, 1, capture="sweep")
    compiled = step._cache_size()
    assert compiled
    train(SPEC, recipe, resident(mesh), np.arange(100), seed=0, phase="plain", mesh=mesh)
    assert step._cache_size() == compiled


@pytest.mark.parametrize("poisoned", [0, 2, 63])
def test_attacks_of_about_a_size_are_trained_on_by_one_program(mesh, poisoned):
    recipe, ids = Recipe(1, 30, 32), np.arange(50)
    step = make_train_step(SPEC, recipe.optimizer, recipe.objective, recipe.augment, None, mesh)
    train(SPEC, recipe, resident(mesh), ids, seed=0, phase="test", mesh=mesh)
    compiled = step._cache_size()

    train_set, black = digits.load({}).train, np.zeros((poisoned, 8, 8, 1), np.float32)
    data = ResidentData.place(mesh, train_set.images[:797], train_set.labels[:797], np.arange(poisoned), black)
    train(SPEC, recipe, data, ids, seed=0, phase="test", mesh=mesh)
    assert step._cache_size() == compiled


def test_networks_are_compiled_at_the_first_level_on_cpus(mesh):
    """JAX takes such options nowhere but at the top."""
    with pytest.raises(ValueError, match=r"\{'xla_backend_optimization_level': 1\}"):
        jax.jit(jit_on(jnp.sin, mesh))(1.0)


def collectives(text):
    """(operation, shape) of all collectives in a compiled program."""
    found = re.findall(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute)\S*\(", text)
    return {(operation, re.sub(r"\{.*?\}", "", shape)) for shape, operation in found}


def test_programs_know_nothing_of_the_size_of_the_set(tmp_path, mesh):
    """A set that has lost its poison is recorded and trained on by what was compiled before, as are other epochs."""
    train_step = make_train_step(SPEC, AdamW(), MeanLoss(), "none", None, mesh)
    sweep_step = make_sweep_step(SPEC, replace(KINDS, observed=("loss",)), mesh)
    compiled = []
    for count, epochs in ((797, 2), (500, 3)):
        record(tmp_path / str(count), 1, capture="sweep", count=count, epochs=epochs)
        compiled.append((train_step._cache_size(), sweep_step._cache_size()))
    assert compiled[0] == compiled[1]
    assert all(compiled[0])


def test_compiled_steps_share_a_batch_and_gather_at_most_its_logits():
    """Taking a batch moves nothing, a training step reduces gradients, statistics and the loss, `top_k` has logits."""
    mesh, kinds = make_mesh(), Kinds(("logits", "ranked", "features"), 10, 8, feature_dim=7)
    data, order = resident(mesh), np.arange(64, dtype=np.int32)[None]
    take = make_take(mesh).lower(data, place(order, by_columns(mesh)), np.int32(0)).compile()
    assert not collectives(take.as_text())
    (batch,) = data.batches(order)
    assert all(leaf.sharding == by_rows(mesh) for leaf in jax.tree.leaves(batch))
    state = create_state(SPEC, AdamW(), 0, mesh)
    step = make_train_step(SPEC, AdamW(), MeanLoss(), "none", None, mesh)
    text = step.lower(state, batch, np.int32(0), np.float32(1e-3), np.uint32(0), None).compile().as_text()
    assert {operation for operation, _ in collectives(text)} == {"all-reduce"}
    for leaf in range(len(jax.tree.leaves(state))):
        assert f"{{{leaf}}}: ({leaf}, {{}}, may-alias)" in text
    sweep = make_sweep_step(SPEC, kinds, mesh).lower(state, batch).compile()
    assert collectives(sweep.as_text()) <= {("all-gather", "f32[64,10]")}
    assert all(sharding == by_rows(mesh) for sharding in jax.tree.leaves(sweep.output_shardings))


def test_compiled_write_gathers_only_one_batch_of_values_and_aliases_the_column():
    mesh, kinds = make_mesh(), Kinds(("logits", "ranked", "features"), 10, 8, feature_dim=7)
    column = create_column(kinds, tuple(kinds.layout()), 797, mesh)
    assert column["loss"].shape == (800,)
    values = {name: np.zeros((64, *shape), np.float32) for name, (shape, _) in kinds.layout().items()}
    ids, values = place((np.arange(64, dtype=np.int32), values), by_rows(mesh))
    text = make_write(mesh).lower(column, ids, values).compile().as_text()
    gathered = collectives(text)
    assert {operation for operation, _ in gathered} == {"all-gather"}
    rows = {int(rows) for _, shape in gathered for rows in re.findall(r"\[(\d+)", shape)}
    assert rows == {64}, gathered  # ids and the values of each example of the batch
    count = text[: text.index("entry_computation_layout")].count("may-alias")
    assert count == len(column) == 4


def test_augmentation_is_the_same_on_any_number_of_devices(tmp_path):
    """With a learning rate of zero, so that what is compared is the images and not how Adam magnifies rounding."""
    one, four, plain = (record(tmp_path / f"{n}{a}", n, epochs=2, augment=a, learning_rate=0.0)[0].read("loss")
                        for n, a in ((1, "crop_flip"), (4, "crop_flip"), (1, "none")))  # fmt: skip
    np.testing.assert_allclose(four, one, rtol=0, atol=1e-5)
    assert np.abs(one - plain).mean() > 0.01
    assert np.abs(one[:, 0] - one[:, 1]).mean() > 0.01  # another crop each epoch


def test_weights_that_diverge_in_the_last_update_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "learning_rate_at", lambda self, epoch: np.inf)
    mesh = make_mesh(jax.devices()[:1])
    with pytest.raises(NonFiniteLossError, match=r"the last update of phase 'test'"):
        train(SPEC, Recipe(1, 1, 32), resident(mesh), np.arange(20), seed=0, phase="test", mesh=mesh)


def test_step_capture_is_what_the_training_step_saw(tmp_path):
    """With a learning rate of zero nothing moves but the batch statistics, which train-mode outputs do not use."""
    store, state = record(tmp_path, 1, learning_rate=0.0)
    mesh = make_mesh(jax.devices()[:1])
    data = resident(mesh)
    fresh = create_state(SPEC, AdamW(), derived_seed(0, "test", "weights"), mesh)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), fresh.params, state.params))
    order = epoch_batches(np.arange(797), 32, 797, seed=0, phase="test", epoch=0)
    losses = store.read("loss")[:, 0]
    for batch in (order[0], order[-1]):
        ids = batch[batch < 797]
        (shown,) = data.batches(ids[None])
        images, labels = shown.images, shown.labels
        model = merged(SPEC, fresh.params.tree, fresh.batch_stats.tree)
        logits, _ = model(images, train=True)
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        np.testing.assert_allclose(losses[ids], expected, rtol=1e-4, atol=1e-5)


def test_sweep_is_an_evaluation_pass_after_the_epoch(tmp_path):
    store, state = record(tmp_path, 1, capture="sweep", kinds=Kinds(("logits",), 10, 8))
    data = resident(make_mesh(jax.devices()[:1]))
    (shown,) = data.batches(np.arange(797, dtype=np.int32)[None])
    images, labels = shown.images, shown.labels
    assert float(images[3].max()) == 0  # the replaced image is the one that is shown
    logits, _ = merged(SPEC, state.params.tree, state.batch_stats.tree)(images, train=False)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(store.read("loss")[:, 1], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(store.read("logits")[:, 1], logits, rtol=2e-3, atol=2e-3)


def test_a_sweep_that_records_the_step_too_changes_nothing_else(tmp_path):
    """In one training both: what "step" capture sees, and what an evaluation pass after the epoch does."""
    both = Kinds(("step", "logits"), 10, 8)
    step = record(tmp_path / "step", 1)[0]
    sweep = record(tmp_path / "sweep", 1, capture="sweep", kinds=Kinds(("logits",), 10, 8))[0]
    ours = record(tmp_path / "both", 1, capture="sweep", kinds=both)[0]
    np.testing.assert_allclose(ours.read("step"), step.read("loss"), rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.read("loss"), sweep.read("loss"), rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.read("logits"), sweep.read("logits"), rtol=2e-3, atol=2e-3)
    assert np.abs(ours.read("step") - ours.read("loss")).mean() > 0.01
    again = record(tmp_path / "four", 4, capture="sweep", kinds=both)[0]
    np.testing.assert_allclose(again.read("step"), ours.read("step"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_function_is_mapped_over_examples_in_their_order(num_devices):
    mesh = make_mesh(jax.devices()[:num_devices])
    data = resident(mesh)
    function = jax.jit(lambda batch, power: {"label": batch.labels**power, "ids": (batch.ids,)})
    labels = np.asarray(data.labels)
    for ids in (np.array([5, 3, 700, 3, 0]), np.arange(797)[::-1], np.array([796])):
        for batch_size in (3, 32, 1000):
            said = io.StringIO()
            got = map_examples(function, data, ids, batch_size, mesh, 2, progress=Progress(said, 0), title="a pass")
            np.testing.assert_array_equal(got["label"], labels[ids] ** 2)
            np.testing.assert_array_equal(got["ids"][0], ids)
            assert isinstance(got["label"], np.ndarray)
            assert f"a pass  {len(ids)} examples in" in said.getvalue()


def test_what_the_network_says_is_gathered_by_example(mesh):
    data, state = resident(mesh), create_state(SPEC, AdamW(), 0, mesh)
    logits, features = map_examples(make_observe_step(SPEC, mesh), data, np.arange(797), 100, mesh, state)
    (shown,) = data.batches(np.arange(797, dtype=np.int32)[None])
    expected = merged(SPEC, state.params.tree, state.batch_stats.tree)(shown.images, train=False)
    np.testing.assert_allclose(logits, expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features, expected[1], rtol=1e-4, atol=1e-5)


def test_objectives_by_hand():
    losses, real = jnp.array([1.0, 3.0, 500.0, 9.0]), jnp.array([True, True, True, False])
    forward = Forward(None, None, real, losses, None, None)
    mean = (1 + 3 + 100) / 3
    assert float(MeanLoss()(forward, {}, None)) == pytest.approx(mean)
    assert float(MeanLoss(2.0)(forward, {}, None)) == pytest.approx(5 / 3)
    assert float(Ascent()(forward, {}, None)) == pytest.approx(-mean)
    assert float(Flooding(level=40.0)(forward, {}, None)) == pytest.approx(80 - mean)
    assert float(Flooding(level=0.5)(forward, {}, None)) == pytest.approx(mean)
    slope = jax.grad(lambda x: Flooding(level=40.0)(replace(forward, losses=x), {}, None))(losses)
    np.testing.assert_allclose(slope, [-1 / 3, -1 / 3, 0, 0], atol=1e-6)  # the third is clamped, the last is padding


@dataclass(frozen=True)
class _Leaning(MeanLoss):
    """Learns a number beside the network, pulled to what is given."""

    def init(self, key, spec):
        return {"number": jnp.zeros(())}

    def __call__(self, forward, beside, given):
        return super().__call__(forward, beside, given) + (beside["number"] - given) ** 2


def test_an_objective_may_learn_beside_the_network(mesh):
    data = resident(mesh)
    recipe = Recipe(6, 6, 200, learning_rate=0.1, objective=_Leaning())
    state = train(SPEC, recipe, data, np.arange(797), seed=0, phase="t", mesh=mesh, given=jnp.float32(0.5))
    assert float(state.beside["number"]) == pytest.approx(0.5, abs=0.25)
    plain = train(SPEC, replace(recipe, objective=MeanLoss()), data, np.arange(797), seed=0, phase="t", mesh=mesh)
    assert plain.beside == {}


def test_training_goes_on_from_given_weights(mesh):
    data, recipe = resident(mesh), Recipe(1, 1, 200, learning_rate=0.0)
    begun = create_state(SPEC, AdamW(), 7, mesh)
    expected = jax.tree.map(np.asarray, begun.params)
    state = train(SPEC, recipe, data, np.arange(797), seed=0, phase="t", mesh=mesh, initial=begun)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), state.params, expected))


def test_adadelta_is_optax():
    weights, gradients = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.1])
    ours, theirs = Adadelta(rho=0.8, weight_decay=0.1).transform(), optax.adadelta(0.5, rho=0.8, weight_decay=0.1)
    here, there = ours.init(weights), theirs.init(weights)
    for _ in range(3):
        update, here = ours.update(gradients, here, weights)
        expected, there = theirs.update(gradients, there, weights)
        np.testing.assert_allclose(-0.5 * update, expected, rtol=1e-6)


def test_bfloat16_records_float32_losses(tmp_path):
    store, _ = record(tmp_path, 1, epochs=2, spec=replace(SPEC, dtype="bfloat16"))
    losses = store.read("loss")
    assert losses.dtype == np.float32
    assert losses[:, 1].mean() < losses[:, 0].mean() < 2.5
    assert len(np.unique(losses)) > 1000  # not rounded to 8 bits of mantissa


def test_update_is_optax_adamw():
    mesh = make_mesh(jax.devices()[:1])
    data, state = resident(mesh), create_state(SPEC, AdamW(), 0, mesh)
    step = make_train_step(SPEC, AdamW(), MeanLoss(), "none", None, mesh)
    before = jax.tree.map(np.asarray, state.params)

    class Spy(AdamW):  # the gradient as the step sees it
        def transform(self):
            return optax.stateless(lambda g, p: g)

    plain = make_train_step(SPEC, Spy(), MeanLoss(), "none", None, mesh)
    (batch,) = data.batches(np.arange(32, dtype=np.int32)[None])
    moved, *_ = plain(create_state(SPEC, Spy(), 0, mesh), batch, np.int32(0), np.float32(1), np.uint32(0), None)
    gradients = jax.tree.map(lambda b, a: b - a, before, moved.params)
    after, *_ = step(state, batch, np.int32(0), np.float32(1e-3), np.uint32(0), None)
    adamw = optax.adamw(1e-3, b1=0.9, b2=0.999, weight_decay=1e-4)
    updates, _ = adamw.update(gradients, adamw.init(before), before)
    expected = optax.apply_updates(before, updates)
    largest = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after.params, expected)
    assert max(jax.tree.leaves(largest)) < 2e-4  # a sign of a gradient near zero may differ
    share = np.mean([np.mean(np.abs(np.asarray(a) - b) < 1e-6) for a, b in
                     zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True)])  # fmt: skip
    assert share > 0.95


def test_each_example_is_seen_once_an_epoch():
    ids = np.arange(5, 797)
    batches = epoch_batches(ids, 32, 800, seed=1, phase="p", epoch=2)
    assert batches.shape == (25, 32)
    np.testing.assert_array_equal(np.sort(batches[batches < 800]), ids)
    assert (epoch_batches(ids, 32, 800, seed=1, phase="p", epoch=2) == batches).all()
    for other in ({"seed": 2}, {"phase": "q"}, {"epoch": 3}):
        changed = {"seed": 1, "phase": "p", "epoch": 2} | other
        assert (epoch_batches(ids, 32, 800, **changed) != batches).any()


def test_cosine_is_stepped_once_an_epoch_over_the_full_schedule():
    recipe = Recipe(30, 100, 128, learning_rate=2.0)
    assert recipe.learning_rate_at(0) == 2
    assert recipe.learning_rate_at(50) == pytest.approx(1)
    assert recipe.learning_rate_at(29) == pytest.approx(2 * 0.5 * (1 + np.cos(np.pi * 0.29)))


@pytest.mark.parametrize("ahead", [False, True])
def test_non_finite_loss_stops_at_the_step_and_keeps_what_was_recorded(tmp_path, monkeypatch, ahead):
    """The step is named rightly even if others were started before its loss was looked at, as on accelerators."""
    if ahead:
        monkeypatch.setattr("badloss_jax.training.in_flight.on_cpus", lambda mesh: False)
    with pytest.raises(NonFiniteLossError, match=r"phase 'test' at step \d+ \(epoch \d,.*kept in") as caught:
        record(tmp_path, 1, learning_rate=1e30)
    step = int(re.search(r"at step (\d+)", str(caught.value)).group(1))
    store = TrajectoryStore.open(tmp_path)
    recorded = np.concatenate([np.load(path) for path in sorted((tmp_path / "loss").glob("*.npy"))])
    assert 32 * step <= np.isfinite(recorded).sum() < 32 * (step + 1)
    assert not store.complete


def test_batch_size_must_be_divisible_by_the_devices():
    with pytest.raises(UsageError, match=r"recording.batch_size = 33 .* 8 devices.* 40 would do"):
        check_batch_size("recording.batch_size", 33, make_mesh())


@pytest.mark.parametrize(
    ("set_to", "devices", "expected"), [(500, 1, 500), (500, 8, 512), (2000, 8, 2000), (8, 8, 64), (30, 4, 120)]
)
def test_passes_take_more_at_a_time_on_more_devices(set_to, devices, expected):
    assert pass_batch_size(set_to, make_mesh(jax.devices()[:devices])) == expected


def test_saved_model_comes_back_bit_by_bit(tmp_path, mesh):
    state = create_state(SPEC, AdamW(), 7, mesh)
    save_model(tmp_path / "m", SPEC, state, {"hash": "", "tested": "", "evaluation": {}, "seconds": 1.0})
    spec, loaded = load_model(tmp_path / "m", mesh)
    assert spec == SPEC

    # As one that was saved before there were ghost batches.
    about = json.loads((tmp_path / "m" / "about.json").read_text())
    del about["spec"]["ghost_batch"]
    (tmp_path / "m" / "about.json").write_text(json.dumps(about))
    assert load_model(tmp_path / "m", mesh)[0] == SPEC
    for ours, theirs in ((state.params, loaded.params), (state.batch_stats, loaded.batch_stats)):
        assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), ours, theirs))
