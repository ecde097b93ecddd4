import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from flax import nnx

from badloss_jax.defenses.frequency_analysis import add_blocks, dct2, dct_matrix, detector_data
from badloss_jax.models import ModelSpec


@pytest.mark.parametrize("shape", [(3, 8, 8, 1), (2, 32, 32, 3), (1, 12, 20, 3), (1, 224, 224, 1)])
def test_dct_is_scipys(shape, rng):
    images = rng.random(shape).astype(np.float32)
    theirs = scipy.fft.dctn(images.astype(np.float64), axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(jax.jit(dct2)(images), theirs, atol=1e-4)
    np.testing.assert_allclose(dct_matrix(shape[1]) @ dct_matrix(shape[1]).T, np.eye(shape[1]), atol=1e-12)


@pytest.mark.parametrize(
    ("side", "sides", "margins"),
    [(8, (1, 2), (0, 1)), (32, (2, 7), (0, 5)), (64, (4, 14), (0, 10)), (224, (14, 49), (0, 35))],
)
def test_blocks(side, sides, margins, rng):
    """Nothing else changes; all sizes, corners and both kinds occur."""
    images = np.full((200, side, side, 3), 0.5, np.float32)
    altered = add_blocks(images, rng)
    assert (images == 0.5).all()
    assert altered.dtype == np.float32
    seen = []
    for image in altered:
        places = np.argwhere((image != 0.5).any(-1))
        low, high = places.min(0), places.max(0) + 1
        block = image[low[0] : high[0], low[1] : high[1]]
        assert (block != 0.5).all()
        assert (block <= 1).all()
        assert (block >= 0).all()
        margin = np.minimum(low, side - high)
        corner = tuple(low < side - high)
        seen.append((*(high - low), *margin, corner, bool((block == 1).all())))
        assert margin[0] == margin[1]
    for column, bounds in ((0, sides), (1, sides), (2, margins)):
        values = [one[column] for one in seen]
        assert (min(values), max(values)) == bounds
    assert len({one[4] for one in seen}) == 4
    assert 60 < sum(one[5] for one in seen) < 140


def test_detector_sees_each_probe_with_and_without_a_block(mesh, rng):
    probes = rng.random((6, 12, 12, 3)).astype(np.float32)
    data = detector_data(probes, np.random.default_rng(0), mesh)
    assert data.labels.tolist() == [0] * 6 + [1] * 6
    shown = next(data.batches(np.arange(12)[None])).images
    np.testing.assert_allclose(shown, dct2(np.r_[probes, add_blocks(probes, np.random.default_rng(0))]), atol=1e-5)
    assert (np.abs(shown[6:] - shown[:6]).max((1, 2, 3)) > 0).all()


@pytest.mark.parametrize(
    ("shape", "features"),
    [((32, 32, 3), 2048), ((8, 8, 1), 128), ((4, 4, 1), 128), ((12, 20, 3), 256), ((224, 224, 3), 28 * 28 * 128)],
)
def test_network(shape, features):
    """At 32 px its 292,002 parameters are the paper's, less 448 biases that batch norm makes idle."""
    spec = ModelSpec("frequency_cnn", shape, 2, (32, 64, 128))
    assert spec.num_features == features
    model = nnx.eval_shape(lambda: spec.build(nnx.Rngs(0)))
    logits, seen = nnx.eval_shape(lambda m: m(jnp.zeros((2, *shape)), train=True), model)
    assert (logits.shape, seen.shape) == ((2, 2), (2, features))
    if shape == (32, 32, 3):
        assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 292_002 - 448


def test_at_home(at_home):
    """Three runs: AUROC 0.997 to 0.9999, 79 to 100 % of the poison and 0.2 to 1 % of the clean images removed."""
    found = at_home("frequency_analysis", "--config.retraining.enabled=False")["variants"]["frequency_analysis/own"]
    assert found["detection"]["auroc"]["patch"] > 0.97
    assert found["recall"]["patch"] > 0.6
    assert found["clean_removed_share"] < 0.06
