"""A data set that lies on the devices as uint8, with the poisoned images beside it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from badloss_jax.training.mesh import replicated


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidentData:
    """A training set on every device, as the victim sees it.

    Attributes:
      images: uint8 [N, H, W, C], the originals.
      labels: int32 [N], the poisoned labels.
      override: float32 [M + 1, H, W, C], images that replace originals; the first row is never shown.
      override_row: int32 [N], the row of `override` that replaces this example, or 0.
    """

    images: UInt8[Array, "N H W C"]
    labels: Int[Array, "N"]
    override: Float[Array, "M+1 H W C"]
    override_row: Int[Array, "N"]

    @classmethod
    def place(
        cls,
        mesh: Mesh,
        images: UInt8[np.ndarray, "N H W C"],
        labels: Int[np.ndarray, "N"],
        override_ids: Int[np.ndarray, "M"],
        override_images: Float[np.ndarray, "M H W C"],
    ) -> "ResidentData":
        """Copies the arrays to every device of the mesh."""
        rows = np.zeros(len(images), np.int32)
        rows[override_ids] = np.arange(1, len(override_ids) + 1)
        shown = np.concatenate([np.zeros((1, *images.shape[1:]), np.float32), override_images.astype(np.float32)])
        return cls(*jax.device_put((images, labels.astype(np.int32), shown, rows), replicated(mesh)))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, ids: Int[Array, "B"], dtype: jax.typing.DTypeLike
    ) -> tuple[Float[Array, "B H W C"], Int[Array, "B"]]:
        """Returns images in [0, 1] and labels of the ids; an id that is no example gives the last one's."""
        ids = jnp.minimum(ids, len(self) - 1)
        rows = self.override_row[ids]
        images = self.images[ids].astype(dtype) / 255
        return jnp.where((rows > 0)[:, None, None, None], self.override[rows].astype(dtype), images), self.labels[ids]
