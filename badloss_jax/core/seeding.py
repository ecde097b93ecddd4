"""Independent random streams from one seed, each by its purpose: what one draws never moves another."""

import hashlib
import operator

import numpy as np


def derived_seed(seed: int, *purpose: str | int) -> int:
    """Returns a 32-bit seed for one purpose, such as `derived_seed(0, "retraining", "augment")`."""
    return int.from_bytes(hashlib.sha256(repr((operator.index(seed), *purpose)).encode()).digest()[:4], "little")


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Returns NumPy's generator for one purpose."""
    return np.random.default_rng(derived_seed(seed, *purpose))
