"""What the programs of a run take: traced, compiled where that can be, and timed where they can run."""

import json
import math
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from badloss_jax.core.errors import DataError
from badloss_jax.core.files import read_json, write_text
from badloss_jax.core.hashing import digest
from badloss_jax.core.program import (
    READING,
    Compiled,
    arrays_on_device,
    bytes_on_device,
    count_flops,
    loop_rounds,
    read_compiled,
)
from badloss_jax.core.progress import Progress
from badloss_jax.runs.programs import Machine, Program
from badloss_jax.training.footprint import kept_bytes

_LONGEST = 300  # characters of what a compiler says
_FEWEST_BYTES = 2**16  # of an array whose copies count
# What is needed and what there is, in the two ways in which XLA says it.
_USED = re.compile(r"(?:Used |\()([\d.]+)([KMG])\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMG])")


@dataclass(frozen=True)
class Taken:
    """What a program takes.

    Attributes:
      program: which.
      flops: products' and convolutions' operations on each device, by the trace.
      arguments: bytes on each device, by arithmetic.
      temporaries: likewise, at the least.
      compiled: what XLA says; None if it was not asked, or refused.
      refused: what it says of memory that does not suffice; "" if it does.
      wanted: bytes on each device that it would need, as far as it says so; else 0.
    """

    program: Program
    flops: float
    arguments: int
    temporaries: int
    compiled: Compiled | None = None
    refused: str = ""
    wanted: int = 0

    @property
    def in_place(self) -> bool | None:
        """Whether all that is to be updated in place is; None where nothing is to be, or nobody knows."""
        if self.compiled is None or self.program.updated is None:
            return None
        return self.compiled.updated >= len(jax.tree.leaves(self.program.updated))


def take(program: Program, machine: Machine, progress: Progress, kept: Path | None = None) -> Taken:
    """Traces a program, and compiles it where that can be.

    Args:
      program: which.
      machine: that it is for.
      progress: is told what takes minutes.
      kept: folder of what was read of programs that were compiled before; None keeps nothing.

    Returns:
      What it takes.
    """
    arguments = program.arguments
    if machine.why_not:
        # A device that is here is traced for: it knows nothing of the machine's sharding.
        arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    traced = program.function.trace(*arguments)

    size = machine.topology.size
    temporaries = program.temporaries
    if program.keeps:
        temporaries = kept_bytes(traced.jaxpr.jaxpr) // size
    taken = Taken(
        program=program,
        flops=count_flops(traced.jaxpr.jaxpr, machine.platform) / size,
        arguments=bytes_on_device(program.arguments, size),
        temporaries=temporaries,
    )
    if machine.why_not:
        return taken

    try:
        return replace(taken, compiled=_compiled(program, traced, machine, progress, kept))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused, wanted = _room(str(error))
        return replace(taken, refused=refused, wanted=wanted)


def _compiled(program: Program, traced: Any, machine: Machine, progress: Progress, kept: Path | None) -> Compiled:
    """Compiles a traced program, or takes what was read of it before; arguments as of `take`."""
    watched = []
    if program.updated is not None:
        arrays = arrays_on_device(program.updated, machine.topology.size)
        watched = [(shape, dtype) for shape, dtype in arrays if math.prod(shape) * dtype.itemsize >= _FEWEST_BYTES]
    rounds = loop_rounds(traced.jaxpr.jaxpr)
    lowered = traced.lower()

    # What is compiled depends on nothing else, so another plan with the same step has its figures at once.
    file = None
    if kept and not machine.topology.is_local:
        name = digest(lowered.as_text(), machine.topology.name, _compilers(), str(watched), rounds)
        file = kept / f"{name}.json"
        # One that is damaged is as good as none.
        with suppress(FileNotFoundError, DataError, TypeError):
            return Compiled(**read_json(file))

    with progress.waiting(f"compiling the {program.name}"):
        compiled = lowered.compile()
    figures = read_compiled(compiled, watched, rounds)
    if file:
        # Where nothing can be kept, the plan is still what it is.
        with suppress(DataError):
            write_text(file, json.dumps(asdict(figures)))
    return figures


def _compilers() -> list[str]:
    """Names what figures depend on beside the program: the versions of the compilers, and how they are read."""
    versions = []
    for package in ("jaxlib", "libtpu", "jax-cuda13-pjrt"):
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    return [*versions, f"reading {READING}"]


def _room(message: str) -> tuple[str, int]:
    """Returns what a compiler says of the memory that it would need, and the bytes; 0 if it does not say how many."""
    numbers = _USED.search(message)
    if numbers:
        wanted = float(numbers[1]) * 1024 ** (1 + "KMG".index(numbers[2]))
        return f"{numbers[1]} {numbers[2]}iB of {numbers[3]} {numbers[4]}iB", int(wanted)
    return " ".join(message.split())[:_LONGEST], 0


def seconds_of_call(program: Program, steps: int) -> float:
    """Runs a program a few times on zeros, once it is compiled; returns the seconds of one call."""

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)

    first, *others = jax.tree.map(filled, program.arguments)
    started = 0.0
    for step in range(steps + 1):
        # The first call compiles.
        if step == 1:
            started = time.perf_counter()
        result = program.function(first, *others)
        jax.block_until_ready(result)
        if program.updated is not None:
            first = result[0] if isinstance(result, tuple) else result
    return (time.perf_counter() - started) / steps
