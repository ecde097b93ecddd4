"""The values of a recorder on the host: shapes, values that are no numbers, cells that were not recorded."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from badloss_jax.core.errors import NonFiniteLossError
from badloss_jax.core.mesh import by_rows, round_up
from badloss_jax.trajectories.batches import named
from badloss_jax.trajectories.buffer import Buffer


def shapes_of(buffer: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns kind -> (shape, dtype)."""
    return {kind: (array.shape, array.dtype.name) for kind, array in buffer.items()}


def check_finite(finite: Mapping[str, Any], ids: Int[np.ndarray, "B"], epoch: int) -> None:
    """Checks that a batch was recorded, which it is not if a value of it is not finite.

    Args:
      finite: "losses", "logits" or "features" -> bool [B'], B' at least B for the padding.
      ids: integers [B].
      epoch: of the batch, for the message.

    Raises:
      NonFiniteLossError: a value is NaN or infinite (epoch and ids are named).
    """
    for name, is_finite in finite.items():
        bad = ids[~np.asarray(is_finite)[: len(ids)]]
        if len(bad):
            raise NonFiniteLossError(
                f"epoch {epoch}: the {name} of {len(bad)} examples are NaN or infinite, ids {named(bad)}; nothing of"
                " this batch was recorded. A smaller learning rate usually helps"
            )


def fill_missing(merged: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]) -> None:
    """Takes cells that were not recorded from another recorder; a cell without a loss was not.

    Args:
      merged: kind -> [N, T, ...]; is changed.
      values: of the other, likewise.
    """
    missing = ~np.isfinite(merged["loss"])
    for kind, array in merged.items():
        array[missing] = values[kind][missing]


def on_devices(values: Mapping[str, np.ndarray], mesh: Mesh) -> Buffer:
    """Returns a buffer that holds these values.

    Args:
      values: kind -> [N, T, ...].
      mesh: the devices, which share the rows.

    Returns:
      kind -> [N', T, ...]; N' is N rounded up to a multiple of the devices.
    """
    rows = {}
    for kind, array in values.items():
        padding = round_up(len(array), mesh) - len(array)
        empty = np.full((padding, *array.shape[1:]), np.nan, array.dtype)
        rows[kind] = np.concatenate([array, empty])
    return jax.device_put(rows, by_rows(mesh))
