"""What a program takes: counted in its trace, and read in what XLA made of it.

A trace gives operations and shapes, before anything is compiled. What is compiled says how much memory a device takes,
what is updated in place, what is copied, what devices send each other, and on TPUs how many cycles are expected.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.sharding import PartitionSpec

READING = 1  # another number where something else is read of what is compiled, or a chip is described in another way
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_CHOICE = "cond"  # also of what `jax.lax.platform_dependent` chooses from
_ROUNDS = 25  # of a loop whose number of rounds depends on the data, as the scorer's bisection has of losses

# A line of HLO: the name of a result, its type, and its operation, between a space and a parenthesis.
_OPERATION = re.compile(r"\s*(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z-]*)\((?:%([\w.-]+))?")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_ELSEWHERE = "S("  # in a layout: not in the device's main memory
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_LOOP = re.compile(r"condition=%([\w.-]+), body=%([\w.-]+)")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.-]+) \(")
_ALIAS = re.compile(r"(?:may|must)-alias")
_BITS = re.compile(r"\d+")


# --- shapes


def bytes_on_device(tree: Any, count: int) -> int:
    """Counts what a device holds of arrays that are sharded by rows, or replicated.

    Args:
      tree: of `jax.ShapeDtypeStruct` with shardings.
      count: of the devices.

    Returns:
      Bytes.
    """
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays_on_device(tree, count))


def arrays_on_device(tree: Any, count: int) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Lists what a device holds of arrays, each as (shape, dtype); arguments as of `bytes_on_device`."""
    arrays = []
    for leaf in jax.tree.leaves(tree):
        shape = tuple(leaf.shape)
        if leaf.sharding.spec != PartitionSpec():
            shape = (-(-shape[0] // count), *shape[1:])
        arrays.append((shape, np.dtype(leaf.dtype)))
    return arrays


# --- a trace


def count_flops(program: core.Jaxpr, platform: str) -> int:
    """Counts the multiplications and additions of a program's products and convolutions.

    Args:
      program: a jaxpr.
      platform: of JAX, where a program computes the same in different ways.

    Returns:
      Operations, of all devices together; loops count once for each of their rounds, if the trace says how many.
    """
    total = 0
    for equation in program.eqns:
        name = equation.primitive.name
        if name == "conv_general_dilated":
            total += _convolution_flops(equation)
        elif name == "dot_general":
            total += _product_flops(equation)
        rounds = equation.params["length"] if name == "scan" else 1
        total += rounds * sum(count_flops(inner, platform) for inner in _called(equation, platform))
    return total


def loop_rounds(program: core.Jaxpr) -> list[int]:
    """Lists how often each loop of a program goes round, those within other loops left out.

    Args:
      program: a jaxpr.

    Returns:
      A number a loop, in order; 25 where the data decides.
    """
    rounds: list[int] = []
    for equation in program.eqns:
        name = equation.primitive.name
        if name == "scan":
            rounds.append(equation.params["length"])
        elif name == "while":
            rounds.append(_ROUNDS)
        else:
            for inner in _called(equation, ""):
                rounds += loop_rounds(inner)
    return rounds


def _called(equation: core.JaxprEqn, platform: str) -> Iterator[core.Jaxpr]:
    """Yields the programs within an operation; of those to choose from by the platform, the one that is taken."""
    if equation.primitive.name == _CHOICE:
        choices = equation.params["branches"]
        platforms = equation.params.get("branches_platforms")
        if platforms is not None:
            choices = [next(c for c, names in zip(choices, platforms, strict=True) if not names or platform in names)]
        yield from (choice.jaxpr for choice in choices[:1])
        return

    for value in equation.params.values():
        inner = getattr(value, "jaxpr", value)
        if isinstance(inner, core.Jaxpr):
            yield inner


def _convolution_flops(equation: core.JaxprEqn) -> int:
    kernel = _shape(equation.invars[1])
    numbers = equation.params["dimension_numbers"].rhs_spec  # of outputs, of inputs, then of the window
    window = math.prod(kernel[number] for number in numbers[1:])

    # The zeros between dilated pixels are no work.
    return 2 * math.prod(_shape(equation.outvars[0])) * window // math.prod(equation.params["lhs_dilation"])


def _product_flops(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = _shape(equation.invars[0])
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(shape[number] for number in contracted)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


# --- what XLA made of it


@dataclass
class Compiled:
    """What a compiled program takes of each device.

    Attributes:
      arguments: bytes, what is given to it.
      outputs: bytes, what it returns.
      temporaries: bytes, what it needs beside.
      peak: bytes, the most at any time, arguments included.
      aliased: bytes of the outputs that lie where arguments were.
      updated: how many arrays do.
      flops: by the compiler's count; None where it gives none.
      accessed: bytes read and written, likewise.
      cycles: what the compiler of TPUs expects, not calibrated, waiting for others left out; None elsewhere.
      copies: how many copies there are of arrays as large as one of those that were to be looked for, and their bytes.
      moves: likewise, from the main memory to a faster one, or back.
      collectives: kind -> how many there are, and their bytes.
    """

    arguments: int
    outputs: int
    temporaries: int
    peak: int
    aliased: int
    updated: int
    flops: float | None = None
    accessed: float | None = None
    cycles: int | None = None
    copies: tuple[int, int] = (0, 0)
    moves: tuple[int, int] = (0, 0)
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_compiled(compiled: Any, watched: Sequence[tuple[tuple[int, ...], Any]], rounds: Sequence[int]) -> Compiled:
    """Reads what a compiled program takes.

    Args:
      compiled: as `jax.stages.Lowered.compile` returns it.
      watched: shape and dtype of the arrays on a device that copies are looked for of.
      rounds: of each loop, see `loop_rounds`.

    Returns:
      The figures.
    """
    memory = compiled.memory_analysis()
    temporaries = memory.temp_size_in_bytes
    listing = read_listing(compiled.as_text(), watched, rounds)
    costs: Mapping[str, float] = compiled.cost_analysis() or {}
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # That of CPUs leaves out what is temporary.
    peak = memory.peak_memory_in_bytes
    if peak < max(needed, temporaries):
        peak = needed + temporaries
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=temporaries,
        peak=peak,
        aliased=memory.alias_size_in_bytes,
        updated=listing.updated,
        flops=costs.get("flops"),
        accessed=costs.get("bytes accessed"),
        cycles=listing.cycles,
        copies=listing.copies,
        moves=listing.moves,
        collectives=listing.collectives,
    )


@dataclass
class Listing:
    """What the text of a compiled program says; attributes as of `Compiled`."""

    updated: int
    cycles: int | None
    copies: tuple[int, int]
    moves: tuple[int, int]
    collectives: dict[str, tuple[int, int]]


def read_listing(text: str, watched: Sequence[tuple[tuple[int, ...], Any]], rounds: Sequence[int]) -> Listing:
    """Reads the optimised HLO of a program; arguments as of `read_compiled`."""
    sizes = {math.prod(shape) for shape, _ in watched}
    elsewhere: set[str] = set()  # names of what is not in the main memory
    copies: list[int] = []
    moves: list[int] = []
    sent: dict[str, list[int]] = {}
    cycles: dict[str, int] = {}  # of each computation
    loops: list[tuple[str, str]] = []  # of the whole program's own computation
    computation = ""
    entry = ""

    for line in text.splitlines():
        begun = _COMPUTATION.match(line)
        if begun:
            computation = begun[2]
            if begun[1]:
                entry = computation
            continue

        expected = _CYCLES.search(line)
        if expected:
            cycles[computation] = cycles.get(computation, 0) + int(expected[1])

        operation = _OPERATION.match(line)
        if operation is None:
            continue
        name, result, kind, operand = operation.groups()
        if _ELSEWHERE in result:
            elsewhere.add(name)

        if kind == "while" and computation == entry:
            loops += _LOOP.findall(line)
        elif kind.removesuffix("-done") in COLLECTIVES:
            # What begins has its operands among its results; what is done has the results alone.
            size = sum(_size(*array[:2]) for array in _ARRAY.findall(result))
            sent.setdefault(kind.removesuffix("-done"), []).append(size)
        elif kind in ("copy", "copy-start") and "fused" not in computation:
            dtype, shape, layout = _ARRAY.findall(result)[0]
            if _count(shape) in sizes:
                source_is_elsewhere = operand in elsewhere
                where = moves if source_is_elsewhere != (_ELSEWHERE in layout) else copies
                where.append(_size(dtype, shape))

    header, _, _ = text.partition("\n")
    aliases = header.partition("input_output_alias={")[2].partition("entry_computation_layout")[0]
    return Listing(
        updated=len(_ALIAS.findall(aliases)),
        cycles=_all_cycles(cycles, entry, loops, rounds),
        copies=(len(copies), sum(copies)),
        moves=(len(moves), sum(moves)),
        collectives={kind: (len(sizes_of), sum(sizes_of)) for kind, sizes_of in sorted(sent.items())},
    )


def _all_cycles(
    cycles: Mapping[str, int], entry: str, loops: Sequence[tuple[str, str]], rounds: Sequence[int]
) -> int | None:
    """Adds up the cycles of a program, those of its loops for each round."""
    if not cycles:
        return None
    total = cycles.get(entry, 0)
    for number, (condition, body) in enumerate(loops):
        times = rounds[number] if number < len(rounds) else 1
        total += times * (cycles.get(condition, 0) + cycles.get(body, 0))
    return total


def _count(shape: str) -> int:
    return math.prod(int(size) for size in shape.split(",") if size)


def _size(dtype: str, shape: str) -> int:
    """Returns the bytes of an array, such as "bf16" and "128,64"; a predicate takes one each."""
    bits = _BITS.search(dtype)
    return _count(shape) * max(1, int(bits[0]) // 8 if bits else 1)
