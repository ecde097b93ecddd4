"""Batches of somebody else's training loop: taken from JAX, NumPy or PyTorch, checked, and written into the buffer.

A batch is a dict of losses [B], example_ids [B] and, as the kinds need it, logits [B, K], labels [B], features [B, F].
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from badloss_jax.core.errors import UsageError
from badloss_jax.core.mesh import by_rows, replicated
from badloss_jax.trajectories.buffer import Buffer, write_epoch
from badloss_jax.trajectories.kinds import Kinds

Batch = dict[str, Any]
_NAMED = 10  # ids in a message


def named(ids: Int[np.ndarray, "M"]) -> str:
    """Returns the first ids for a message."""
    text = ", ".join(map(str, ids[:_NAMED]))
    if len(ids) > _NAMED:
        text += ", ..."
    return text


def reals(value: Any) -> jax.Array | np.ndarray:
    """Takes an array of JAX, NumPy or PyTorch, or a list; by DLPack, and so without a copy, where the devices allow it.

    Else, as with strides, it is copied through the host, as float32. PyTorch is not imported. Gradients do not flow
    back into it.
    """
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        return np.asarray(value)

    tensor = value.detach() if hasattr(value, "detach") else value
    try:
        return jnp.from_dlpack(tensor)
    except (BufferError, RuntimeError, TypeError, ValueError, NotImplementedError):
        # With strides, or on a device that this JAX does not know.
        if hasattr(tensor, "cpu"):
            return tensor.cpu().float().numpy()  # NumPy knows no bfloat16, hence float32
        return np.asarray(tensor)


def integers(name: str, value: Any, count: int) -> Int[np.ndarray, "M"]:
    """Takes integers of 0 to count - 1, in any framework's array, to the host; DLPack to JAX would cut off 64-bit ones.

    Args:
      name: of what they are, for messages.
      value: an array of JAX, NumPy or PyTorch, or a list.
      count: one more than the largest that is allowed.

    Returns:
      int32 [M].

    Raises:
      UsageError: they are no integers, not one-dimensional or out of range.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)

    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"{name} are {array.dtype} {array.shape}: expected integers in one dimension")
    outside = array[(array < 0) | (array >= count)]
    if len(outside):
        raise UsageError(f"{len(outside)} of the {name} are not in 0 to {count - 1}: {named(outside)}")
    return array.astype(np.int32)


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Takes one integer, of any framework.

    Args:
      name: of what it is, for the message.
      value: whatever Python can use as an index.
      least, most: the range; without `most` it has no upper end.

    Returns:
      A Python integer.

    Raises:
      UsageError: it is none, or out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1  # out of range

    if number < least or (most is not None and number > most):
        upwards = f"{least} on" if most is None else f"{least} to {most}"
        raise UsageError(f"{name} = {value!r}: expected an integer from {upwards}")
    return number


def take(given: Mapping[str, Any], num_examples: int, kinds: Kinds) -> Batch:
    """Takes a batch of any framework's arrays or lists; what is None was not given.

    Args:
      given: losses, example_ids and what else the kinds need, or None.
      num_examples: N.
      kinds: what is recorded.

    Returns:
      The batch, checked; ids and labels are on the host.

    Raises:
      UsageError: shapes, dtypes or values that do not fit, or something is missing.
    """
    # On the host, as their values are looked at, and devices would cut 64 bits off.
    bounds = {"example_ids": num_examples, "labels": kinds.num_classes or 2**31}
    batch: Batch = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in bounds:
            batch[name] = integers(name, value, bounds[name])
        else:
            batch[name] = reals(value)

    check(batch, kinds)
    return batch


def check(batch: Mapping[str, Any], kinds: Kinds) -> None:
    """Checks that a batch has what the kinds need, in the right shapes; inside jit, too.

    Args:
      batch: of arrays.
      kinds: what is recorded.

    Raises:
      UsageError: something is missing, too much, of another shape or no number.
    """
    shape = batch["losses"].shape
    if len(shape) != 1:
        raise UsageError(
            f"losses are {shape}: expected [B], the loss of each example before any mean; in PyTorch, reduction='none'"
        )

    expected = {"losses": shape, "example_ids": shape}
    if kinds.num_classes:
        expected |= {"logits": (*shape, kinds.num_classes), "labels": shape}
    if kinds.num_features:
        expected |= {"features": (*shape, kinds.num_features)}

    # What is too much is an error, too: a loop that gives logits expects them to be recorded.
    for name in {**expected, **batch}:
        if name not in batch or name not in expected:
            problem = "are missing" if name in expected else "were given"
            raise UsageError(
                f"{name} {problem}: num_classes = {kinds.num_classes or None} and num_features ="
                f" {kinds.num_features or None} ask for {', '.join(expected)} in every batch"
            )
        _check_array(name, batch[name], expected[name])


def _check_array(name: str, value: Any, shape: tuple[int, ...]) -> None:
    is_integer = jnp.issubdtype(value.dtype, jnp.integer)
    if name in ("example_ids", "labels"):
        numbers = "integers"
        right = is_integer
    else:
        numbers = "floats"
        right = is_integer or jnp.issubdtype(value.dtype, jnp.floating)

    if value.shape != shape or not right:
        raise UsageError(f"{name} are {value.dtype} {value.shape}: expected {numbers} {shape}")


def write_batch(buffer: Buffer, batch: Batch, epoch: Int[Array, ""], kinds: Kinds) -> Buffer:
    """Writes a batch into a column, for use inside jit; what is out of range is dropped.

    "loss" is the loop's own; of the other kinds, `Kinds.observe` says what they are.

    Args:
      buffer: kind -> [N', T, ...].
      batch: checked; nothing of it need be finite.
      epoch: the column.
      kinds: what is recorded.

    Returns:
      The buffer.
    """
    ids = batch["example_ids"].astype(jnp.int32)
    singles = {name: array.astype(jnp.float32) for name, array in batch.items()}

    values = {"loss": singles["losses"]}
    if kinds.names:
        nothing = jnp.zeros((len(ids), 1))  # stands for logits that no kind needs
        labels = batch["labels"].astype(jnp.int32) if "labels" in batch else jnp.zeros_like(ids)
        others = replace(kinds, observed=kinds.names)
        values |= others.observe(singles.get("logits", nothing), singles.get("features", nothing), labels)

    # Negative indices would count from the end.
    ids = jnp.where((ids < 0) | (epoch < 0), len(buffer["loss"]), ids)
    return write_epoch(buffer, ids, epoch, values)


@lru_cache(maxsize=32)
def make_update(kinds: Kinds, mesh: Mesh) -> Callable:
    """Compiles (buffer, batch, epoch) -> (buffer, finite): writes the batch, or nothing if a value is not finite.

    The buffer is donated. `finite` has for each of losses, logits and features bool [B].

    Args:
      kinds: what is recorded.
      mesh: the devices, which share the buffer.

    Returns:
      The jitted update, the same one for equal arguments.
    """

    def update(buffer: Buffer, batch: Batch, epoch: Int[Array, ""]) -> tuple[Buffer, dict[str, Array]]:
        finite: dict[str, Array] = {
            name: jnp.isfinite(batch[name].astype(jnp.float32)).reshape(len(batch[name]), -1).all(axis=1)
            for name in ("losses", "logits", "features")
            if name in batch
        }

        # Ids past the end are dropped.
        all_finite = jnp.stack(list(finite.values())).all()
        ids = jnp.where(all_finite, batch["example_ids"], len(buffer["loss"]))
        return write_batch(buffer, batch | {"example_ids": ids}, epoch, kinds), finite

    return jax.jit(update, donate_argnums=0, out_shardings=(by_rows(mesh), replicated(mesh)))


def padded(batch: Batch, padding_id: int) -> Batch:
    """Fills a batch up to the next power of two, so that batches of all sizes compile a few programs; on the host.

    The padding, and all but the last of an id that is there twice, get `padding_id`, which is dropped.

    Args:
      batch: as `take` returns it.
      padding_id: an id past the end of the buffer.

    Returns:
      A batch of 1, 2, 4, ... rows.
    """
    ids = batch["example_ids"]
    size = 1 << max(0, len(ids) - 1).bit_length()

    _, first_from_the_end = np.unique(ids[::-1], return_index=True)
    last = len(ids) - 1 - first_from_the_end
    kept = np.full(size, padding_id, np.int32)
    kept[last] = ids[last]

    def fill(array: Any) -> Any:
        if len(array) == size:
            return array  # stays on its device

        array = np.asarray(array)
        rest = np.zeros((size - len(array), *array.shape[1:]), array.dtype)
        return np.concatenate([array, rest])

    return {name: fill(array) for name, array in batch.items()} | {"example_ids": kept}
