"""The peer does our work: the same logits, losses, gradients and updates; and what it cannot do is refused."""

import json
import os
import sys
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from badloss_jax.benchmarks import throughput
from badloss_jax.benchmarks.peers import NETWORKS, PEERS, check_workload, make_peer
from badloss_jax.benchmarks.workload import Workload, synthetic_data
from badloss_jax.cli import main
from badloss_jax.core.errors import UsageError
from badloss_jax.core.order import epoch_batches
from badloss_jax.models import ModelSpec
from badloss_jax.training.loop import Recipe
from badloss_jax.training.objective import Flooding, MeanLoss
from badloss_jax.training.state import Adadelta, AdamW, create_state, merged, statistics_of
from badloss_jax.training.step import make_train_step
from badloss_jax.trajectories.kinds import Kinds

SMALL = ModelSpec("resnet_small", (9, 9, 3), 5, (4, 6), 2)
SIZES = [
    SMALL,
    replace(SMALL, image_shape=(8, 8, 1), stages=(4, 8, 8), stem_stride=1),
    replace(SMALL, image_shape=(13, 10, 3), stages=(4, 4, 6)),
    pytest.param(ModelSpec("resnet18", (17, 16, 3), 4), marks=pytest.mark.slow),
]


def workload_of(mesh, spec, count=40, batch_size=16, **recipe):
    """A workload of noise, at a rate at which a few steps change a lot."""
    data = synthetic_data(mesh, count, spec.image_shape, spec.num_classes)
    recipe = Recipe(2, 4, batch_size, 1e-2, **{"optimizer": AdamW(0.1, 0.8, 0.95), **recipe})
    return Workload(spec, recipe, Kinds((), spec.num_classes, 1), data, mesh, batch_size)


def fresh(workload):
    """A state whose norms scale and shift, so that one left at its default would be seen."""
    state = create_state(workload.spec, workload.recipe.optimizer, 3, workload.mesh)
    draw = np.random.default_rng(5)
    params = jax.tree.map(
        lambda leaf: leaf + draw.normal(0, 0.1, leaf.shape).astype(np.float32) * (leaf.ndim == 1), state.params
    )
    return replace(state, params=params)


def close(theirs, ours, tolerance):
    """Compares by the largest of ours: sums in another order leave little of what cancels."""
    theirs, ours = np.asarray(theirs), np.asarray(ours)
    assert theirs.shape == ours.shape
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=tolerance * np.abs(ours).max())


def as_named(state):
    """Our parameters, or gradients, by PyTorch's names and in its layout."""
    torch_peer = pytest.importorskip("badloss_jax.benchmarks.torch_peer")
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        *modules, name = (str(entry.key) for entry in path)
        values = np.asarray(leaf)
        if name == "kernel":
            values = np.einsum("hwio->oihw" if values.ndim == 4 else "io->oi", values)
        named[".".join([*modules, torch_peer._NAMES[name]])] = values
    return named


@pytest.mark.parametrize("spec", SIZES, ids=lambda spec: f"{spec.name}-{spec.image_shape}")
def test_logits_losses_and_gradients_are_ours(mesh, spec):
    """In float64: in float32 rounding turns ReLUs on and off, which moves gradients of deep networks by percents."""
    torch = pytest.importorskip("torch")
    from badloss_jax.benchmarks.torch_peer import TorchResNet

    draw = np.random.default_rng(7)
    labels = draw.integers(0, spec.num_classes, 12)
    with jax.enable_x64(True):
        images = draw.random((12, *spec.image_shape))
        state = fresh(workload_of(mesh, replace(spec, dtype="float64")))
        # Flax keeps these in float32.
        batch_stats = jax.tree.map(lambda leaf: leaf.astype(np.float64), state.batch_stats.tree)

        def ours(params):
            model = merged(replace(spec, dtype="float64"), params, batch_stats)
            logits, _ = model(images, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), (logits, statistics_of(model).tree)

        (loss, (logits, stats)), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(state.params.tree)
        gradients, stats = as_named(gradients), as_named(stats)

    network = TorchResNet(spec).double()
    network.copy(state)
    theirs = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    mean = torch.nn.functional.cross_entropy(theirs, torch.from_numpy(labels))
    mean.backward()

    close(theirs.detach(), logits, 1e-9)
    assert float(mean.detach()) == pytest.approx(float(loss), rel=1e-9)
    parameters = dict(network.named_parameters())
    assert parameters.keys() == gradients.keys()
    for name, parameter in parameters.items():
        close(parameter.grad, gradients[name], 1e-9)

    # Not the variances, see `_ConvNorm`.
    running = network.state_dict()
    for name in [name for name in stats if name.endswith("mean")]:
        close(running[name], stats[name], 1e-9)


def test_batches_are_ours(mesh):
    """Gathered from bytes by the ids, labels with them."""
    torch = pytest.importorskip("torch")
    workload = workload_of(mesh, SMALL)
    state = fresh(workload)
    ids = np.array([7, 3, 39, 3], np.int32)
    batch = workload.data.batch(ids)
    logits, _ = merged(SMALL, state.params.tree, state.batch_stats.tree)(batch.images, train=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    close(make_peer("torch", workload, state).losses(torch.from_numpy(ids)).detach(), losses, 1e-4)


def test_all_its_networks_have_our_shapes(mesh):
    pytest.importorskip("torch")
    from badloss_jax.benchmarks.torch_peer import TorchResNet

    for name in NETWORKS:
        for size in (16, 112):  # of either stem
            spec = ModelSpec(name, (size, size, 3), 10)
            model = nnx.eval_shape(lambda spec=spec: spec.build(nnx.Rngs(0)))
            ours = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
            assert sum(parameter.numel() for parameter in TorchResNet(spec).parameters()) == ours


def test_steps_are_ours(mesh):
    """The loss of each step, after the updates of those before; the clamp is in the way of some examples."""
    pytest.importorskip("torch")
    workload = workload_of(mesh, SMALL, count=48, objective=MeanLoss(1.8))
    recipe = workload.recipe
    state = fresh(workload)
    peer = make_peer("torch", workload, state)
    step = make_train_step(SMALL, recipe.optimizer, recipe.objective, recipe.augment, None, mesh)
    order = epoch_batches(np.arange(48), 16, 48, seed=0, phase="test", epoch=0)
    rate = np.float32(recipe.learning_rate_at(0))

    ours, theirs = [], []
    for batch, ids in zip(workload.data.batches(order), order, strict=True):
        state, loss, *_ = step(state, batch, np.int32(0), rate, np.uint32(0), None)
        peer.train([ids])
        ours.append(float(loss))
        theirs.append(peer.loss)
    assert max(ours) < 1.8
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)
    for name, parameter in peer.network.named_parameters():
        close(parameter.detach(), as_named(state.params.tree)[name], 1e-3)


def test_padding_is_computed(mesh):
    pytest.importorskip("torch")
    workload = workload_of(mesh, SMALL, count=5)
    peer = make_peer("torch", workload, fresh(workload))
    peer.train(epoch_batches(np.arange(5), 16, 5, seed=0, phase="test", epoch=0))
    assert np.isfinite(peer.loss)
    assert peer.threads == len(os.sched_getaffinity(0))


GIVEN = ["--examples", "40", "--image_size", "8", "--seconds", "0.01", "--config.recording.batch_size=16",
         "--config.evaluation.batch_size=16", "--config.model.stages=(4,)"]  # fmt: skip


@pytest.fixture
def on_one_device(mesh, monkeypatch):
    """Measures on the first device alone, as there is one in most machines."""
    monkeypatch.setattr("badloss_jax.core.mesh.make_mesh", lambda: mesh)


@pytest.mark.slow
@pytest.mark.usefixtures("on_one_device")
def test_the_peer_is_measured_beside_ours(tmp_path, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(throughput, "_BLOCK", 1e-4)  # a step or two
    out = tmp_path / "out.json"
    assert main(["bench", "train", *GIVEN, "--peer", "torch", "--out", str(out)]) == 0
    (figure,) = json.loads(out.read_text("utf-8"))["figures"]
    peer = figure["peer"]
    assert (peer["name"], peer["version"]) == ("torch", torch.__version__)
    assert peer["threads"] == len(os.sched_getaffinity(0)) == torch.get_num_threads()
    assert peer["examples_per_second"] == pytest.approx(16 / peer["step_seconds"]["median"])
    low, high = peer["ratio"]["interval"]
    assert 0 < low <= peer["ratio"]["median"] <= high
    assert peer["ratio"]["count"] == figure["step_seconds"]["off"]["count"] == peer["step_seconds"]["count"]
    assert peer["first_call_seconds"] > 0
    assert set(figure["step_seconds"]) == {"off", "sweep", "step"}
    assert "step, torch" not in figure["first_call_seconds"]

    shown = capsys.readouterr().out
    (row,) = [line for line in shown.splitlines() if " torch " in line]
    assert f"ours / torch {peer['ratio']['median']:.3f}" in row
    assert max(map(len, shown.splitlines()[:-1])) <= 120


@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_is_not_installed_is_a_clear_error(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("badloss_jax.core.mesh.make_mesh", lambda: pytest.fail("something was compiled"))
    assert main(["bench", "train", *GIVEN, "--peer", name]) == 2
    said = capsys.readouterr().err
    assert f"pip install {name}" in said
    assert "--index-url https://download.pytorch.org/whl/cpu" in said


def test_an_unknown_peer_is_refused(capsys):
    assert main(["bench", "train", *GIVEN, "--peer", "torhc"]) == 2
    assert "did you mean 'torch'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "recipe", "message"),
    [
        ({"name": "vgg16_bn"}, {}, "expected one of resnet_small, resnet18, resnet34, resnet50"),
        ({"dtype": "bfloat16"}, {}, "model.dtype = 'bfloat16' with --peer torch: expected float32"),
        ({"ghost_batch": 8}, {}, "model.ghost_batch = 8 with --peer torch: expected 0"),
        ({}, {"optimizer": Adadelta()}, "expected AdamW"),
        ({}, {"objective": Flooding()}, "expected MeanLoss"),
        ({}, {"augment": "cifar"}, "augment = 'cifar' with --peer torch: expected 'none'"),
    ],
)
def test_what_a_peer_cannot_do_is_refused(mesh, change, recipe, message):
    workload = workload_of(mesh, SMALL, **recipe)
    with pytest.raises(UsageError) as error:
        check_workload("torch", replace(workload, spec=replace(SMALL, **change)))
    assert message in str(error.value)


def test_a_peer_has_one_device(capsys):
    pytest.importorskip("torch")
    assert main(["bench", "train", *GIVEN, "--peer", "torch"]) == 2
    assert "--peer torch with 8 devices of platform cpu: expected one CPU" in capsys.readouterr().err
