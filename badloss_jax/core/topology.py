"""Machines that need not be there: what their chips have, by their makers' pages, and what compiles for them.

The compilers of TPUs and GPUs need no device, but the environment has to be set before JAX starts: first `prepare`,
then `compiler_devices`. Nothing here imports JAX before it is asked for devices.
"""

import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from badloss_jax.core.errors import UsageError, listed, nearest

if TYPE_CHECKING:
    import jax

LOCAL = "local"
_EXAMPLES = "v5e:2x4, v5e:16x16, v5p:4x4x4, v6e:8x8, h100:1x8 (NODESxGPUS), local"
_SHAPE = re.compile(r"[1-9]\d*(x[1-9]\d*)+")

# What libtpu asks of a TPU's host, where there is none.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# What XLA asks of a GPU, where there is none: figures of NVIDIA's H100 white paper and CUDA's programming guide.
_H100 = """\
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3350000000000
  device_memory_size: 80000000000
  clock_rate_ghz: 1.98
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Chip:
    """What a chip has at the most; figures are its maker's.

    Attributes:
      name: as people call it.
      platform: of JAX.
      memory: bytes.
      flops: dtype of the computation -> operations a second of its matrix units. Of float32 those that JAX lets it
        multiply with by default: bfloat16 on a TPU, TF32 on a GPU.
      bandwidth: of the memory, bytes a second.
      links: bytes a second that it sends to chips of its pod or node.
      network: likewise to those of other nodes; None where a pod is all there is.
      clock: cycles a second, where it follows from its peak and the size of its matrix units.
      axes: how many sizes a topology of it has.
      unit: that each size is a multiple of.
      source: of the figures.
    """

    name: str
    platform: str
    memory: int
    flops: Mapping[str, float]
    bandwidth: float
    links: float
    axes: int
    source: str
    network: float | None = None
    clock: float | None = None
    unit: tuple[int, ...] = field(default=())


def _tpu(
    memory: int, flops: float, bandwidth: float, links: float, axes: int, page: str, **more: Any
) -> dict[str, Any]:
    unit = (2, 2, 1)[:axes]
    return {
        "platform": "tpu",
        "memory": memory,
        "flops": {"bfloat16": flops, "float32": flops},
        "bandwidth": bandwidth,
        "links": links,
        "axes": axes,
        "source": f"https://cloud.google.com/tpu/docs/{page}",
        "unit": unit,
    } | more


CHIPS = {
    "v4": Chip("TPU v4", **_tpu(32 * 2**30, 275e12, 1.2e12, 0.3e12, 3, "v4", clock=1.05e9)),
    "v5e": Chip("TPU v5e", **_tpu(16 * 10**9, 197e12, 0.819e12, 0.2e12, 2, "v5e", clock=1.5e9)),
    "v5p": Chip("TPU v5p", **_tpu(95 * 10**9, 459e12, 2.765e12, 0.6e12, 3, "v5p", clock=1.75e9)),
    "v6e": Chip("TPU v6e", **_tpu(32 * 10**9, 918e12, 1.638e12, 0.4e12, 2, "v6e")),
    # Dense, without sparsity. Of a node with a network adapter of 400 Gb/s for each GPU, as in DGX H100.
    "h100": Chip(
        name="H100 SXM",
        platform="gpu",
        memory=80 * 10**9,
        flops={"bfloat16": 989e12, "float32": 494e12, "float64": 67e12},
        bandwidth=3.35e12,
        links=0.45e12,
        network=0.05e12,
        axes=2,
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
}

# How JAX calls them, or begins to.
_KINDS = (
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5e", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6", "v6e"),
    ("NVIDIA H100 80GB HBM3", "h100"),
)


@dataclass(frozen=True)
class Topology:
    """Chips, and how they are connected.

    Attributes:
      name: as the user writes it.
      chip: what each is; None of a machine that is here, where it is no one of `CHIPS`.
      size: how many chips there are.
      hosts: that they are spread over.
      memory: bytes of each.
      kind: what JAX calls a device that is here.
    """

    name: str
    chip: Chip | None
    size: int
    hosts: int
    memory: int
    kind: str = ""

    @property
    def is_local(self) -> bool:
        """Whether it is the machine that this process runs on."""
        return self.name == LOCAL

    def describe(self) -> str:
        """Says in a few words what it is."""
        what = self.chip.name if self.chip else self.kind
        hosts = "1 host" if self.hosts == 1 else f"{self.hosts} hosts"
        return f"{self.size} x {what} in {hosts}"

    def facts(self) -> dict[str, Any]:
        """Returns what a plan says of it, JSON-able."""
        facts: dict[str, Any] = {
            "name": self.name,
            "description": self.describe(),
            "devices": self.size,
            "hosts": self.hosts,
            "memory": self.memory,
        }
        if self.chip:
            facts |= {key: getattr(self.chip, key) for key in ("bandwidth", "links", "network", "source")}
            facts["flops"] = dict(self.chip.flops)
        return facts

    def reduction_seconds(self, size: int) -> float:
        """Computes how long it takes at the least to add up an array over all chips, and give each the sum.

        Every chip sends 2 (n - 1) / n of it over all its links at once; of GPUs each node does so first, and each GPU
        then sends its part of the node's sum over the network. Nothing is said of latency.

        Args:
          size: of the array, in bytes.
        """
        return 2 * self.gathering_seconds(size)

    def gathering_seconds(self, size: int) -> float:
        """Computes how long it takes at the least to give each chip the whole of an array that they share.

        Args:
          size: of the whole array, in bytes.
        """
        if self.chip is None or self.size == 1:
            return 0.0
        if self.chip.network is None:
            return (self.size - 1) / self.size * size / self.chip.links

        within = self.size // self.hosts
        seconds = (within - 1) / within * size / self.chip.links
        if self.hosts > 1:
            seconds = max(seconds, (self.hosts - 1) / self.hosts * size / within / self.chip.network)
        return seconds


def parse(text: str) -> Topology:
    """Returns the topology of a name.

    Args:
      text: such as "v5e:16x16", or "h100:8x8": nodes, and GPUs of each.

    Returns:
      The topology.

    Raises:
      UsageError: there is none of this name.

    Example:
      >>> from badloss_jax.core.topology import parse
      >>> parse("v5e:16x16").describe()
      '256 x TPU v5e in 64 hosts'
    """
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        raise UsageError(
            f"--topology {text}: expected one of {listed([*CHIPS, LOCAL])} and, but for the last, how many chips there"
            f" are, such as {_EXAMPLES}{nearest(kind, [*CHIPS, LOCAL])}"
        )

    chip = CHIPS[kind]
    sizes = [int(size) for size in shape.split("x")] if _SHAPE.fullmatch(shape) else []
    divisible = all(size % unit == 0 for size, unit in zip(sizes, chip.unit, strict=False))
    alone = chip.axes == 2 and sizes == [1, 1]
    if len(sizes) != chip.axes or not (divisible or alone):
        expected = "NODESxGPUS"
        if chip.unit:
            expected = f"{chip.axes} sizes, of which the first two are even{', or 1x1' if chip.axes == 2 else ''}"
        raise UsageError(f"--topology {text}: expected {kind}: and {expected}, such as {_EXAMPLES}")

    size = math.prod(sizes)
    hosts = max(1, size // math.prod(chip.unit)) if chip.unit else sizes[0]
    return Topology(text, chip, size, hosts, chip.memory)


def local_topology(devices: Sequence["jax.Device"], memory: int) -> Topology:
    """Returns the topology of devices that are there.

    Args:
      devices: all of them.
      memory: bytes that each has free; 0 if they do not say.
    """
    kind = devices[0].device_kind
    chip = next((CHIPS[name] for beginning, name in _KINDS if kind.startswith(beginning)), None)
    hosts = len({device.process_index for device in devices})
    return Topology(LOCAL, chip, len(devices), hosts, memory or (chip.memory if chip else 0), kind)


def prepare(topology: Topology | None) -> None:
    """Sets the environment to compile for chips that are not there; to be called before JAX is imported.

    Args:
      topology: to compile for; None, the machine's own devices, changes nothing.
    """
    if topology is not None:
        os.environ.update(_WITHOUT_TPU, JAX_PLATFORMS="cpu")


def why_not_compiled(topology: Topology) -> str:
    """Says why nothing can be compiled for a topology here; "" if it can."""
    assert topology.chip is not None
    if topology.chip is CHIPS["v4"]:
        return "the compiler takes each core of a TPU v4 for a device of its own, as JAX does not"
    if topology.chip.platform == "tpu" and not importlib.util.find_spec("libtpu"):
        return "libtpu is not installed (the extra 'tpu' brings it)"
    if topology.chip.platform == "gpu" and not _cuda_plugin():
        return "jax-cuda13-plugin and jax-cuda13-pjrt are not installed (the extra 'cuda' brings them)"
    return ""


def compiler_devices(topology: Topology) -> Sequence["jax.Device"]:
    """Returns the devices to compile for, on which nothing can run.

    Args:
      topology: for which `why_not_compiled` says nothing.

    Raises:
      UsageError: the compiler knows no such topology.
    """
    import jax
    from jax.experimental import topologies

    assert topology.chip is not None
    _, _, shape = topology.name.partition(":")
    try:
        if topology.chip.platform == "tpu":
            # A chip alone has a host of its own; in larger slices it shares one.
            alone = {"chips_per_host_bounds": [1, 1, 1]} if topology.size == 1 else {}
            return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **alone).devices

        name = "1x" + shape  # slices, nodes, GPUs
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=_H100, topology=name
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"--topology {topology.name}: {error}; one that exists is such as {_EXAMPLES}") from error


def _cuda_plugin() -> bool:
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    except ModuleNotFoundError:
        return False
