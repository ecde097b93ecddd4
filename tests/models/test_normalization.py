"""Our batch norm beside flax's, and ghost batches beside a loop: values, statistics and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from badloss_jax.models.normalization import BatchNorm, image_sums, normalize


def look(module, x, mask):
    """Returns values, both running statistics and all gradients of a module of fixed weights, in training."""
    channels = x.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    module = module(channels, momentum=0.9, dtype=x.dtype, param_dtype=wide, rngs=nnx.Rngs(0))
    module.scale[...] = jnp.linspace(0.5, 2, channels)
    module.bias[...] = jnp.linspace(-1, 1, channels)
    graph, params, statistics = nnx.split(module, nnx.Param, ...)

    def apply(params, x):
        own = nnx.merge(graph, params, statistics, copy=True)
        return own(x, use_running_average=False, mask=mask), nnx.state(own, nnx.BatchStat)

    def run(params, x):
        y, pull_back, moved = jax.vjp(apply, params, x, has_aux=True)
        of_params, of_x = pull_back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))
        return y, of_x, jax.tree.leaves(of_params), jax.tree.leaves(moved)

    return jax.tree.map(np.asarray, jax.jit(run)(params, x))


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # flax's, whose statistics are float32
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 5), (61, 37), (40, 64)])
@pytest.mark.parametrize("padding", [0, 3])
def test_it_is_that_of_flax(size, padding, rng):
    """In float64 to its rounding; in float32 with an error of flax's size."""
    x = (3 + rng.standard_normal((8, *size, 6))).astype(np.float32)
    mask = np.arange(8) < 8 - padding if padding else None
    theirs = None if mask is None else mask[:, None, None, None]
    ours = look(BatchNorm, jnp.asarray(x), mask)
    flax = look(nnx.BatchNorm, jnp.asarray(x), theirs)
    with jax.enable_x64(True):
        exact = look(nnx.BatchNorm, jnp.asarray(x, jnp.float64), theirs)
        exact_ours = look(BatchNorm, jnp.asarray(x, jnp.float64), mask)

    def agree(our, their, our_exact, their_exact):
        largest = float(np.abs(their_exact).max())
        np.testing.assert_allclose(our_exact, their_exact, rtol=0, atol=1e-12 * largest)
        assert our.dtype == their.dtype == jnp.float32
        bound = 3 * np.abs(np.asarray(their, np.float64) - their_exact).max() + 1e-6 * largest
        np.testing.assert_allclose(our, their_exact, rtol=0, atol=bound)

    jax.tree.map(agree, ours, flax, exact_ours, exact)


def test_padding_may_be_nan(rng):
    x = jnp.asarray(rng.standard_normal((4, 3, 3, 2)), jnp.float32)
    expected = look(BatchNorm, x[:3], None)[3]
    for ours, alone in zip(look(BatchNorm, x.at[3].set(jnp.nan), jnp.arange(4) < 3)[3], expected, strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-6)


def test_bfloat16_takes_its_statistics_in_32_bits(rng):
    x = jnp.asarray(100 + rng.standard_normal((64, 8, 8, 4)), jnp.bfloat16)
    y, of_x, _, moved = look(BatchNorm, x, None)
    assert y.dtype == of_x.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in moved} == {jnp.dtype(jnp.float32)}
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(moved[0], 0.1 * exact.mean((0, 1, 2)), rtol=1e-5)


def test_the_whole_batch_is_computed_as_without_ghost_batches(rng):
    """Bit by bit: what was trained before there were any is trained again."""
    x = (3 + rng.standard_normal((8, 5, 4, 6))).astype(np.float32)
    mask = np.arange(8) < 6

    @jax.jit
    def plain(x, mask):
        weights = mask / (mask.sum().astype(x.dtype) * 20)
        mean = weights @ jnp.where(mask[:, None], image_sums(x), 0)
        square = weights @ jnp.where(mask[:, None], image_sums(x * x), 0)
        return mean, jnp.maximum(square - mean * mean, 0)

    _, *statistics = jax.jit(normalize, static_argnums=4)(x, mask, jnp.ones(6), jnp.zeros(6), 1e-5)
    for ours, expected in zip(statistics, plain(x, mask), strict=True):
        np.testing.assert_array_equal(ours, expected)


def normalised_by_fours(xp, x, mask, scale, bias):
    """Four images at a time: their values, zeros where one does not count, and statistics weighted by those that do."""
    parts, mean, variance = [], 0, 0
    for start in range(0, len(x), 4):
        images, real = x[start : start + 4], mask[start : start + 4]
        if real.any():
            own_mean = images[real].mean((0, 1, 2))
            own_variance = ((images[real] - own_mean) ** 2).mean((0, 1, 2))
            mean += own_mean * real.sum() / mask.sum()
            variance += own_variance * real.sum() / mask.sum()
            images = scale * (images - own_mean) / xp.sqrt(own_variance + 1e-5) + bias
        parts.append(xp.where(real[:, None, None, None], images, 0))
    return xp.concatenate(parts), mean, variance


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # flax's, whose statistics are float32
@pytest.mark.parametrize("real", [(4, 4, 4), (4, 2, 0), (1, 0, 4), (0, 3, 0)])
def test_ghost_batches_are_those_of_a_loop(real, rng):
    """In float64; nothing is seen of one that is all padding, and it is finite."""
    mask = np.concatenate([np.arange(4) < count for count in real])
    x = 3 + rng.standard_normal((12, 5, 3, 6))
    scale, bias, gradient = rng.standard_normal(6), rng.standard_normal(6), rng.standard_normal(x.shape)
    gradient[~mask] = 0  # as that of a loss is, which does not count padding

    def expected_values(x, scale, bias):
        return normalised_by_fours(jnp, x, mask, scale, bias)[0]

    with jax.enable_x64(True):
        norm = BatchNorm(6, momentum=0.9, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        norm.ghost_batch = 4
        norm.scale[...] = scale
        norm.bias[...] = bias
        graph, params, statistics = nnx.split(norm, nnx.Param, ...)

        def apply(x, params):
            own = nnx.merge(graph, params, statistics, copy=True)
            return own(x, mask=jnp.asarray(mask)), nnx.state(own, nnx.BatchStat)

        y, pull_back, moved = jax.vjp(apply, x, params, has_aux=True)
        of_x, of_params = pull_back(jnp.asarray(gradient))
        expected_of_x, of_scale, of_bias = jax.vjp(expected_values, x, scale, bias)[1](jnp.asarray(gradient))

    expected, mean, variance = normalised_by_fours(np, x, mask, scale, bias)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[mask], expected[mask], rtol=0, atol=1e-12)
    np.testing.assert_allclose(moved["mean"][...], 0.1 * mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(moved["var"][...], 0.9 + 0.1 * variance, rtol=0, atol=1e-6)

    np.testing.assert_allclose(of_x, expected_of_x, rtol=0, atol=1e-11)
    np.testing.assert_allclose(of_params["scale"][...], of_scale, rtol=0, atol=1e-11)
    np.testing.assert_allclose(of_params["bias"][...], of_bias, rtol=0, atol=1e-11)


def test_padding_of_a_ghost_batch_may_be_nan(rng):
    x = jnp.asarray(rng.standard_normal((8, 3, 3, 2)), jnp.float32)
    norm = BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
    norm.ghost_batch = 4
    norm(x.at[3:].set(jnp.nan), mask=jnp.arange(8) < 3)
    np.testing.assert_allclose(norm.mean[...], 0.1 * np.asarray(x[:3]).mean((0, 1, 2)), rtol=1e-5, atol=1e-7)


def test_running_statistics_stay_when_they_are_used(rng):
    norm = BatchNorm(3, rngs=nnx.Rngs(0))
    y = norm(jnp.asarray(rng.standard_normal((2, 4, 4, 3)), jnp.float32), use_running_average=True)
    assert y.shape == (2, 4, 4, 3)
    np.testing.assert_array_equal(norm.mean[...], 0)
    np.testing.assert_array_equal(norm.var[...], 1)


def test_sums_of_many_pixels_lose_nothing(rng):
    """Of 10^6 pixels a plain sum would lose four digits."""
    x = (1 + rng.random((1, 1000, 1000, 2))).astype(np.float32)
    np.testing.assert_allclose(jax.jit(image_sums)(x), x.astype(np.float64).sum((1, 2)), rtol=1e-6)
