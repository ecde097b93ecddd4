"""Our convolution and pooling beside XLA's own, on CPUs: values, and the gradients of images and kernels."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from badloss_jax.models.convolution import convolve, max_pool


def usual(images, kernel, strides, padding, feature_group_count=1):
    return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                    feature_group_count=feature_group_count)  # fmt: skip


def with_gradients(function, *arguments):
    """Jitted, as XLA would compile each operation of it by itself."""

    def both(*arguments):
        value, pull_back = jax.vjp(function, *arguments)
        return value, *pull_back(jnp.cos(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape))

    return jax.jit(both)(*arguments)


def agree(ours, theirs, tolerance=1e-5):
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        np.testing.assert_allclose(our, their, rtol=0, atol=tolerance * float(jnp.abs(their).max()))


@pytest.mark.parametrize(("size", "stride", "groups"), [
    (1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (5, 1, 1), (7, 2, 1), (3, 1, 2), (3, 1, 6), (3, 2, 6),
])  # fmt: skip
@pytest.mark.parametrize("image", [(1, 1), (2, 2), (1, 9), (4, 2), (3, 4), (5, 5), (16, 12)])
def test_convolutions_are_those_of_xla(size, stride, groups, image, rng):
    images = jnp.asarray(rng.standard_normal((6, *image, 6)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((size, size, 6 // groups, 12 if groups == 2 else 6)), jnp.float32)
    how = {"strides": (stride, stride), "padding": [(size // 2, size // 2)] * 2, "feature_group_count": groups}
    ours, theirs = (with_gradients(lambda x, w, f=f: f(x, w, **how), images, kernel) for f in (convolve, usual))
    agree(ours, theirs)


@pytest.mark.parametrize(
    ("channels", "features", "size", "stride", "width", "at_once"),
    [
        (1, 16, 3, 1, 28, 4),
        (1, 16, 3, 2, 28, 2),
        (3, 32, 3, 1, 32, 4),
        (3, 64, 7, 2, 32, 2),
        (3, 64, 3, 1, 31, 1),
        (8, 8, 3, 1, 16, 4),
        (16, 16, 3, 1, 14, 2),
        (16, 32, 3, 1, 14, 1),
    ],
)
def test_with_few_channels_some_columns_are_computed_at_once(channels, features, size, stride, width, at_once, rng):
    images = jnp.asarray(rng.standard_normal((2, 12, width, channels)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((size, size, channels, features)), jnp.float32)
    how = {"strides": (stride, stride), "padding": [(size // 2, size // 2)] * 2}
    agree(*(with_gradients(lambda x, w, f=f: f(x, w, **how), images, kernel) for f in (convolve, usual)))

    lowered = jax.jit(lambda x, w: convolve(x, w, **how)).lower(images, kernel)
    (window,) = re.findall(r"window={size=\d+x(\d+)", lowered.compile().as_text())
    assert int(window) == size + stride * (at_once - 1)


def test_a_kernels_gradient_computes_nothing_anew(rng):
    images = jnp.asarray(rng.standard_normal((4, 12, 12, 16)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 16, 16)), jnp.float32)

    def energy(convolution, images, kernel):
        output = convolution(jnp.negative(images), kernel, (1, 1), [(1, 1)] * 2)
        return (output**2).sum()

    lowered = (jax.jit(jax.grad(partial(energy, way), argnums=1)).lower(images, kernel) for way in (convolve, usual))
    ours, theirs = (program.compile().as_text().count(" negate(") for program in lowered)
    assert ours == 1, f"{ours} in place of XLA's {theirs}"


def test_bfloat16_stays_bfloat16(rng):
    images = jnp.asarray(rng.standard_normal((4, 2, 2, 8)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 8, 8)), jnp.bfloat16)
    ours, theirs = (
        with_gradients(lambda x, w, f=f: f(x, w, (1, 1), [(1, 1)] * 2), images, kernel) for f in (convolve, usual)
    )
    agree([array.astype(jnp.float32) for array in ours], [array.astype(jnp.float32) for array in theirs], 2e-2)
    assert all(array.dtype == jnp.bfloat16 for array in ours)


@pytest.mark.parametrize(("size", "padding"), [(2, 0), (3, 1), (3, 0)])
@pytest.mark.parametrize("image", [(4, 4), (7, 6), (32, 32)])
def test_pools_are_those_of_xla_ties_included(size, padding, image, rng):
    images = jnp.asarray(rng.integers(0, 3, (3, *image, 5)), jnp.float32)
    how = {"strides": (2, 2), "padding": ((padding, padding),) * 2}
    ours = with_gradients(lambda x: max_pool(x, size, padding), images)
    theirs = with_gradients(lambda x: nnx.max_pool(x, (size, size), **how), images)
    agree(ours, theirs, 1e-6)
