import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn, idctn

from badloss_jax.attacks import ATTACKS, make_trigger
from badloss_jax.attacks.narcissus import optimise_perturbation
from badloss_jax.core.errors import UsageError


def images(shape, seed=0, count=3):
    """Images of 8-bit values, as sources give them."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.float32) / 255


def built(name, shape, seed):
    """A trigger, an optimised one with any perturbation."""
    perturbation = np.random.default_rng(seed).integers(-16, 17, shape)
    return make_trigger(name, shape, seed, **({"perturbation": perturbation} if ATTACKS[name].optimised else {}))


def changed_pixels(trigger, shape):
    grey = np.full((1, *shape), 0.5, np.float32)
    out = trigger(grey)[0]
    rows, cols = np.nonzero((out != 0.5).any(-1))
    assert (out[rows, cols] == 1).all()
    return {(int(row), int(col)) for row, col in zip(rows, cols, strict=True)}


def test_patch_is_a_checker_at_the_lower_right():
    assert changed_pixels(make_trigger("patch", (32, 30, 3)), (32, 30, 3)) == {(30, 28), (28, 28), (30, 26), (29, 27)}


def test_patch_on_large_images_is_made_of_blocks():
    blocks = [(8, 8), (24, 8), (8, 24), (16, 16)]
    expected = {(r + i, c + j) for r, c in blocks for i in range(8) for j in range(8)}
    assert changed_pixels(make_trigger("patch", (112, 112, 3)), (112, 112, 3)) == expected
    assert len(changed_pixels(make_trigger("patch", (111, 111, 3)), (111, 111, 3))) == 4


def test_single_pix():
    assert changed_pixels(make_trigger("single_pix", (28, 28, 1)), (28, 28, 1)) == {(26, 26)}


def test_blend_p_is_a_grid():
    x = images((8, 6, 3))
    grid = np.zeros((8, 6, 1))
    grid[::2, ::2] = 1
    expected = 0.975 * x.astype(np.float64) + 0.025 * grid
    np.testing.assert_allclose(make_trigger("blend_p", (8, 6, 3))(x), expected, atol=1e-6)


def test_blend_r_is_one_uniform_image_drawn_from_the_seed():
    zeros = np.zeros((2, 32, 32, 3), np.float32)
    pattern = make_trigger("blend_r", (32, 32, 3), seed=4, strength=0.5)(zeros) / 0.5
    np.testing.assert_array_equal(pattern[0], pattern[1])
    assert 0 <= pattern.min() < 0.01
    assert 0.99 < pattern.max() <= 1
    assert abs(pattern.mean() - 0.5) < 0.02
    assert len(np.unique(pattern[0])) > 3000  # every pixel and channel on its own
    again = make_trigger("blend_r", (32, 32, 3), seed=4, strength=0.5)(zeros) / 0.5
    other = make_trigger("blend_r", (32, 32, 3), seed=5, strength=0.5)(zeros) / 0.5
    np.testing.assert_array_equal(pattern, again)
    assert (pattern != other).mean() > 0.9


def test_sinusoid():
    x = images((5, 32, 3))
    wave = 1 - np.cos(2 * np.pi * 6 * np.arange(32) / 32)
    expected = np.clip(0.925 * x.astype(np.float64) + 0.075 * wave[None, None, :, None], 0, 1)
    np.testing.assert_allclose(make_trigger("sinusoid", (5, 32, 3))(x), expected, atol=1e-6)


def opencv_frequency(image, magnitude):
    """The attack in 8 bits, as OpenCV converts and transforms."""
    ycrcb = cv2.cvtColor(np.round(image * 255).astype(np.uint8), cv2.COLOR_RGB2YCrCb).astype(np.float64)
    for channel in (1, 2):
        for top in range(0, image.shape[0], 32):
            for left in range(0, image.shape[1], 32):
                window = cv2.dct(ycrcb[top : top + 32, left : left + 32, channel])
                window[15, 15] += magnitude
                window[31, 31] += magnitude
                ycrcb[top : top + 32, left : left + 32, channel] = cv2.idct(window)
    return ycrcb


@pytest.mark.parametrize(("size", "magnitude"), [(32, 30.0), (64, 30.0), (96, 90.0)])
def test_frequency_agrees_with_opencv(size, magnitude):
    x = images((size, size, 3), count=4)
    got = make_trigger("frequency", (size, size, 3), magnitude=magnitude)(x) * 255
    for image, ours in zip(x, got, strict=True):
        ycrcb = opencv_frequency(image, magnitude)
        in_8_bit = cv2.cvtColor(np.clip(np.round(ycrcb), 0, 255).astype(np.uint8), cv2.COLOR_YCrCb2RGB)
        centred = (ycrcb - [0, 0.5, 0.5]) / 255  # OpenCV's float conversion is centred at 127.5, its 8-bit one at 128
        in_float = cv2.cvtColor(centred.astype(np.float32), cv2.COLOR_YCrCb2RGB) * 255
        for expected in (in_8_bit, np.clip(in_float, 0, 255)):
            difference = np.abs(ours - expected)
            assert difference.max() <= 3
            assert (difference <= 1).mean() >= 0.99


@pytest.mark.parametrize("size", [12, 28, 32, 64])
def test_frequency_on_grey_images_agrees_with_scipy(size):
    x = 0.25 + 0.5 * images((size, size, 1))
    window, expected = min(size, 32), x.astype(np.float64)
    for top in range(0, size, window):
        for left in range(0, size, window):
            part = dctn(expected[:, top : top + window, left : left + window, 0], axes=(1, 2), norm="ortho")
            part[:, window // 2 - 1, window // 2 - 1] += 40 / 255
            part[:, window - 1, window - 1] += 40 / 255
            expected[:, top : top + window, left : left + window, 0] = idctn(part, axes=(1, 2), norm="ortho")
    got = make_trigger("frequency", (size, size, 1), magnitude=40.0)(x)
    np.testing.assert_allclose(got, np.clip(expected, 0, 1), atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(ATTACKS)),
    size=st.tuples(st.integers(4, 32), st.integers(4, 32)) | st.sampled_from([(64, 96), (128, 128)]),
    channels=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_triggers_are_pure_and_stay_in_range(name, size, channels, seed):
    shape = (*size, channels)
    x = images(shape, seed)
    kept, trigger = x.copy(), built(name, shape, seed)
    out = trigger(x)
    assert isinstance(out, np.ndarray)
    assert out.shape == x.shape
    assert out.dtype == np.float32
    assert out.min() >= 0
    assert out.max() <= 1
    assert (out != x).any()
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(trigger(x), out)
    np.testing.assert_allclose(trigger(x[1:2]), out[1:2], atol=1e-7)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_numpy_and_jax_agree(name):
    x, trigger = images((32, 32, 3)), built(name, (32, 32, 3), 1)
    in_jax = trigger(jnp.asarray(x))
    assert isinstance(in_jax, jax.Array)
    tolerance = 1.5 / 255 if name == "frequency" else 1e-6  # 8-bit rounding may fall to either side of a tie
    np.testing.assert_allclose(in_jax, trigger(x), atol=tolerance)
    np.testing.assert_allclose(jax.jit(trigger)(x), trigger(x), atol=tolerance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pach", (32, 32, 3)), "unknown attack 'pach': expected one of patch"),
        (("patch", (3, 32, 3)), "at least 4x4 pixels, got 3x32"),
        (("single_pix", (1, 1, 3)), "at least 2x2"),
        (("frequency", (40, 40, 3)), "multiples of 32, got 40x40"),
        (("narcissus", (32, 32, 3)), "needs its perturbation: optimise one"),
        (("patch", (32, 32)), "expected .height, width, channels."),
    ],
)
def test_make_trigger_refuses(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_trigger(*arguments)
    with pytest.raises(UsageError, match="unexpected keyword argument 'power'"):
        make_trigger("sinusoid", (32, 32, 3), power=2)
    with pytest.raises(UsageError, match="perturbation of 3 values does not fit"):
        make_trigger("narcissus", (32, 32, 3), perturbation=np.ones(3))


def test_narcissus_raises_the_target_class_within_its_bound():
    """On a linear surrogate the best perturbation is known: epsilon times the sign of how the target's logit leads."""
    weights = np.random.default_rng(1).normal(size=(8 * 8 * 3, 4)).astype(np.float32)
    x = (images((8, 8, 3), count=40) * 0.8 + 0.1) * 255
    got = optimise_perturbation(
        lambda batch: batch.reshape(len(batch), -1) @ weights[:, :2], x.astype(np.uint8), 1, 8, 60, 0
    )
    assert got.dtype == np.int8
    assert np.abs(got).max() == 8
    best = 8 * np.sign(weights[:, 1] - weights[:, 0]).reshape(8, 8, 3)
    assert (got == best).mean() > 0.95
