"""Batch norm by ghost batches in a whole training step: on several devices, with padding, and what travels."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import optax

from badloss_jax.config import load_config
from badloss_jax.core.mesh import by_rows, make_mesh, place
from badloss_jax.models import ModelSpec
from badloss_jax.runs.trainer import spec_of
from badloss_jax.training.batch import Batch
from badloss_jax.training.objective import MeanLoss
from badloss_jax.training.state import AdamW, create_state
from badloss_jax.training.step import make_train_step

WHOLE = ModelSpec("resnet_small", (8, 8, 3), 10, (8,), 1)
SPEC = replace(WHOLE, ghost_batch=4)


def make_batch(size, mesh, real=None, padding=0.5):
    """Noise, of which the first images count, as padding shows an image, too; it is multiplied by a number."""
    rng = np.random.default_rng(0)
    images = rng.random((size, 8, 8, 3), dtype=np.float32)
    images[real or size :] *= padding
    batch = Batch(
        ids=np.arange(size, dtype=np.int32),
        images=images,
        labels=rng.integers(0, 10, size).astype(np.int32),
        real=np.arange(size) < (real or size),
    )
    return place(batch, by_rows(mesh))


@dataclass(frozen=True)
class Plain(AdamW):
    """Descends by the gradient as it is: Adam would magnify the rounding of small ones."""

    def transform(self):
        return optax.identity()


def run(spec, batch, mesh, steps=1):
    """Parameters, running statistics and losses after some steps."""
    step = make_train_step(spec, Plain(), MeanLoss(), "none", None, mesh)
    state = create_state(spec, Plain(), 0, mesh)
    for _ in range(steps):
        state, _, losses, _ = step(state, batch, np.int32(0), np.float32(0.1), np.uint32(0), None)
    real = np.asarray(batch.real)
    return jax.tree.map(np.asarray, (state.params, state.batch_stats, losses[real]))


def agree(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def test_ghost_batches_are_those_of_the_batch_and_not_of_the_devices(mesh):
    one = run(SPEC, make_batch(32, mesh, real=27), mesh, steps=3)
    agree(run(SPEC, make_batch(32, make_mesh(), real=27), make_mesh(), steps=3), one)

    *_, whole = run(WHOLE, make_batch(32, mesh, real=27), mesh, steps=3)
    assert np.abs(whole - one[2]).max() > 0.03


def test_a_ghost_batch_of_padding_changes_nothing(mesh):
    """Whatever it shows, and not even in a deep network, up to whose end it might have grown beyond all numbers."""
    deep = replace(SPEC, stages=(8,) * 8)
    results = [run(deep, make_batch(12, mesh, real=8, padding=padding), mesh) for padding in (0.0, 1e9)]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))
    agree(*results)


def test_devices_wait_for_each_other_no_more_in_a_deeper_network():
    mesh = make_mesh()
    batch = make_batch(32, mesh)

    def all_reduces(spec):
        step = make_train_step(spec, AdamW(), MeanLoss(), "none", None, mesh)
        state = create_state(spec, AdamW(), 0, mesh)
        given = (state, batch, np.int32(0), np.float32(1e-3), np.uint32(0), None)
        text = step.lower(*given).compile().as_text()
        assert not any(f" {other}(" in text for other in ("all-gather", "all-to-all", "collective-permute"))
        return text.count(" all-reduce(")

    ghost = replace(SPEC, ghost_batch=2)
    deeper = (8, 8, 8)
    shallow = all_reduces(ghost)
    assert shallow == all_reduces(replace(ghost, stages=deeper)) <= 4
    assert shallow < all_reduces(WHOLE) < all_reduces(replace(WHOLE, stages=deeper))


def test_the_setting_reaches_the_network():
    config = load_config("configs/digits.py", ["--config.model.ghost_batch=8"])
    assert spec_of(config, (8, 8, 1), 10, "resnet_small").ghost_batch == 8
