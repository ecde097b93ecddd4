"""A training set on its way to the devices: decoded by host workers with grain, a few batches ahead.

Every process decodes the rows of its own devices and no others. Images travel as uint8, as they are in memory on the
devices; poisoned ones, which are not whole numbers any more, beside them as float32: so the steps see the same bits as
with `ResidentData`.

A training has one stream, whatever its passes: workers start once, and read the next epoch's images during a sweep.
"""

import bisect
import collections
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from badloss_jax.attacks.poisoning import Poisoning
from badloss_jax.core.mesh import AXIS, local_blocks, place_rows
from badloss_jax.core.order import OnePass, Passes, batches_of
from badloss_jax.training.batch import Batch

_AHEAD = 2  # batches that wait on the devices, while the next ones are decoded
_PIECE = 2**21  # bytes of images that are decoded at a time, but at least one image


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

    def batches(self, order: Int[np.ndarray, "S B"], start: int = 0) -> Generator[Batch]:
        """Yields the batches of one pass; see `Examples`."""
        return self.stream(OnePass(order), start=start)

    def stream(self, passes: Passes, number: int = 0, start: int = 0) -> Generator[Batch]:
        """Yields the batches of one pass after the other; see `Examples`."""
        show = _make_show(self.mesh)
        ahead: collections.deque[Future] = collections.deque()
        with ThreadPoolExecutor(1, "badloss-input") as loader:
            try:
                decoded = self._decoded(passes, number, start)
                for ids in batches_of(passes, number, start):
                    ahead.append(loader.submit(self._load, ids, decoded))
                    if len(ahead) > _AHEAD:
                        yield show(ahead.popleft().result())
                while ahead:
                    yield show(ahead.popleft().result())
            finally:
                for waiting in ahead:
                    waiting.cancel()

    def _decoded(self, passes: Passes, number: int, start: int) -> Iterator["_Piece"]:
        """Yields the images of each batch, a piece of a device's share after the other."""
        import grain  # heavy, and only streams need it

        pieces = _Pieces.of(passes, self.mesh, self._piece_size, number, start)
        decoded = grain.MapDataset.source(pieces).map(partial(_decode, self.poisoning))

        # Every thread has a piece in work, and one that is done.
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
        stream = decoded.to_iter_dataset(options)
        if self.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain hands them to its workers
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(self.workers))
        return iter(stream)

    @property
    def _piece_size(self) -> int:
        """How many images are decoded at a time."""
        return max(1, _PIECE // math.prod(self.poisoning.images.shape[1:]))

    def _load(self, ids: Int[np.ndarray, "B"], decoded: Iterator["_Piece"]) -> "_RawBatch":
        """Brings the shares of this process's devices onto them, as one sharded batch."""
        room = self._room(ids)
        shares = {}  # device -> what it gets
        for block in local_blocks(len(ids), self.mesh):
            share_size = block.stop - block.start
            pieces = itertools.islice(decoded, math.ceil(share_size / self._piece_size))
            shares[block.start // share_size] = self._lay_out(ids[block], list(pieces), room)

        def sharded(name: str) -> jax.Array:
            rows, *width = next(iter(shares.values()))[name].shape
            shape = (rows * self.mesh.size, *width)
            return place_rows(shape, self.mesh, lambda begin, end: shares[begin // rows][name])

        return _RawBatch(
            ids=sharded("ids"),
            images=sharded("images"),
            labels=sharded("labels"),
            override=sharded("override"),
            override_row=sharded("override_row"),
        )

    def _room(self, ids: Int[np.ndarray, "B"]) -> int:
        """Returns for how many poisoned images a device's share of a batch has room, the same in every process.

        Nearly always the same, too: for the share that is poisoned, and three standard deviations more. A power of two,
        so that few sizes are compiled where that is not enough.
        """
        share_size = len(ids) // self.mesh.size
        expected = share_size * len(self.poisoning.ids) / len(self)
        usual = math.ceil(expected + 3 * math.sqrt(expected))

        shares = self._is_poisoned(ids).reshape(self.mesh.size, share_size)
        most = max(1, usual, int(shares.sum(1).max()))
        return 1 << (most - 1).bit_length()

    def _is_poisoned(self, ids: Int[np.ndarray, "B"]) -> Bool[np.ndarray, "B"]:
        """Says which ids are poisoned examples; padding is none."""
        known = np.minimum(ids, len(self) - 1)
        return (ids < len(self)) & (self.poisoning.attack_of[known] >= 0)

    def _lay_out(self, ids: Int[np.ndarray, "R"], pieces: Sequence["_Piece"], room: int) -> dict[str, np.ndarray]:
        """Lays one device's share of a batch out in arrays of fixed shapes, however many are poisoned."""
        is_poisoned = self._is_poisoned(ids)
        poisoned = np.concatenate([piece["poisoned"] for piece in pieces])
        override = np.zeros((room, *poisoned.shape[1:]), np.float32)
        override[: len(poisoned)] = poisoned

        labels = self.poisoning.labels[np.minimum(ids, len(self) - 1)]
        return {
            "ids": ids,
            "labels": np.where(ids < len(self), labels, -1).astype(np.int32),
            "images": np.concatenate([piece["images"] for piece in pieces]),
            "override": override,
            "override_row": np.where(is_poisoned, is_poisoned.cumsum(), 0).astype(np.int32),
        }


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


# --- what threads and workers do

_Piece = dict[str, np.ndarray]  # "images", uint8 [R, H, W, C]; "poisoned", float32 [p, H, W, C], of those rows that are


def _decode(poisoning: Poisoning, ids: Int[np.ndarray, "R"]) -> _Piece:
    """Decodes a few examples; where the clean images have padding and poisoned ones, they are black."""
    # Here and not in the step: a trigger is put on by the host that decodes the image.
    is_known = ids < len(poisoning.labels)
    known = ids[is_known]
    is_poisoned = poisoning.attack_of[known] >= 0

    images = np.zeros((len(ids), *poisoning.images.shape[1:]), np.uint8)
    clean = np.flatnonzero(is_known)[~is_poisoned]
    images[clean] = poisoning.images[ids[clean]]
    return {"images": images, "poisoned": poisoning.triggered(known[is_poisoned])}


@dataclass(frozen=True)
class _Pieces:
    """The ids that are decoded at a time: for each batch, of each device of this process, a piece after the other.

    Attributes:
      passes: of the training.
      size: ids of a piece, but for the last of a share.
      blocks: batch size -> the rows of each device.
      number: the pass to begin with.
      begins: of each pass from that on, where its pieces begin, and behind them the end; the first may be negative,
        where the pass is begun in its middle.
    """

    passes: Passes
    size: int
    blocks: dict[int, list[slice]]
    number: int
    begins: list[int]

    @classmethod
    def of(cls, passes: Passes, mesh: Mesh, size: int, number: int, start: int) -> "_Pieces":
        """Cuts the passes into pieces.

        Args:
          passes: of the training.
          mesh: the devices.
          size: ids of a piece, at most.
          number: the pass to begin with.
          start: the batch of it to begin with.
        """
        shapes = passes.shapes[number:]
        blocks = {batch_size: local_blocks(batch_size, mesh) for _, batch_size in shapes}
        begins = [0]
        for steps, batch_size in shapes:
            begins.append(begins[-1] + steps * _pieces_of(blocks[batch_size], size))

        skipped = start * _pieces_of(blocks[shapes[0][1]], size)
        return cls(passes, size, blocks, number, [begin - skipped for begin in begins])

    def __len__(self) -> int:
        return self.begins[-1]

    def __getitem__(self, number: int) -> Int[np.ndarray, "R"]:
        later = bisect.bisect_right(self.begins, number) - 1
        order = self.passes.order(self.number + later)
        blocks = self.blocks[order.shape[1]]

        step, rest = divmod(number - self.begins[later], _pieces_of(blocks, self.size))
        device, piece = divmod(rest, _pieces_of(blocks[:1], self.size))
        share = order[step, blocks[device]]
        return share[piece * self.size : (piece + 1) * self.size]


def _pieces_of(blocks: Sequence[slice], size: int) -> int:
    """Returns how many pieces shares of a batch are cut into, all of one size."""
    return len(blocks) * math.ceil((blocks[0].stop - blocks[0].start) / size)
