import numpy as np
import pytest

from badloss_jax.core.seeding import derived_seed, generator


def test_streams_differ_by_seed_and_purpose_alone():
    seeds = {
        derived_seed(seed, *purpose) for seed in (0, 1) for purpose in (("a",), ("b",), ("a", 1), ("a", 2), ("a1",))
    }
    assert len(seeds) == 10
    assert derived_seed(np.int64(3), "a") == derived_seed(3, "a")
    assert generator(3, "a").random() == generator(3, "a").random()
    with pytest.raises(TypeError):
        derived_seed(0.5, "a")


def test_streams_never_change_with_the_version():
    assert derived_seed(0, "retraining", "weights") == 1563886160
