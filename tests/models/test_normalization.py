"""Our batch norm beside flax's: values, statistics and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from badloss_jax.models.normalization import BatchNorm, image_sums


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
