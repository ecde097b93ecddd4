"""The mesh of all devices and the shardings on it: the one place that knows them."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from badloss_jax.errors import UsageError

AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a one-dimensional mesh over the given devices, by default all of them."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters and of the resident data set: everything on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The sharding of batches, buffers and scores: the first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def round_up(count: int, mesh: Mesh) -> int:
    """Returns the smallest multiple of the number of devices that is at least `count`."""
    return -(-count // mesh.size) * mesh.size


def check_batch_size(key: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UsageError, naming both numbers, unless the devices can share a batch evenly."""
    if batch_size % mesh.size:
        raise UsageError(
            f"{key} = {batch_size} is not divisible by the {mesh.size} devices: every device takes the same share"
            f" of a batch; {round_up(batch_size, mesh)} would do"
        )
