"""What a step takes at the least: less than XLA then takes, known before it compiles, without a second trace."""

import jax
import numpy as np
import optax
import pytest

from badloss_jax.cli import main
from badloss_jax.core import memory
from badloss_jax.core.errors import UsageError
from badloss_jax.core.mesh import by_rows, make_mesh, place, replicated
from badloss_jax.models import ModelSpec
from badloss_jax.runs.sizing import Network, choose
from badloss_jax.training import footprint
from badloss_jax.training.batch import Batch
from badloss_jax.training.loop import Recipe
from badloss_jax.training.state import create_state
from badloss_jax.training.step import make_sweep_step, make_train_step
from badloss_jax.trajectories.kinds import Kinds

KINDS = Kinds((), 10, 8)
SPEC = ModelSpec("resnet_small", (16, 16, 3), 10, (8, 16), 1)
OVERRIDES = ("--config.data.train_examples=300", "--config.data.test_examples=60", "--config.probes.count=30")


def analysed(compiled):
    """What XLA says that a compiled program takes, in bytes."""
    sizes = compiled.memory_analysis()
    return (sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes
            - sizes.alias_size_in_bytes)  # fmt: skip


def refused(monkeypatch):
    """The bytes of each check, on each device."""
    asked = []
    monkeypatch.setattr(footprint, "check_device_memory", lambda needed, *_: asked.append(needed))
    return asked


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("resnet_small", "float32"), ("resnet_small", "bfloat16"), ("frequency_cnn", "float32"), ("vgg16_bn", "float32")],
)
def test_it_is_less_than_the_compiled_program_takes(monkeypatch, mesh, name, dtype):
    spec = ModelSpec(name, (32, 32, 3), 10, dtype=dtype)
    recipe = Recipe(1, 1, 64)
    asked = refused(monkeypatch)
    footprint.check_train_step("", spec, recipe, None, mesh)
    footprint.check_sweep_step("", spec, recipe, 64, KINDS, mesh)

    state = footprint.shapes_of_state(spec, recipe.optimizer, mesh, recipe.objective)
    batch = footprint.shapes_of_batch(spec, 64, mesh)
    step = make_train_step(spec, recipe.optimizer, recipe.objective, "none", None, mesh)
    trained = analysed(step.lower(state, batch, np.int32(0), np.float32(0), np.uint32(0), None).compile())
    swept = analysed(make_sweep_step(spec, KINDS, mesh).lower(state, batch).compile())
    assert 0.35 * trained < asked[0] <= trained
    # The optimiser's state is there, too, though a sweep is not given it.
    assert asked[1] <= swept + footprint._size_of(state.optimizer)


def test_devices_share_a_batch_and_not_the_weights(monkeypatch):
    asked = refused(monkeypatch)
    for devices in (1, 4):
        footprint.check_train_step("", SPEC, Recipe(1, 1, 64), None, make_mesh(jax.devices()[:devices]))
    recipe = Recipe(1, 1, 64)
    state = footprint.shapes_of_state(SPEC, recipe.optimizer, make_mesh(jax.devices()[:1]), recipe.objective)
    weights = footprint._size_of(state)
    assert asked[1] - weights == pytest.approx((asked[0] - weights) / 4, abs=4)


def test_nothing_is_traced_twice(monkeypatch, mesh):
    traces = []
    usual = optax.softmax_cross_entropy_with_integer_labels
    monkeypatch.setattr(
        optax, "softmax_cross_entropy_with_integer_labels", lambda *given: traces.append(0) or usual(*given)
    )
    spec = ModelSpec("resnet_small", (8, 8, 1), 7, (8,), 1)  # that no other test has
    recipe = Recipe(1, 1, 4)
    footprint.check_train_step("", spec, recipe, None, mesh)
    step = make_train_step(spec, recipe.optimizer, recipe.objective, "none", None, mesh)
    batch = Batch(
        np.arange(4, dtype=np.int32), np.zeros((4, 8, 8, 1), np.float32), np.zeros(4, np.int32), np.ones(4, bool)
    )
    state = create_state(spec, recipe.optimizer, 0, mesh)
    constants = place((np.int32(0), np.float32(0), np.uint32(0)), replicated(mesh))
    step(state, place(batch, by_rows(mesh)), *constants, None)
    assert len(traces) == 1


@pytest.mark.parametrize("key", ["recording.batch_size", "retraining.batch_size", "evaluation.batch_size"])
def test_a_batch_that_cannot_fit_is_refused_before_anything_compiles(monkeypatch, tmp_path, capsys, one_device, key):
    """By the memory that this machine has; the folder is not begun, so that a smaller batch may be tried in it."""
    compiled = []

    def listener(event, *_, **about):
        if "backend_compile" in event:
            compiled.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listener)
    folder = tmp_path / "out"
    config = ["--config", "configs/digits.py", *OVERRIDES, f"--config.{key}=2000000000"]
    try:
        assert main(["run", "--workdir", str(folder), *config]) == 2
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    said = capsys.readouterr().err
    assert f"{key} = 2,000,000,000 with images of 12 x 12 pixels: a " in said
    assert said.count(" GiB") == 2
    assert "take a smaller batch" in said
    assert not folder.exists()
    # Keys for random numbers may be, if no test before has made one.
    assert not {"jit(step)", "jit(init)"} & set(compiled)


def test_the_number_is_what_is_needed(monkeypatch, mesh):
    asked = refused(monkeypatch)
    footprint.check_train_step("", SPEC, Recipe(1, 1, 64), None, mesh)
    monkeypatch.undo()
    monkeypatch.setattr(memory, "free_on_host", lambda: asked[0])
    footprint.check_train_step("recording.batch_size", SPEC, Recipe(1, 1, 64), None, mesh)
    monkeypatch.setattr(memory, "free_on_host", lambda: asked[0] - 1)
    with pytest.raises(
        UsageError, match=r"recording.batch_size = 64 with images of 16 x 16 pixels: a training step of"
    ):
        footprint.check_train_step("recording.batch_size", SPEC, Recipe(1, 1, 64), None, mesh)


def test_a_scan_takes_a_smaller_network_where_a_larger_one_does_not_fit():
    networks = [Network("resnet_small", (8,), 2), Network("resnet_small", (64,), 2)]

    def rate_of(network):
        if network.stages == (64,):
            raise UsageError("it takes 2 GiB, and the machine has 1")
        return 1e6

    assert choose(networks, rate_of, 3_000, 20, 1e6).network.stages == (8,)
    with pytest.raises(UsageError, match="2 GiB"):
        choose(networks[1:], rate_of, 3_000, 20, 1e6)
