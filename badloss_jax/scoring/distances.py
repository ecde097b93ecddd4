"""Mean Euclidean distance of each trajectory to its k nearest probes (BaDLoss, section 4).

Differences are taken directly: |a|^2 - 2ab + |b|^2 would cancel where trajectories nearly agree.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from badloss_jax.errors import UsageError
from badloss_jax.training.mesh import AXIS, make_mesh, place, place_rows, replicated, to_host

_CHUNK_VALUES = 2**22  # differences held at a time, which bounds memory whatever N is
_SAFE_TO_SQUARE = 1e18  # in float32 the square of twice this times a thousand epochs is still finite


def knn_distances(
    trajectories: Float[Array | np.ndarray, "N *T"],
    probes: Float[Array | np.ndarray, "P *T"],
    k: int,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "N"]:
    """Computes each trajectory's mean distance to the k nearest probes.

    Args:
      trajectories: [N, T] or [N, T, width], finite; computed in float32, or float64 if they are and x64 is on.
      probes: [P, T] or [P, T, width], finite.
      k: 1 to P.
      mesh: the devices that share the rows, by default one.

    Returns:
      float32 [N] (or float64), at least 0. Within 1e-5 relative of exact arithmetic.

    Raises:
      UsageError: shapes that do not fit (both are named), k outside 1..P, NaN or infinite rows (ids are named).
    """
    flat, flat_probes = _check(trajectories, probes)
    if not 1 <= k <= len(flat_probes):
        raise UsageError(f"k = {k} with {len(flat_probes)} probes: expected 1 <= k <= {len(flat_probes)}")
    return _in_chunks(flat, flat_probes, np.full(len(flat), -1, np.int32), k, mesh)


def leave_one_out_distances(probes: Float[Array | np.ndarray, "P *T"], k: int) -> Float[np.ndarray, "P"]:
    """Computes each probe's mean distance to the k nearest of the other probes.

    Raises:
      UsageError: k outside 1..P-1, or NaN or infinite rows.
    """
    flat, _ = _check(probes, probes)
    if not 1 <= k < len(flat):
        raise UsageError(
            f"k = {k} with {len(flat)} probes: expected 1 <= k < {len(flat)}, as a probe leaves itself out"
        )
    return _in_chunks(flat, flat, np.arange(len(flat), dtype=np.int32), k)


def _check(trajectories: Array | np.ndarray, probes: Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, references = np.asarray(trajectories), np.asarray(probes)
    if rows.ndim < 2 or rows.shape[1:] != references.shape[1:] or not len(references):
        raise UsageError(f"trajectories are {rows.shape} and probes {references.shape}: expected [N, T] and [P, T]")
    given = jax.dtypes.canonicalize_dtype(np.promote_types(rows.dtype, references.dtype))
    dtype = jnp.promote_types(given, jnp.float32)
    flat = [array.reshape(len(array), -1).astype(dtype) for array in (rows, references)]
    for name, array in zip(("trajectories", "probes"), flat, strict=True):
        bad = np.flatnonzero(~np.isfinite(array).all(1))
        if len(bad):
            raise UsageError(f"{len(bad)} {name} are NaN or infinite, rows {', '.join(map(str, bad[:10]))}")
    return flat[0], flat[1]


def _in_chunks(rows: np.ndarray, probes: np.ndarray, own: np.ndarray, k: int, mesh: Mesh | None = None) -> np.ndarray:
    """Walks over fixed-size chunks of rows, so that one compiled kernel serves any N."""
    mesh = mesh or make_mesh(jax.local_devices()[:1])
    share = max(1, min(-(-len(rows) // mesh.size), _CHUNK_VALUES // max(1, probes.size)))
    size = share * mesh.size
    out = np.empty(len(rows), rows.dtype)
    on_devices = place(probes, replicated(mesh))
    huge = max(np.abs(rows).max(initial=0), np.abs(probes).max(initial=0)) > _SAFE_TO_SQUARE
    kernel = _make_kernel(k, bool(huge), mesh)
    for start in range(0, len(rows), size):
        chunk = place_rows((size, rows.shape[1]), mesh, partial(_part, rows, start))
        ids = place_rows((size,), mesh, partial(_part, own, start))
        stop = min(start + size, len(rows))
        out[start:stop] = to_host(kernel(chunk, on_devices, ids))[: stop - start]
    return out


def _part(array: np.ndarray, start: int, begin: int, end: int) -> np.ndarray:
    """Returns the rows of a chunk that one device takes, with zeros past the end."""
    taken = array[start + begin : start + end]
    return np.concatenate([taken, np.zeros((end - begin - len(taken), *array.shape[1:]), array.dtype)])


@lru_cache(maxsize=64)
def _make_kernel(k: int, huge: bool, mesh: Mesh) -> Callable[[Array, Array, Array], Array]:
    """Compiles (rows, probes, own) -> distances; every device works on its own rows, and nothing is exchanged."""
    row, whole = PartitionSpec(AXIS), PartitionSpec()
    kernel = jax.shard_map(
        partial(_mean_of_nearest, k=k, huge=huge), mesh=mesh, in_specs=(row, whole, row), out_specs=row
    )
    return jax.jit(kernel)


def _mean_of_nearest(
    rows: Float[Array, "R D"], probes: Float[Array, "P D"], own: Int[Array, "R"], k: int, huge: bool
) -> Float[Array, "R"]:
    """`own` is the probe that a row leaves out, or -1; `huge` scales every pair so that no square overflows."""
    differences = rows[:, None, :] - probes[None, :, :]
    if huge:
        scale = jnp.max(jnp.abs(differences), axis=-1, keepdims=True)
        scale = jnp.where(scale > 0, scale, 1)
        distances = scale[..., 0] * jnp.sqrt(jnp.sum((differences / scale) ** 2, axis=-1))
    else:
        distances = jnp.sqrt(jnp.sum(differences**2, axis=-1))
    distances = jnp.where(own[:, None] == jnp.arange(len(probes)), jnp.inf, distances)
    nearest, _ = jax.lax.top_k(-distances, k)
    return -nearest.mean(axis=-1)
