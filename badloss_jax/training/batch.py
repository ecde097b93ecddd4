"""What a step is given, wherever the images come from, and what gives it."""

from collections.abc import Iterator
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Batch(Protocol):
    """One batch of examples on the devices, sharded by rows; a pytree."""

    @property
    def ids(self) -> Int[Array, "B"]:
        """The example ids; padding has one that no example has."""

    @property
    def real(self) -> Bool[Array, "B"]:
        """Which rows are examples, and not padding."""

    def examples(self, dtype: jax.typing.DTypeLike) -> tuple[Float[Array, "B H W C"], Int[Array, "B"]]:
        """Returns images in [0, 1] and labels as the victim sees them, for use inside jit.

        Args:
          dtype: of the images; a network wants its `ModelSpec.param_dtype`.
        """


class Examples(Protocol):
    """A training set as the victim sees it: `ResidentData` on the devices, or `StreamedData` on its way to them."""

    def __len__(self) -> int:
        """N."""

    def batches(self, order: Int[np.ndarray, "S B"], start: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch.

        Args:
          order: int32 [S, B], the ids of each batch; ids of no example are padding.
          start: the batch to begin with, after a stop in the middle of an epoch.
        """
