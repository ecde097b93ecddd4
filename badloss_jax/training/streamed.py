"""A training set on its way to the devices: decoded by host workers with grain, a few batches ahead.

Every process decodes the rows of its own devices and no others. Images travel as uint8, as they are in memory on the
devices; poisoned ones, which are not whole numbers any more, beside them as float32: so the steps see the same bits as
with `ResidentData`.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from badloss_jax.attacks.poisoning import Poisoning
from badloss_jax.core.mesh import AXIS, local_blocks, place_rows
from badloss_jax.training.batch import Batch

_AHEAD = 2  # batches that wait on the devices, while the next ones are decoded


@dataclass(frozen=True)
class StreamedData:
    """A training set as its victim sees it, decoded as it is needed.

    Attributes:
      poisoning: the images and labels.
      mesh: the devices.
      workers: processes that decode; 0 decodes in threads of this one.
      threads: that decode, in this process or in each worker.
    """

    poisoning: Poisoning
    mesh: Mesh
    workers: int = 0
    threads: int = 16

    def __len__(self) -> int:
        return len(self.poisoning.labels)

    def batches(self, order: Int[np.ndarray, "S B"], start: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from the given one on; ids of no example are padding.

        Args:
          order: int32 [S, B], the ids of each batch.
          start: the batch to begin with.
        """
        show = _make_show(self.mesh)
        ahead: collections.deque[_RawBatch] = collections.deque()
        for shares in self._decoded(order[start:]):
            if len(ahead) == _AHEAD:
                yield show(ahead.popleft())
            ahead.append(self._place(shares, order.shape[1]))

        yield from map(show, ahead)

    def _decoded(self, order: Int[np.ndarray, "S B"]) -> Iterator[Sequence[dict[str, np.ndarray]]]:
        """Yields for each batch the share of each device of this process."""
        import grain  # heavy, and only streams need it

        blocks = local_blocks(order.shape[1], self.mesh)
        ids = np.stack([order[:, block] for block in blocks], axis=1)  # [S, local devices, B / devices]
        share_size = ids.shape[2]

        examples = grain.MapDataset.source(ids.reshape(-1)).map(partial(_look_up, self.poisoning))
        shares = examples.batch(share_size, batch_fn=partial(_lay_out, room=self._room(order)))
        batches = shares.batch(len(blocks), batch_fn=list)

        two_batches = 2 * share_size * len(blocks)
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=two_batches)
        stream = batches.to_iter_dataset(options)
        if self.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain hands them to its workers
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(self.workers))
        return iter(stream)

    def _room(self, order: Int[np.ndarray, "S B"]) -> int:
        """Returns for how many poisoned images a device's share of a batch has room.

        A power of two, so that few sizes are compiled, and the same in every process.
        """
        is_poisoned = np.append(self.poisoning.attack_of >= 0, False)  # the last one is padding
        shares = is_poisoned[np.minimum(order, len(self))].reshape(len(order), self.mesh.size, -1)
        most = int(shares.sum(2).max(initial=1))
        return 1 << (max(1, most) - 1).bit_length()

    def _place(self, shares: Sequence[dict[str, np.ndarray]], batch_size: int) -> "_RawBatch":
        """Brings the shares of this process's devices onto them, as one sharded batch."""
        blocks = local_blocks(batch_size, self.mesh)
        share_of = {}
        for block, share in zip(blocks, shares, strict=True):
            device = block.start // (block.stop - block.start)
            share_of[device] = share

        def sharded(name: str) -> jax.Array:
            rows, *width = shares[0][name].shape
            shape = (rows * self.mesh.size, *width)
            return place_rows(shape, self.mesh, lambda begin, end: share_of[begin // rows][name])

        return _RawBatch(
            ids=sharded("ids"),
            images=sharded("images"),
            labels=sharded("labels"),
            override=sharded("override"),
            override_row=sharded("override_row"),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _RawBatch:
    """A batch on the devices as it was decoded, every device with its own rows.

    Attributes:
      ids: int32 [B], the example ids, padding included.
      images: uint8 [B, H, W, C], the originals.
      labels: int32 [B], the poisoned labels, -1 for padding.
      override: float32 [devices * room, H, W, C], poisoned images, every device's own.
      override_row: int32 [B], which of its device's poisoned images replaces this one, from 1; 0 is none.
    """

    ids: Int[Array, "B"]
    images: UInt8[Array, "B H W C"]
    labels: Int[Array, "B"]
    override: Float[Array, "R H W C"]
    override_row: Int[Array, "B"]


@lru_cache(maxsize=8)
def _make_show(mesh: Mesh) -> Callable[[_RawBatch], Batch]:
    """Compiles a batch as it was decoded -> the batch as the victim sees it; padding is black."""

    def show(raw: _RawBatch) -> Batch:
        is_replaced = (raw.override_row > 0)[:, None, None, None]
        poisoned = raw.override[jnp.maximum(raw.override_row - 1, 0)]
        originals = raw.images.astype(jnp.float32) / 255
        return Batch(
            ids=raw.ids,
            images=jnp.where(is_replaced, poisoned, originals),
            labels=jnp.maximum(raw.labels, 0),
            real=raw.labels >= 0,
        )

    # Device by device, for `override_row` counts within the device's own share.
    rows = PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(show, mesh=mesh, in_specs=rows, out_specs=rows))


def _look_up(poisoning: Poisoning, example_id: Any) -> dict[str, Any]:
    """Decodes one example: uint8 if clean, float32 if poisoned; padding is black and has the label -1."""
    # Here and not in the step: a trigger is put on by the host that decodes the image.
    row = int(example_id)
    if row >= len(poisoning.labels):
        return {"id": row, "label": -1, "image": np.zeros(poisoning.images.shape[1:], np.uint8)}

    label = int(poisoning.labels[row])
    if poisoning.attack_of[row] >= 0:
        return {"id": row, "label": label, "image": poisoning.triggered(np.array([row]))[0]}
    return {"id": row, "label": label, "image": poisoning.images[row]}


def _lay_out(examples: Sequence[dict[str, Any]], room: int) -> dict[str, np.ndarray]:
    """Lays one device's share of a batch out in arrays of fixed shapes."""
    shape = examples[0]["image"].shape
    # Of fixed shapes, however many are poisoned, so that the step compiles once.
    share = {
        "ids": np.array([example["id"] for example in examples], np.int32),
        "labels": np.array([example["label"] for example in examples], np.int32),
        "images": np.zeros((len(examples), *shape), np.uint8),
        "override": np.zeros((room, *shape), np.float32),
        "override_row": np.zeros(len(examples), np.int32),
    }

    poisoned = 0
    for position, example in enumerate(examples):
        if example["image"].dtype == np.float32:
            share["override"][poisoned] = example["image"]
            poisoned += 1
            share["override_row"][position] = poisoned
        else:
            share["images"][position] = example["image"]
    return share
