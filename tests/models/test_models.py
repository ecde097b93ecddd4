import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from badloss_jax.models import ModelSpec
from badloss_jax.models.layers import Head
from badloss_jax.models.resnet import BasicBlock
from badloss_jax.training.loop import Passengers, Recipe, train
from badloss_jax.training.resident import ResidentData
from badloss_jax.training.state import AdamW, create_state, merged


def built(spec, mesh):
    state = create_state(spec, AdamW(), 0, mesh)
    return merged(spec, state.params.tree, state.batch_stats.tree)


@nnx.jit
def trained(model, x, mask=None):
    """What the network says in training, which moves its statistics."""
    return model(x, train=True, mask=mask)


@pytest.mark.parametrize(
    ("spec", "count", "features"),
    [
        # The well-known counts of PyTorch's CIFAR-10 ResNets with a 3x3 stem.
        (ModelSpec("resnet18", (32, 32, 3), 10), 11_173_962, 512),
        (ModelSpec("resnet50", (32, 32, 3), 10), 23_520_842, 2048),
        (ModelSpec("resnet_small", (12, 12, 1), 10, (16, 32), 1), 19_706, 32),
        # torchvision's ImageNet networks; of VGG-16 the convolutions, without the biases that batch norm makes idle.
        (ModelSpec("resnet18", (224, 224, 3), 1000), 11_689_512, 512),
        (ModelSpec("resnet34", (224, 224, 3), 1000), 21_797_672, 512),
        (ModelSpec("resnet50", (224, 224, 3), 1000), 25_557_032, 2048),
        (ModelSpec("mobilenet_v2", (224, 224, 3), 1000), 3_504_872, 1280),
        (ModelSpec("vgg16_bn", (32, 32, 3), 10), 14_728_266 - 4_224, 512),
    ],
)
def test_sizes(spec, count, features):
    def look():
        model = spec.build(nnx.Rngs(0))
        return nnx.state(model, nnx.Param), model(jnp.zeros((2, *spec.image_shape)), train=True)

    shapes, (logits, penultimate) = nnx.eval_shape(look)
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count
    assert spec.num_features == features
    assert logits.shape == (2, spec.num_classes)
    assert penultimate.shape == (2, features)


def test_resolution_is_that_of_the_32_px_stem(monkeypatch):
    """Stem of stride 1, max-pool 2, then three stages of stride 2: 32 px end as 2x2."""
    seen = []
    original = BasicBlock.__call__
    monkeypatch.setattr(BasicBlock, "__call__", lambda self, x, *rest: seen.append(x.shape) or original(self, x, *rest))

    def look():
        model = ModelSpec("resnet18", (32, 32, 3), 10).build(nnx.Rngs(0))
        assert model.stem.conv.strides == 1
        assert model.stem.conv.kernel.shape == (3, 3, 3, 64)
        return model(jnp.zeros((1, 32, 32, 3)), train=True)

    nnx.eval_shape(look)
    assert [shape[1] for shape in seen] == [16, 16, 16, 8, 8, 4, 4, 2]


@pytest.mark.parametrize(
    ("name", "side", "last"),
    [("resnet18", 224, 7), ("resnet34", 112, 4), ("resnet50", 64, 4), ("vgg16_bn", 224, 14), ("vgg16_bn", 32, 2),
     ("vgg16_bn", 12, 1), ("mobilenet_v2", 224, 7), ("mobilenet_v2", 32, 4)],
)  # fmt: skip
def test_resolution_follows_the_size_of_the_images(name, side, last, monkeypatch):
    """Images of at least 112 px get the stem of ImageNet's networks."""
    seen = []
    original = Head.__call__
    monkeypatch.setattr(Head, "__call__", lambda self, x: seen.append(x.shape[1:3]) or original(self, x))
    spec = ModelSpec(name, (side, side, 3), 10)
    nnx.eval_shape(lambda: spec.build(nnx.Rngs(0))(jnp.zeros((1, side, side, 3)), train=True))
    assert seen == [(last, last)]


@pytest.mark.slow
def test_depthwise_convolutions_learn(mesh):
    """A few steps on eight images bring the loss down, with a padded batch, through the one trainer."""
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8), np.arange(8) % 4
    data = ResidentData.place(mesh, images, labels, np.zeros(0, int), np.zeros((0, 16, 16, 3), np.float32))
    losses = []
    spec = ModelSpec("mobilenet_v2", (16, 16, 3), 4)
    train(spec, Recipe(8, 8, 6), data, np.arange(8), seed=0, phase="test", mesh=mesh,
          passengers=Passengers(on_epoch=lambda record: losses.append(record["loss"])))  # fmt: skip
    assert losses[-1] < losses[0] / 2


def test_bfloat16_computes_in_16_bits_and_answers_in_32(mesh):
    spec = ModelSpec("resnet_small", (8, 8, 1), 10, (8,), 1, "bfloat16")
    model = built(spec, mesh)
    assert model.head.linear.kernel.dtype == jnp.float32
    x = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
    assert model.stem(x, True, None).dtype == jnp.bfloat16
    logits, features = trained(model, x)
    assert logits.dtype == features.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16)).all()  # nor were they rounded before


def test_padding_counts_neither_in_outputs_nor_in_statistics(mesh):
    spec = ModelSpec("resnet_small", (8, 8, 1), 10, (8, 16), 1)
    x = jax.random.uniform(jax.random.key(0), (6, 8, 8, 1))
    alone, padded = built(spec, mesh), built(spec, mesh)
    expected, _ = trained(alone, x[:4])
    got, _ = trained(padded, x.at[4:].set(1e3), jnp.arange(6) < 4)
    np.testing.assert_allclose(got[:4], expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m, nnx.BatchStat)) for m in (padded, alone)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_batch_norm_keeps_nine_tenths_of_its_statistics(mesh):
    model = built(ModelSpec("resnet_small", (8, 8, 1), 10, (8,), 1), mesh)
    x = jax.random.uniform(jax.random.key(0), (16, 8, 8, 1))
    before = model.stem.conv(x)
    trained(model, x)
    np.testing.assert_allclose(model.stem.norm.mean[...], 0.1 * before.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.stem.norm.var[...], 0.9 + 0.1 * before.var((0, 1, 2)), rtol=1e-4)


def test_convolutions_are_he_normal_by_fan_out():
    spec = ModelSpec("resnet18", (32, 32, 3), 10)
    kernel = jax.jit(lambda: spec.build(nnx.Rngs(0)).blocks[-1].layers[1].conv.kernel[...])()
    assert kernel.shape == (3, 3, 512, 512)
    assert float(kernel.std()) == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
