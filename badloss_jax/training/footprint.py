"""What a compiled step takes of the memory, counted before it is compiled.

XLA says it exactly once a program is compiled, which takes seconds to minutes. Tracing has to be done anyhow, and the
program that it gives says what is needed at the least: what goes in, and what convolutions leave for the backward pass.
On CPUs that was 50 to 84 % of what XLA then took for the networks of `MODELS` in float32, in batches of 16 to 128 with
images of 32 to 224 pixels a side, and 48 to 56 % in bfloat16, of which XLA makes float32 there.
"""

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.sharding import Mesh

from badloss_jax.core.memory import check_device_memory, on_cpus
from badloss_jax.core.mesh import AnyMesh, by_rows, replicated
from badloss_jax.models import ModelSpec
from badloss_jax.training.batch import Batch
from badloss_jax.training.loop import Recipe
from badloss_jax.training.state import TrainState, shapes_of_state
from badloss_jax.training.step import make_sweep_step, make_train_step
from badloss_jax.trajectories.kinds import Kinds

_CONVOLUTION = "conv_general_dilated"
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")  # which stand for what they call
_TRANSPOSE = "transpose"  # the same numbers: either what goes in is kept, or what comes out
_CHOICE = "cond"  # also of what `jax.lax.platform_dependent` chooses from
_ADVICE = "take a smaller batch, smaller images (--config.data.image_size=PIXELS) or a smaller network, or more devices"


def check_train_step(
    key: str,
    spec: ModelSpec,
    recipe: Recipe,
    kinds: Kinds | None,
    mesh: Mesh,
    initial: TrainState | None = None,
    given: Any = None,
) -> None:
    """Refuses a training whose step cannot fit the devices.

    Args:
      key: of the setting that has the batch size, as the user writes it.
      spec: the network.
      recipe: how it is trained.
      kinds: that the step observes, as `make_train_step` takes them.
      mesh: the devices.
      initial: the state, where there is one already.
      given: what the objective asks for, which is there already.

    Raises:
      UsageError: it takes more than there is; both numbers are named.
    """
    state = initial
    needed = 0
    if state is None:
        state = shapes_of_state(spec, recipe.optimizer, mesh, recipe.objective)
        needed = _size_of(state)
    batch = shapes_of_batch(spec, recipe.batch_size, mesh)

    # With the shardings that arrays will have: then JAX finds this trace again, and nothing is traced twice.
    step: Any = make_train_step(spec, recipe.optimizer, recipe.objective, recipe.augment, kinds, mesh)
    traced = step.trace(state, batch, *constants_of(mesh), given)
    needed += _share(traced, batch, mesh)
    check_device_memory(needed, mesh, _described(key, recipe.batch_size, spec, "training step"), _ADVICE)


def check_sweep_step(key: str, spec: ModelSpec, recipe: Recipe, batch_size: int, kinds: Kinds, mesh: Mesh) -> None:
    """Refuses a sweep whose step cannot fit the devices.

    Args:
      key: of the setting that has the batch size, as the user writes it.
      spec: the network.
      recipe: how it is trained.
      batch_size: of the sweep.
      kinds: that it observes.
      mesh: the devices.

    Raises:
      UsageError: it takes more than there is; both numbers are named.
    """
    state = shapes_of_state(spec, recipe.optimizer, mesh, recipe.objective)
    batch = shapes_of_batch(spec, batch_size, mesh)
    step: Any = make_sweep_step(spec, kinds, mesh)
    traced = step.trace(state, batch)
    needed = _size_of(state) + _share(traced, batch, mesh)
    check_device_memory(needed, mesh, _described(key, batch_size, spec, "pass over the images"), _ADVICE)


def _described(key: str, batch_size: int, spec: ModelSpec, step: str) -> str:
    height, width, _ = spec.image_shape
    return f"{key} = {batch_size:,} with images of {height:,} x {width:,} pixels: a {step} of {spec.name}"


def shapes_of_batch(spec: ModelSpec, batch_size: int, mesh: AnyMesh) -> Any:
    """Returns the shapes, dtypes and shardings of a batch.

    Args:
      spec: the network, whose images they are.
      batch_size: B.
      mesh: the devices, which share the rows.

    Returns:
      A `Batch` of `jax.ShapeDtypeStruct`.
    """
    sharding = by_rows(mesh)

    def rows(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)

    return Batch(ids=rows(np.int32), images=rows(np.float32, *spec.image_shape), labels=rows(np.int32), real=rows(bool))


def constants_of(mesh: AnyMesh) -> tuple[Any, Any, Any]:
    """Returns the shapes of epoch, learning rate and seed, which every training step is given."""
    dtypes = (np.int32, np.float32, np.uint32)
    epoch, learning_rate, seed = (jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh)) for dtype in dtypes)
    return epoch, learning_rate, seed


def _size_of(tree: Any) -> int:
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _share(traced: Any, batch: Any, mesh: Mesh) -> int:
    """Returns what a device takes of a batch and of what is computed of it, in bytes."""
    taken = _size_of(batch)
    # On others XLA computes again what it finds no room for; they say themselves what they cannot do.
    if on_cpus(mesh):
        taken += kept_bytes(traced.jaxpr.jaxpr)
    return taken // mesh.size


# --- what a program keeps


@dataclass(eq=False)
class _Value:
    """What a program computes.

    Attributes:
      count: of its numbers.
      size: in bytes.
    """

    count: int
    size: int


@dataclass
class _Operation:
    """A step of a program: its name, what goes in and what comes out; arguments and constants are left out."""

    name: str
    inputs: list[_Value]
    outputs: list[_Value]


def kept_bytes(program: core.Jaxpr) -> int:
    """Counts what a program has to hold at once at the least, whatever the order of its operations.

    A convolution's images and its result are in memory: nothing is fused into it on CPUs. When one is done, everything
    is there that convolutions were given before and will be given again. Of what batch norm and the non-linearity look
    at again there is as much as the result of the convolution before them, of which they can be computed.

    Args:
      program: a jaxpr; its arguments are not counted.

    Returns:
      Bytes, of the convolution at which it is most, or nearly.
    """
    known: dict[Any, _Value] = {}
    operations = list(_inlined(program, known))
    graph = _Graph(_used(operations, _values(program.outvars, known)))
    if not graph.convolutions:
        return 0
    # By what is quickly counted: any is right.
    return graph.kept_at(max(graph.convolutions, key=graph.convolved_again_at))


class _Graph:
    """The operations of a program, and which of them wait for which."""

    def __init__(self, operations: Sequence[_Operation]):
        self.operations = operations
        self.convolutions = [number for number, operation in enumerate(operations) if operation.name == _CONVOLUTION]
        self._used_by: dict[_Value, list[int]] = {}  # numbers of operations
        self._before: list[int] = []  # of each operation a bit for every one that comes before it, and for itself
        self._before_convolved: dict[_Value, int] = {}  # likewise, that come before a convolution that is given it

        made_by: dict[_Value, int] = {}
        for number, operation in enumerate(operations):
            before = 0
            for value in operation.inputs:
                before |= self._before[made_by[value]]
                self._used_by.setdefault(value, []).append(number)
            if operation.name == _CONVOLUTION:
                for value in operation.inputs:
                    self._before_convolved[value] = self._before_convolved.get(value, 0) | before
            self._before.append(before | 1 << number)
            made_by |= dict.fromkeys(operation.outputs, number)

    def convolved_again_at(self, now: int) -> int:
        """Counts what convolutions were given before an operation is done, and will be given again, in bytes."""
        return sum(value.size for value in self._operands(now) if self._is_convolved_later(value, now))

    def kept_at(self, now: int) -> int:
        """Counts what is there when a convolution is done, in bytes."""
        operands = self._operands(now)
        here = {*self.operations[now].inputs, *self.operations[now].outputs}
        kept = sum(value.size for value in here)
        kept += sum(value.size for value in operands - here if self._is_convolved_later(value, now))

        done = [number for number in self.convolutions if self._is_done(number, now)]
        results = {value for number in done for value in self.operations[number].outputs}
        return kept + sum(self._size_looked_at_later(value, now, operands) for value in results - operands - here)

    def _operands(self, now: int) -> set[_Value]:
        """Returns what the convolutions were given that are done with an operation."""
        done = [number for number in self.convolutions if self._is_done(number, now)]
        return {value for number in done for value in self.operations[number].inputs}

    def _is_done(self, number: int, now: int) -> bool:
        return bool(self._before[now] >> number & 1)

    def _waits(self, number: int, now: int) -> bool:
        return number != now and bool(self._before[number] >> now & 1)

    def _is_convolved_later(self, value: _Value, now: int) -> bool:
        return bool(self._before_convolved.get(value, 0) >> now & 1)

    def _size_looked_at_later(self, result: _Value, now: int, operands: Set[_Value]) -> int:
        """Returns how much is kept of a result, as it is or as what follows of it element by element, in bytes."""
        size = 0
        family = [result]
        for value in family:
            for number in self._used_by.get(value, []):
                if self._waits(number, now):
                    size = max(size, min(value.size, result.size))
                else:
                    # It is done, and what comes of it is kept, or it can still be done with the value that is kept.
                    # What a convolution takes is counted already, and so is what follows of that.
                    alike = [other for other in self.operations[number].outputs if other.count == result.count]
                    family += [other for other in alike if other not in operands and other not in family]
        return size


def _inlined(program: core.Jaxpr, known: dict[Any, _Value]) -> Iterator[_Operation]:
    """Yields the operations of a program, and in place of a call those of what it calls.

    Args:
      program: a jaxpr.
      known: variable -> value; what the program computes is added.
    """
    for equation in program.eqns:
        called = _called(equation)
        inputs = _values(equation.invars, known)
        if called is not None:
            if equation.primitive.name == _CHOICE:
                inputs = inputs[1:]  # the first one says which
            inner = getattr(called, "jaxpr", called)
            within = {variable: value for variable, value in zip(inner.invars, inputs, strict=True) if value}
            yield from _inlined(inner, within)
            results = zip(equation.outvars, _values(inner.outvars, within), strict=True)
            known |= {variable: value for variable, value in results if value}
        elif equation.primitive.name == _TRANSPOSE:
            known |= {variable: value for variable, value in zip(equation.outvars, inputs, strict=True) if value}
        else:
            outputs = [_value_of(variable.aval) for variable in equation.outvars]
            known |= zip(equation.outvars, outputs, strict=True)
            yield _Operation(equation.primitive.name, [value for value in inputs if value], outputs)


def _called(equation: core.JaxprEqn) -> Any:
    """Returns the program that an operation stands for, on a CPU; None if it stands for itself."""
    if equation.primitive.name == _CHOICE:
        platforms = equation.params.get("branches_platforms")
        if platforms is None:
            return None
        return next(
            branch
            for branch, names in zip(equation.params["branches"], platforms, strict=True)
            if names is None or "cpu" in names
        )
    if equation.primitive.name in _CALLS:
        return equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return None


def _used(operations: Sequence[_Operation], results: Sequence[_Value | None]) -> list[_Operation]:
    """Leaves out what is computed for nothing, as the compiler does."""
    wanted = {*results}
    used = []
    for operation in reversed(operations):
        if not wanted.isdisjoint(operation.outputs):
            wanted.update(operation.inputs)
            used.append(operation)
    return used[::-1]


def _values(variables: Sequence[Any], known: dict[Any, _Value]) -> list[_Value | None]:
    """Returns what was computed for each variable; None for literals, arguments and constants."""
    return [None if isinstance(variable, core.Literal) else known.get(variable) for variable in variables]


def _value_of(aval: Any) -> _Value:
    return _Value(math.prod(aval.shape), _bytes(aval))


def _bytes(array: Any) -> int:
    """Returns the size of an array, of which only its shape and type need be known; keys count as nothing."""
    return math.prod(array.shape) * getattr(array.dtype, "itemsize", 0)
