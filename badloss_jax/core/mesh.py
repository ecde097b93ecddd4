"""The mesh of all devices and the shardings on it: the one place that knows them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from badloss_jax.core.compiler import check_sums
from badloss_jax.core.errors import UsageError

AXIS = "data"
AnyMesh = Mesh | AbstractMesh  # of devices, or of no more than their number
_FEWEST_OF_A_PASS = 64  # images on each device


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a one-dimensional mesh over the given devices, by default all of all processes.

    Raises:
      UsageError: the devices are CPUs, on which this JAX computes wrongly.
    """
    if devices is None:
        devices = jax.devices()
    if devices[0].platform == "cpu":
        check_sums()
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def local_mesh(mesh: Mesh) -> Mesh:
    """Returns a mesh over the devices of this process among those of a mesh: what runs on it waits for no other one."""
    return Mesh(np.array(mesh.local_devices), (AXIS,), axis_types=(AxisType.Auto,))


def abstract_mesh(size: int) -> AbstractMesh:
    """Returns a mesh of so many devices that need not be there, for shapes alone."""
    return AbstractMesh((size,), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The sharding of parameters and of the resident data set: everything on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: AnyMesh) -> NamedSharding:
    """The sharding of batches, buffers and scores: the first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def by_columns(mesh: Mesh) -> NamedSharding:
    """The sharding of an epoch's order, [S, B]: every batch is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, AXIS))


def jit_on(function: Callable, mesh: Mesh, **how: Any) -> Callable:
    """As `jax.jit`, for a large program whose work is in products and convolutions, and which will run on the mesh.

    On CPUs LLVM stops at its first level, as the higher ones do not touch the libraries that do this work. With those,
    small ResNets and the search for clusters were as fast and gave the same bits, and took 1.2 (the search) to 6 times
    (the network's weights) as long to compile.

    Args:
      function: to be compiled; not within another one, where JAX takes no options (there, `inspect.unwrap` it).
      mesh: whose devices say what the compiler is told.
      how: `jax.jit`'s own arguments.

    Returns:
      The compiled function.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 1} if on_cpu else None, **how)


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Copies host arrays, the same in every process, to the devices.

    Args:
      tree: of NumPy arrays or numbers.
      sharding: of each of them.

    Returns:
      The tree, of arrays on the devices.
    """

    def copy(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(copy, tree)


def place_rows(shape: tuple[int, ...], mesh: Mesh, rows: Callable[[int, int], np.ndarray]) -> jax.Array:
    """Makes an array sharded by rows from what each process has of it.

    Args:
      shape: of the whole array; the devices divide its rows evenly.
      mesh: the devices.
      rows: (begin, end) -> these rows; is asked for what each device of this process holds.

    Returns:
      The array.
    """

    def held(index: tuple[slice, ...]) -> np.ndarray:
        begin, end, _ = index[0].indices(shape[0])
        return rows(begin, end)

    return jax.make_array_from_callback(shape, by_rows(mesh), held)  # type: ignore[arg-type]


def to_host(array: jax.Array) -> np.ndarray:
    """Copies an array to the host of every process, whole."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def local_rows(array: jax.Array, start: int, stop: int) -> np.ndarray:
    """Copies rows to the host that devices of this process hold.

    Args:
      array: sharded by rows.
      start: the first row.
      stop: the one after the last.

    Returns:
      The rows.
    """
    # Shards come in the order of the devices, which need not be that of the rows.
    shards = sorted((shard.index[0].indices(len(array))[0], shard.data) for shard in array.addressable_shards)
    parts = [np.asarray(data)[max(start - begin, 0) : max(stop - begin, 0)] for begin, data in shards]
    return np.concatenate(parts)


def local_blocks(count: int, mesh: Mesh) -> list[slice]:
    """Finds the rows that each device of this process holds of an array that is sharded by rows.

    Args:
      count: rows of the array, a multiple of the devices.
      mesh: the devices.

    Returns:
      A slice a device, in order.
    """
    indices = by_rows(mesh).addressable_devices_indices_map((count,)).values()
    bounds = sorted(index[0].indices(count)[:2] for index in indices if index)
    return [slice(start, stop) for start, stop in bounds]


def process_blocks(count: int, mesh: Mesh) -> list[tuple[int, int, int]]:
    """Finds the runs of rows that one process holds of an array sharded by rows.

    The array has `count` rows, rounded up to a multiple of the devices; the rows past `count` are in no run.

    Args:
      count: rows, padding left out.
      mesh: the devices.

    Returns:
      (start, stop, process) of each run, in order.
    """
    share = round_up(count, mesh) // mesh.size
    blocks: list[tuple[int, int, int]] = []
    for number, device in enumerate(mesh.devices.flat):
        # The last shares are shorter, or empty, where they are padding.
        start = min(number * share, count)
        stop = min((number + 1) * share, count)
        if blocks and blocks[-1][2] == device.process_index:
            begin, _, process = blocks[-1]
            blocks[-1] = (begin, stop, process)
        elif start < stop:
            blocks.append((start, stop, device.process_index))
    return blocks


def round_up(count: int, mesh: AnyMesh) -> int:
    """Rounds up to a multiple of the number of devices.

    Args:
      count: of rows.
      mesh: the devices.

    Returns:
      The smallest multiple that is at least `count`.
    """
    return -(-count // mesh.size) * mesh.size


def pass_batch_size(batch_size: int, mesh: AnyMesh) -> int:
    """Returns the batch of a pass that does not train, of all devices together, which grows with their number.

    Shared by hundreds of devices, what suits one would leave each with an image or two at a time.

    Args:
      batch_size: that is set.
      mesh: the devices.

    Returns:
      A multiple of the devices, at least `batch_size`, with 64 for each, or `batch_size` if that is less.
    """
    return round_up(max(batch_size, min(batch_size, _FEWEST_OF_A_PASS) * mesh.size), mesh)


def check_batch_size(key: str, batch_size: int, mesh: AnyMesh) -> None:
    """Checks that the devices can share a batch evenly.

    Args:
      key: of the setting, as the user writes it.
      batch_size: that it has.
      mesh: the devices.

    Raises:
      UsageError: they cannot; both numbers are named.
    """
    if batch_size % mesh.size:
        raise UsageError(
            f"{key} = {batch_size} is not divisible by the {mesh.size} devices: every device takes the same share"
            f" of a batch; {round_up(batch_size, mesh)} would do"
        )
