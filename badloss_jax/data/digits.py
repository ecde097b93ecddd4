"""scikit-learn's 1,797 handwritten digits of 8x8 pixels: the data set that needs no download."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from badloss_jax.data.dataset import Dataset, Split


def load(settings: Mapping[str, Any]) -> Dataset:
    """Returns 1,347 training and 450 test digits, a fixed stratified split, grey values 0..16 scaled to 0..255."""
    # Imported here because scikit-learn takes a second, and no other source needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    class_names = tuple(str(name) for name in digits.target_names)

    train, test = train_test_split(np.arange(len(labels)), test_size=450, random_state=0, stratify=labels)
    return Dataset(Split(images[train], labels[train]), Split(images[test], labels[test]), class_names)
