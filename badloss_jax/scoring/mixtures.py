"""Where clusters of a class may lie: mixtures of Gaussians of several sizes, from several starts, in one program each.

S is the largest number of components of a mixture, C the number of principal components that it is fitted to.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_SIZES = ((2, 3, 4, 6), (8, 12, 16))  # of mixtures, those in one program that are nearly as large
_STARTS = 3  # of each size
RUNS = np.repeat(np.concatenate(_SIZES), _STARTS)  # sizes of all mixtures, in the order of their fitting
_CENTRINGS = 8  # of k-means
_STEPS = 40  # of expectation and maximisation


def proposals(points: Float[Array, "n C"], real: Bool[Array, "n"], key: Array) -> Float[Array, "n G"]:
    """Fits mixtures of every size from every start.

    Args:
      points: [n, C], whitened, and zero where they are padding.
      real: [n], False for padding.
      key: of the starts.

    Returns:
      Which points each component holds, 1 or 0, in the order of `RUNS`.
    """
    draws = jax.random.uniform(key, (len(RUNS), max(RUNS)), points.dtype)
    held = []
    begin = 0
    for sizes in _SIZES:
        runs = np.repeat(sizes, _STARTS)
        rows = slice(begin, begin + len(runs))
        fitted = jax.vmap(partial(_mixture, points, real))(draws[rows, : max(sizes)], jnp.asarray(runs))

        # The components past a mixture's size are empty.
        exists = np.flatnonzero(np.arange(max(sizes)) < runs[:, None])
        held.append(fitted.reshape(-1, len(points))[exists])
        begin = rows.stop
    return jnp.concatenate(held).T


def _mixture(
    points: Float[Array, "n C"], real: Bool[Array, "n"], draws: Float[Array, "S"], size: Int[Array, ""]
) -> Float[Array, "S n"]:
    """Fits one mixture with a shared covariance, from k-means, itself from k-means++ (Arthur, Vassilvitskii 2007).

    `draws`, uniform in [0, 1), choose the first means; components from `size` on stay empty, so that one program fits
    mixtures of several sizes. Components are rows, because XLA vectorises reductions over them on CPUs.
    """
    component = jnp.arange(len(draws))[:, None]
    exists = component < size
    count = jnp.maximum(real.sum(), 1)
    width = points.shape[1]
    scatter = points.T @ points / count

    def nearest(means: Float[Array, "S C"]) -> Float[Array, "S n"]:
        closeness = 2 * means @ points.T - (means**2).sum(1, keepdims=True)
        return _highest(jnp.where(exists, closeness, -jnp.inf), real, component)

    def centre(means: Array, _: None) -> tuple[Array, None]:
        held = nearest(means)
        sizes = held.sum(1)[:, None]
        # What lost all of its points stays where it is.
        return jnp.where(sizes > 0, held @ points / jnp.maximum(sizes, 1), means), None

    def improve(held: Array, _: None) -> tuple[Array, None]:
        # Those past the mixture's size hold nothing, and must not divide by it.
        sizes = held.sum(1)[:, None] + 1e-6
        means = held @ points / sizes

        # The covariance within is the whole scatter less that of the means.
        within = scatter - (means * (sizes / count)).T @ means + 2e-3 * jnp.eye(width, dtype=points.dtype)
        directions = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(within), True), means.T).T

        constants = jnp.log(sizes / count) - 0.5 * (means * directions).sum(1, keepdims=True)
        logits = directions @ points.T + constants  # up to what components have in common
        return jax.nn.softmax(jnp.where(exists, logits, -jnp.inf), axis=0) * real, None

    means = _first_means(points, real, draws)
    means, _ = jax.lax.scan(centre, means, length=_CENTRINGS)
    held, _ = jax.lax.scan(improve, nearest(means), length=_STEPS)
    return _highest(held, real, component)


def _first_means(points: Float[Array, "n C"], real: Bool[Array, "n"], draws: Float[Array, "S"]) -> Float[Array, "S C"]:
    """Chooses points as means, one after the other, the likelier the further they are from those before."""

    def draw(distances: Array, uniform: Array) -> tuple[Array, Array]:
        below = jnp.cumsum(jnp.where(real, distances, 0))
        # Compared with all sums, as a binary search is a loop, which takes XLA longer to compile than all else here.
        chosen = jnp.searchsorted(below, uniform * below[-1], side="right", method="compare_all")
        mean = points[chosen.clip(max=len(points) - 1)]
        return jnp.minimum(distances, ((points - mean) ** 2).sum(1)), mean

    _, means = jax.lax.scan(draw, jnp.full(len(points), 1e3, points.dtype), draws)
    return means


def _highest(values: Float[Array, "S n"], real: Bool[Array, "n"], component: Int[Array, "S 1"]) -> Float[Array, "S n"]:
    """Gives each point to the component of its highest value, 1 or 0; padding to none."""
    # The first of the highest, without an argmax, which XLA does not vectorise on CPUs.
    first = jnp.where(values == values.max(0), component, len(component)).min(0)
    return ((component == first) & real).astype(values.dtype)
