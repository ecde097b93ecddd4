import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from badloss_jax.models import ModelSpec


def parameters(spec):
    shapes = nnx.eval_shape(lambda: nnx.state(spec.build(nnx.Rngs(0)), nnx.Param))
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("spec", "count", "features"),
    [
        # The well-known counts of PyTorch's CIFAR-10 ResNets with a 3x3 stem.
        (ModelSpec("resnet18", (32, 32, 3), 10), 11_173_962, 512),
        (ModelSpec("resnet50", (32, 32, 3), 10), 23_520_842, 2048),
        (ModelSpec("resnet_small", (12, 12, 1), 10, (16, 32), 1), 19_706, 32),
    ],
)
def test_sizes(spec, count, features):
    assert parameters(spec) == count
    assert spec.num_features == features
    logits, penultimate = nnx.eval_shape(lambda: spec.build(nnx.Rngs(0))(jnp.zeros((2, *spec.image_shape)), train=True))
    assert logits.shape == (2, spec.num_classes)
    assert penultimate.shape == (2, features)


def test_resolution_is_that_of_the_32_px_stem():
    """Stem of stride 1, max-pool 2, then three stages of stride 2: 32 px end as 2x2."""
    spec = ModelSpec("resnet18", (32, 32, 3), 10)
    model = spec.build(nnx.Rngs(0))
    assert model.stem.conv.strides == 1
    assert model.stem.conv.kernel.shape == (3, 3, 3, 64)
    seen = []
    head = model.blocks[-1]
    original = type(head).__call__
    try:
        type(head).__call__ = lambda self, x, *rest: seen.append(x.shape) or original(self, x, *rest)
        nnx.eval_shape(lambda m: m(jnp.zeros((1, 32, 32, 3)), train=True), model)
    finally:
        type(head).__call__ = original
    assert [shape[1] for shape in seen] == [16, 16, 16, 8, 8, 4, 4, 2]


def test_bfloat16_computes_in_16_bits_and_answers_in_32():
    spec = ModelSpec("resnet_small", (8, 8, 1), 10, (8,), 1, "bfloat16")
    model = spec.build(nnx.Rngs(0))
    assert model.head.linear.kernel.dtype == jnp.float32
    x = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
    assert model.stem(x, True, None).dtype == jnp.bfloat16
    logits, features = model(x, train=True)
    assert logits.dtype == features.dtype == jnp.float32


def test_padding_counts_neither_in_outputs_nor_in_statistics():
    spec = ModelSpec("resnet_small", (8, 8, 1), 10, (8, 16), 1)
    x = jax.random.uniform(jax.random.key(0), (6, 8, 8, 1))
    alone, padded = spec.build(nnx.Rngs(0)), spec.build(nnx.Rngs(0))
    expected, _ = alone(x[:4], train=True)
    got, _ = padded(x.at[4:].set(1e3), train=True, mask=jnp.arange(6) < 4)
    np.testing.assert_allclose(got[:4], expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m, nnx.BatchStat)) for m in (padded, alone)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_batch_norm_keeps_nine_tenths_of_its_statistics():
    model = ModelSpec("resnet_small", (8, 8, 1), 10, (8,), 1).build(nnx.Rngs(0))
    x = jax.random.uniform(jax.random.key(0), (16, 8, 8, 1))
    before = model.stem.conv(x)
    model(x, train=True)
    np.testing.assert_allclose(model.stem.norm.mean[...], 0.1 * before.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.stem.norm.var[...], 0.9 + 0.1 * before.var((0, 1, 2)), rtol=1e-4)


def test_convolutions_are_he_normal_by_fan_out():
    kernel = ModelSpec("resnet18", (32, 32, 3), 10).build(nnx.Rngs(0)).blocks[-1].layers[1].conv.kernel[...]
    assert kernel.shape == (3, 3, 512, 512)
    assert float(kernel.std()) == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
