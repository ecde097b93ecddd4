"""A data set that lies on the devices as uint8, with the poisoned images beside it."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from badloss_jax.core.memory import check_device_memory, on_cpus, placed_bytes
from badloss_jax.core.mesh import by_columns, by_rows, place, replicated
from badloss_jax.core.order import OnePass, Passes
from badloss_jax.training.batch import Batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidentData:
    """A training set on every device, as the victim sees it.

    Attributes:
      images: uint8 [N, H, W, C], the originals.
      labels: int32 [N], the poisoned labels.
      override: float32 [R, H, W, C], images that replace originals, from the second row on; the others are never shown.
      override_row: int32 [N], the row of `override` that replaces this example, or 0.
    """

    images: UInt8[Array, "N H W C"]
    labels: Int[Array, "N"]
    override: Float[Array, "R H W C"]
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
        """Copies a training set to every device of the mesh.

        Args:
          mesh: the devices.
          images: uint8 [N, H, W, C], the originals.
          labels: int [N], the poisoned labels.
          override_ids: int [M], the examples whose images are replaced.
          override_images: float [M, H, W, C] in [0, 1], what they are replaced by.

        Returns:
          The set, replicated.

        Raises:
          UsageError: it does not fit the devices' memory; both numbers are named.
        """
        override_row = np.zeros(len(images), np.int32)
        override_row[override_ids] = np.arange(1, len(override_ids) + 1)

        # Row 0 stands for "not replaced".
        override = np.zeros((_rows_for(len(override_ids), len(images)), *images.shape[1:]), np.float32)
        arrays = (images, labels.astype(np.int32), override, override_row)
        _check_fits(arrays, len(override_ids), mesh)
        override[1 : 1 + len(override_ids)] = override_images

        return cls(*place(arrays, replicated(mesh)))

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Int[np.ndarray, "S B"], start: int = 0) -> Generator[Batch]:
        """Yields the batches of one pass; see `Examples`."""
        return self.stream(OnePass(order), start=start)

    def stream(self, passes: Passes, number: int = 0, start: int = 0) -> Generator[Batch]:
        """Yields the batches of one pass after the other; see `Examples`."""
        mesh = self.labels.sharding.mesh  # type: ignore[attr-defined]
        take = make_take(mesh)

        for later in range(number, len(passes.shapes)):
            # The whole pass at once, so that nothing is copied from the host between two steps.
            order = passes.order(later)
            placed = place(order, by_columns(mesh))
            for step in range(start, len(order)):
                yield take(self, placed, np.int32(step))
            start = 0

    def batch(self, ids: Int[Array, "B"]) -> Batch:
        """Returns examples as the victim sees them, for use inside jit; padding shows the last one.

        Args:
          ids: int32 [B]; ids of no example are padding.
        """
        known = jnp.minimum(ids, len(self) - 1)
        rows = self.override_row[known]
        is_replaced = (rows > 0)[:, None, None, None]
        originals = self.images[known].astype(jnp.float32) / 255
        return Batch(
            ids=ids,
            images=jnp.where(is_replaced, self.override[rows], originals),
            labels=self.labels[known],
            real=ids < len(self),
        )


def _check_fits(arrays: Sequence[np.ndarray], replaced: int, mesh: Mesh) -> None:
    """Refuses arrays, of which the first are the images and the third the override, that are more than devices hold."""
    images, _, override, _ = arrays
    needed = sum(placed_bytes(array, mesh) for array in arrays)
    if on_cpus(mesh):
        # Zeros take memory once they are written to: on the host only those that an image replaces.
        needed += replaced * override[0].nbytes // mesh.local_mesh.size

    count, height, width, channels = images.shape
    check_device_memory(
        needed,
        mesh,
        f"the resident data set of {count:,} images of {height} x {width} x {channels}",
        "--config.data.input=streamed leaves it on the host; or take fewer images (data.train_examples), or smaller"
        " ones (data.image_size)",
    )


def _rows_for(replaced: int, examples: int) -> int:
    """Returns how many rows `override` has, some of them to spare.

    So what is compiled for one attack serves all of about its size, and clean images. Float32 rows for a 64th of the
    examples take a 16th of what their uint8 images take.
    """
    multiple = max(64, examples // 64)
    return -(-(1 + replaced) // multiple) * multiple


@lru_cache(maxsize=8)
def make_take(mesh: Mesh) -> Any:
    """Compiles (data, order [S, B], number) -> the batch of that number.

    Args:
      mesh: the devices, which share the batch.

    Returns:
      The jitted function, the same one for equal arguments.
    """

    def take(data: ResidentData, order: Int[Array, "S B"], number: Int[Array, ""]) -> Batch:
        return data.batch(order[number])

    return jax.jit(take, out_shardings=by_rows(mesh))
