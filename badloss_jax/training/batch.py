"""What a step is given, wherever the images come from, and what gives it."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from badloss_jax.core.order import Passes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One batch of examples on the devices, sharded by rows.

    It says nothing of the set that it is of, so that what is compiled for it serves sets of any size.

    Attributes:
      ids: int32 [B], the example ids; padding has one that no example has.
      images: float32 [B, H, W, C] in [0, 1], as the victim sees them; of padding, any.
      labels: int32 [B] in 0 to K - 1, as the victim sees them; of padding, any.
      real: bool [B], which rows are examples, and not padding.
    """

    ids: Int[Array, "B"]
    images: Float[Array, "B H W C"]
    labels: Int[Array, "B"]
    real: Bool[Array, "B"]


class Examples(Protocol):
    """A training set as the victim sees it: `ResidentData` on the devices, or `StreamedData` on its way to them."""

    def __len__(self) -> int:
        """N."""

    def batches(self, order: Int[np.ndarray, "S B"], start: int = 0) -> Generator[Batch]:
        """Yields the batches of one pass.

        Args:
          order: int32 [S, B], the ids of each batch; ids of no example are padding.
          start: the batch to begin with.
        """

    def stream(self, passes: Passes, number: int = 0, start: int = 0) -> Generator[Batch]:
        """Yields the batches of one pass after the other, reading on meanwhile; to be closed before its end.

        Args:
          passes: of a whole training.
          number: the pass to begin with, after a stop.
          start: the batch of it to begin with.
        """
