"""Independent random streams from one seed, each by its purpose: what one draws never moves another."""

import hashlib
import operator

import numpy as np


def derived_seed(seed: int, *purpose: str | int) -> int:
    """Returns a 32-bit seed for one purpose, such as `derived_seed(0, "retraining", "augment")`.

    Args:
      seed: of the run, any integer.
      *purpose: names and numbers, such as a phase and an epoch.
    """
    # A NumPy integer is written differently from Python's, and is the same seed.
    text = repr((operator.index(seed), *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Returns NumPy's generator for one purpose.

    Args:
      seed: of the run.
      *purpose: as of `derived_seed`.
    """
    return np.random.default_rng(derived_seed(seed, *purpose))
