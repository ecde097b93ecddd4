"""Spectral signatures (Tran et al., NeurIPS 2018, algorithm 1): poison stands out along one direction of its class.

Per label, the penultimate activations of the attacked network are centred and projected on their top right singular
vector; the 1.5 eps examples of each class whose squared projections are largest go. As in the paper every class loses
that share, attacked or not.

Classes are worked on one a device, each padded to a power of two of rows: the smaller of X X^T and X^T X is made and
decomposed, so what is needed beside the features is one class of them a device.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from badloss_jax.core.mesh import AXIS, place_rows, to_host
from badloss_jax.defenses.context import Context, Suspicion


def project(features: Float[Array, "n F"], count: Int[Array, ""]) -> tuple[Float[Array, "n"], Float[Array, ""]]:
    """Projects the centred rows on their top right singular vector.

    Args:
      features: the examples of one class, and padding.
      count: how many rows, from the first, are examples.

    Returns:
      The projections in units of the second output, the largest deviation from the mean; so nothing overflows or
      vanishes where it is squared. The sign is arbitrary, padding projects to 0.
    """
    real = (jnp.arange(len(features)) < count)[:, None]

    # Twice, for what rounding leaves of a large mean.
    centred = features
    for _ in range(2):
        mean = jnp.sum(jnp.where(real, centred, 0), 0) / jnp.maximum(count, 1)
        centred = jnp.where(real, centred - mean, 0)

    scale = jnp.abs(centred).max()
    x = centred / jnp.where(scale > 0, scale, 1)

    # The smaller of the two products has the same singular vectors; the left one leads to the right one.
    with jax.default_matmul_precision("highest"):
        if x.shape[0] < x.shape[1]:
            left = jnp.linalg.eigh(x @ x.T)[1][:, -1]
            right = left @ x
            right = right / jnp.maximum(jnp.linalg.norm(right), jnp.finfo(x.dtype).tiny)
        else:
            right = jnp.linalg.eigh(x.T @ x)[1][:, -1]
        return x @ right, scale


@lru_cache(maxsize=8)
def _make_project(mesh: Mesh) -> Callable:
    """Compiles ([classes, n, F], [classes]) -> ([classes, n], [classes]), the classes shared by the devices."""
    rows = PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(jax.vmap(project), mesh=mesh, in_specs=(rows, rows), out_specs=(rows, rows)))


def spectral_scores(
    features: Float[np.ndarray, "N F"], labels: Int[np.ndarray, "N"], num_classes: int, mesh: Mesh
) -> Float[np.ndarray, "N"]:
    """Computes each example's squared projection on the top singular vector of its class.

    Args:
      features: float32; may be mapped from a file, of which one class a device is read at a time.
      labels: 0 to K - 1.
      num_classes: K.
      mesh: the devices.

    Returns:
      float64, in squared units of the features; 0 for an example without another of its class. Where the two largest
      singular values of a class are equal its direction is any in their plane.
    """
    classes = [np.flatnonzero(labels == label) for label in range(num_classes)]
    classes.sort(key=len)  # so that those that are padded alike come together

    project_classes = _make_project(mesh)
    scores = np.zeros(len(labels))
    for start in range(0, num_classes, mesh.size):
        group = classes[start : start + mesh.size]
        on_devices = project_classes(*_place(features, group, mesh))
        projections, scales = (to_host(array).astype(np.float64) for array in on_devices)

        # Devices that are left idle by the last group have no class to pair with.
        for members, projection, scale in zip(group, projections, scales, strict=False):
            scores[members] = (projection[: len(members)] * scale) ** 2
    return scores


def _place(
    features: Float[np.ndarray, "N F"], group: Sequence[Int[np.ndarray, "n"]], mesh: Mesh
) -> tuple[Float[Array, "D n F"], Int[Array, "D"]]:
    """Puts the features of one class on each of the D devices, padded, and how many examples it has."""
    sizes = np.zeros(mesh.size, np.int32)  # the last group may leave devices idle
    sizes[: len(group)] = [len(members) for members in group]

    # A power of two, so that few sizes are compiled for.
    rows = 1 << (max(2, int(sizes.max())) - 1).bit_length()
    width = features.shape[1]

    def padded(begin: int, end: int) -> np.ndarray:
        block = np.zeros((end - begin, rows, width), np.float32)
        for number, members in enumerate(group[begin:end]):
            block[number, : len(members)] = features[members]
        return block

    by_class = place_rows((mesh.size, rows, width), mesh, padded)
    counts = place_rows(sizes.shape, mesh, lambda begin, end: sizes[begin:end])
    return by_class, counts


def top_of_each_class(
    scores: Float[np.ndarray, "N"], labels: Int[np.ndarray, "N"], num_classes: int, share: float
) -> Bool[np.ndarray, "N"]:
    """Marks the highest scores of each class; ties go by position.

    Args:
      scores: [N].
      labels: 0 to K - 1.
      num_classes: K.
      share: of its examples that each class loses, rounded down; above 1 it loses all.
    """
    top = np.zeros(len(scores), bool)
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        count = int(min(share, 1) * len(members) + 1e-6)  # 0.15 * 20 is just above or just below 3
        descending = np.argsort(-scores[members], kind="stable")
        top[members[descending[:count]]] = True
    return top


def spectral_signatures(context: Context, settings: Mapping[str, Any]) -> Suspicion:
    """Scores by the squared projection, and removes 1.5 eps of each class.

    Args:
      context: what every defence is given.
      settings: `config.defenses.spectral_signatures`.

    Returns:
      Scores, in squared units of the features.
    """
    features = context.observed().features
    scores = spectral_scores(features, context.labels, context.num_classes, context.mesh)

    removed = top_of_each_class(scores, context.labels, context.num_classes, 1.5 * settings["eps"])
    return Suspicion(scores, removed=removed)
