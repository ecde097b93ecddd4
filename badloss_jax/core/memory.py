"""How much memory is there, the refusal of what cannot fit, and keeping what is used again and again.

JAX says of a GPU or TPU that its memory is exhausted. Of a CPU nobody does: the kernel ends the process without a word.
So what can be counted before is compared with what is free, and refused with both numbers. A count is of what is needed
at the least: nothing is refused that would fit.
"""

import ctypes
import gc
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from badloss_jax.core.errors import BadlossError, DataError, UsageError

_ALIGNMENT = 64  # bytes; an array that begins at a multiple of it a CPU takes as it is, without a copy
# Of glibc's malloc.h: one arena, nothing mapped by itself, nothing trimmed, and 64 MiB asked for at a time.
_KEEPING = {-8: 1, -4: 0, -1: 2**31 - 1, -2: 64 * 2**20}
_PLUGINS = ("jax_plugins", "libtpu")  # modules that JAX asks for other devices
_EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory")


def gib(count: int) -> str:
    """Returns a number of bytes as a message says it."""
    return f"{count / 2**30:,.2f} GiB"


# --- what is there


def free_on_host(root: Path = Path("/")) -> int:
    """Counts the memory that this process can still take: the machine's, or its control group's if that has less.

    What swaps or caches files can be had, too, and is counted.

    Args:
      root: where /proc and /sys are.

    Returns:
      Bytes; all memory, used or not, where the system does not say more.
    """
    try:
        meminfo = _table(root / "proc/meminfo")
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    free = 1024 * meminfo["MemAvailable"]
    # Swap for all that a group may not have any: to refuse what would fit were worse.
    return min([free, *_rooms_of_groups(root)]) + 1024 * meminfo.get("SwapFree", 0)


def _rooms_of_groups(root: Path) -> Iterator[int]:
    """Yields the bytes that are left of each limit, of this process's control group and of those that it is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return

    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names: tuple[str, ...]
        if not controllers:
            home = mounted
            names = ("memory.max", "memory.current", "inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            home = mounted / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
        else:
            continue

        # Within a container the path is the host's, of which only the end, or nothing, is mounted.
        group = Path(path.lstrip("/"))
        for folder in (home / group, *(home / parent for parent in group.parents)):
            room = _room(folder, *names)
            if room is not None:
                yield room


def _room(folder: Path, limit: str, usage: str, *files: str) -> int | None:
    """Returns what is left of a group's limit; None if it has none, or there is no such group."""
    try:
        allowed = int((folder / limit).read_text())  # "max" is no number
        used = int((folder / usage).read_text())
        table = _table(folder / "memory.stat")
    except (OSError, ValueError):
        return None

    # Files that are only kept in case they are read again make way.
    return max(0, allowed - used + sum(table.get(name, 0) for name in files))


def _table(path: Path) -> dict[str, int]:
    """Reads lines of a name and a number."""
    rows = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def free_on_devices(mesh: Mesh) -> int | None:
    """Counts the bytes that each device of this process can still take; devices that are CPUs share the host's.

    Args:
      mesh: the devices.

    Returns:
      Bytes of the device that has the fewest; None where the devices do not say.
    """
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if on_cpus(mesh):
        return free_on_host() // len(devices)

    rooms = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        rooms.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return min(rooms)


# --- what cannot fit


def check_host_memory(needed: int, what: str, advice: str) -> None:
    """Refuses what takes more memory than this process can have.

    Args:
      needed: bytes, beside what is in use.
      what: takes them, in the plural, for the message.
      advice: what to do.

    Raises:
      DataError: there is less; both numbers are named.
    """
    if needed <= free_on_host():
        return

    _give_back()
    free = free_on_host()
    if needed > free:
        raise DataError(
            f"{what} take {needed:,} bytes, and the machine has {free:,} free ({gib(needed)} and {gib(free)}): {advice}"
        )


def check_device_memory(needed: int, mesh: Mesh, what: str, advice: str) -> None:
    """Refuses what takes more memory than the devices have.

    Args:
      needed: bytes on each device, beside what is in use.
      mesh: the devices.
      what: takes them, in the singular, for the message.
      advice: what to do.

    Raises:
      UsageError: a device has less; both numbers are named, of CPUs those of all that share the machine.
    """
    free = free_on_devices(mesh)
    if free is None or needed <= free:
        return

    _give_back()
    free = free_on_devices(mesh)
    if free is None or needed <= free:
        return

    if not on_cpus(mesh):
        raise UsageError(f"{what} takes at least {gib(needed)} on each device, and one has {gib(free)} free: {advice}")

    count = mesh.local_mesh.size
    shared = ""
    if count > 1:
        shared = f" on {count} CPU devices"
    raise UsageError(
        f"{what} takes at least {gib(count * needed)}{shared}, and the machine has {gib(count * free)} free: {advice}"
    )


def on_cpus(mesh: Mesh) -> bool:
    """Whether the devices are CPUs, which share the memory of their host."""
    return mesh.devices.flat[0].platform == "cpu"


def placed_bytes(array: np.ndarray, mesh: Mesh) -> int:
    """Counts what each device takes of its own when an array is copied to all of them; see `mesh.replicated`."""
    if on_cpus(mesh) and array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0:
        return 0
    return array.nbytes


def _give_back() -> None:
    """Gives the system what nothing in this process uses any more, which else would count as taken."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim:
        trim(0)


# --- what is kept


def keep_memory() -> None:
    """Lets a process that trains on CPUs keep the memory that it frees, as every step asks for it again.

    XLA takes what a program needs from the system, and gives it back when the program is done: of a step of ResNet-18
    with 128 images 80,000 pages, which took a sixth of its time. To be called before JAX begins any thread: only the
    main thread's memory can be kept whatever its size. Where JAX may find other devices, or the C library is not glibc,
    all stays as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not _has_only_cpus():
        return
    for parameter, value in _KEEPING.items():
        mallopt(parameter, value)


def _has_only_cpus() -> bool:
    """Whether JAX can compute on nothing else, told without asking it, which would begin its threads."""
    platforms = jax.config.values["jax_platforms"]
    if platforms:
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in _PLUGINS)


def explained(error: Exception) -> BadlossError | None:
    """Says what to do about memory that was exhausted in the middle of the work.

    Args:
      error: that ended the work.

    Returns:
      The error to show in its place; None if it is of something else.
    """
    message = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not _EXHAUSTED.search(message):
        return None

    free = free_on_host()
    where = "the machine"
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if not isinstance(error, MemoryError) and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        where = f"a {device.platform} device"
    return UsageError(
        f"out of memory: {message[:200].rstrip('.')}; {where} has {gib(free)} free. Smaller"
        " --config.recording.batch_size, --config.retraining.batch_size, --config.evaluation.batch_size or"
        " --config.data.image_size take less, and so does --config.data.input=streamed"
    )
