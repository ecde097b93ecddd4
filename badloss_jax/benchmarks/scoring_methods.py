"""Ways to score by the mean distance to the k nearest probes: the kernels of badloss_jax, and their peers."""

import os
from collections.abc import Callable
from functools import partial
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from sklearn.neighbors import NearestNeighbors

from badloss_jax.scoring import knn_distances

KERNELS = ("numba", "xla")
PEERS = ("sklearn brute", "sklearn kd_tree", "sklearn ball_tree", "faiss", "numpy", "jax top_k")
_CHUNK = 4096  # rows that NumPy and top_k take at a time, the fastest of 512 to 65,536 here, at T = 30
_WIDE_CHUNK = 32  # rows that top_k takes of more than 64 columns, the fastest of 32 to 4096 at 960
_PACKAGES = {"xla": "jax", "sklearn": "scikit-learn", "faiss": "faiss-cpu"}

Probes = Float[np.ndarray, "P T"]
Score = Callable[[Float[np.ndarray, "N T"]], Float[np.ndarray, "N"]]


def make_scorer(method: str, probes: Probes, k: int) -> Score:
    """Prepares a method, as far as the probes alone allow.

    Args:
      method: one of `KERNELS` or `PEERS`.
      probes: [P, T].
      k: nearest probes, 1..P.

    Returns:
      A function from trajectories [N, T] to scores [N].
    """
    return _METHODS[method](probes, k)


def is_installed(method: str) -> bool:
    """Says whether a method can be used here: all but FAISS can."""
    if method != "faiss":
        return True
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def version_of(method: str) -> str:
    """Returns the version of the package that a method comes from."""
    name = method.split()[0]
    return metadata.version(_PACKAGES.get(name, name))


def num_threads() -> int:
    """Returns how many cores this process may use; every method gets them all."""
    return len(os.sched_getaffinity(0))


def _kernel(name: str, probes: Probes, k: int) -> Score:
    return lambda rows: knn_distances(rows, probes, k, kernel=name)


def _sklearn(algorithm: str, probes: Probes, k: int) -> Score:
    fitted = NearestNeighbors(n_neighbors=k, algorithm=algorithm, n_jobs=-1).fit(probes)
    return lambda rows: fitted.kneighbors(rows)[0].mean(1)


def _faiss(probes: Probes, k: int) -> Score:
    import faiss

    faiss.omp_set_num_threads(num_threads())
    index = faiss.IndexFlatL2(probes.shape[1])
    index.add(np.ascontiguousarray(probes))

    # Squares of what is very near can come out below zero.
    return lambda rows: np.sqrt(np.maximum(index.search(rows, k)[0], 0)).mean(1)


def _numpy(probes: Probes, k: int) -> Score:
    probe_squares = (probes**2).sum(1)

    def score(rows: Float[np.ndarray, "N T"]) -> Float[np.ndarray, "N"]:
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            squares = (part**2).sum(1)[:, None] - 2 * part @ probes.T + probe_squares
            nearest = np.partition(squares, k - 1, axis=1)[:, :k]
            scores[start : start + _CHUNK] = np.sqrt(np.maximum(nearest, 0)).mean(1)
        return scores

    return score


def _top_k(probes: Probes, k: int) -> Score:
    # Of wide rows XLA holds all differences. Of 4096 rows of 960 columns these are 4 GB, and giving them back slowed
    # down what was timed next.
    chunk = _CHUNK if probes.shape[1] <= 64 else _WIDE_CHUNK

    @jax.jit
    def kernel(part: Float[Array, "C T"]) -> Float[Array, "C"]:
        squares = jnp.sum((part[:, None] - probes[None]) ** 2, axis=-1)
        nearest, _ = jax.lax.top_k(-squares, k)
        return jnp.sqrt(-nearest).mean(1)

    def score(rows: Float[np.ndarray, "N T"]) -> Float[np.ndarray, "N"]:
        parts = []
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            # Every chunk has the same shape, so that the kernel is compiled once.
            missing = chunk - len(part)
            if missing:
                part = np.concatenate([part, np.zeros((missing, rows.shape[1]), rows.dtype)])
            parts.append(kernel(part))
        return np.concatenate(parts)[: len(rows)]

    return score


_METHODS: dict[str, Callable[[Probes, int], Score]] = {
    "numba": partial(_kernel, "numba"),
    "xla": partial(_kernel, "xla"),
    "sklearn brute": partial(_sklearn, "brute"),
    "sklearn kd_tree": partial(_sklearn, "kd_tree"),
    "sklearn ball_tree": partial(_sklearn, "ball_tree"),
    "faiss": _faiss,
    "numpy": _numpy,
    "jax top_k": _top_k,
}
