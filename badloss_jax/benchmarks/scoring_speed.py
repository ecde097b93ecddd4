"""How fast scoring is: kernels beside their peers and the machine's limits, and how exact."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from badloss_jax.benchmarks.memory import sampled_peak
from badloss_jax.benchmarks.scoring_methods import (
    KERNELS,
    Score,
    is_installed,
    make_scorer,
    num_threads,
    version_of,
)
from badloss_jax.benchmarks.timing import seconds_of, summary
from badloss_jax.core.seeding import generator

_SAMPLE = 2000  # rows compared with float64
_COPIED = 2**26  # float32 values
_MATRIX = 2048
_LIMIT_REPEATS = 5


@dataclass(frozen=True)
class _Problem:
    """What is scored.

    Attributes:
      rows: trajectories [N, T].
      probes: [P, T].
      k: nearest probes.
    """

    rows: Float[np.ndarray, "N T"]
    probes: Float[np.ndarray, "P T"]
    k: int

    def reference(self) -> Float[np.ndarray, "S"]:
        """Computes the scores of the first rows in float64."""
        rows = self.rows[:_SAMPLE].astype(np.float64)
        probes = self.probes.astype(np.float64)
        squares = ((rows[:, None] - probes[None]) ** 2).sum(-1)
        return np.sqrt(np.sort(squares, axis=1)[:, : self.k]).mean(1)


def measure_scorer(
    sizes: Sequence[int],
    num_epochs: int,
    num_probes: int,
    k: int,
    dtypes: Sequence[str],
    methods: Sequence[str],
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """Times every method on the same trajectories, in turns, after a first call that compiles.

    Args:
      sizes: N, each in turn.
      num_epochs: T.
      num_probes: P.
      k: nearest probes, 1..P.
      dtypes: "float32" or "float16", as stored; peers get float32 only.
      methods: of `KERNELS` and `PEERS`; FAISS is left out where it is not installed.
      repeats: calls of each method, of which the median counts.

    Yields:
      For each size, dtype and method: first_call_seconds, seconds, examples_per_second, bytes_per_second (of
      trajectories read), flops_per_second (3 N T P: a difference, a square, a sum), beside limits (of a copy and a
      product of matrices in the same run), memory_bytes (its peak beyond what there was before), error and
      offset_error (largest relative errors against float64, on gamma-distributed losses and on losses of 1000 to
      1000.01).
    """
    usable = [method for method in methods if is_installed(method)]
    limits = _limits()
    offset = _Problem(_offset_losses(_SAMPLE, num_epochs), _offset_losses(num_probes, num_epochs), k)

    for size in sizes:
        rows = _losses(size, num_epochs)
        probes = _losses(num_probes, num_epochs, "probes")
        for dtype in dtypes:
            # Peers get float32 only: float16 is a matter of what is stored, which only the kernels read as it is.
            problem = _Problem(rows.astype(dtype), probes.astype(dtype), k)
            chosen = [method for method in usable if dtype == "float32" or method in KERNELS]
            yield from _measure_methods(problem, offset, chosen, limits, repeats)


def _measure_methods(
    problem: _Problem,
    offset: _Problem,
    methods: Sequence[str],
    limits: Mapping[str, float],
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """Times some methods in turns; yields the figures of each."""
    # What a method prepares of the probes alone is not timed.
    scorers = {method: make_scorer(method, problem.probes, problem.k) for method in methods}
    first_calls = {method: seconds_of(partial(score, problem.rows)) for method, score in scorers.items()}

    # In turns, so that a machine that slows down favours none.
    samples: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(repeats):
        for method, score in scorers.items():
            samples[method].append(seconds_of(partial(score, problem.rows)))

    reference = problem.reference()
    offset_reference = offset.reference()
    size, num_epochs = problem.rows.shape
    for method, score in scorers.items():
        seconds = summary(samples[method])
        # A call of its own: sampling takes time.
        scores, memory_bytes = _scores_and_memory(score, problem.rows)
        offset_scores = make_scorer(method, offset.probes, offset.k)(offset.rows)
        yield {
            "examples": size,
            "epochs": num_epochs,
            "probes": len(problem.probes),
            "k": problem.k,
            "dtype": str(problem.rows.dtype),
            "method": method,
            "version": version_of(method),
            "threads": num_threads(),
            "first_call_seconds": first_calls[method],
            "seconds": seconds,
            "examples_per_second": size / seconds["median"],
            "bytes_per_second": problem.rows.nbytes / seconds["median"],
            "flops_per_second": 3 * size * num_epochs * len(problem.probes) / seconds["median"],
            "limits": limits,
            "memory_bytes": memory_bytes,
            "error": _error(scores, reference),
            "offset_error": _error(offset_scores, offset_reference),
        }


def _scores_and_memory(score: Score, rows: Float[np.ndarray, "N T"]) -> tuple[Float[np.ndarray, "N"], int]:
    """Returns the scores, and the most memory in bytes that computing them took beyond what there was before."""
    with sampled_peak() as peak:
        scores = score(rows)
    return scores, peak.size


def _error(scores: Float[np.ndarray, "N"], reference: Float[np.ndarray, "S"]) -> float:
    """Returns the largest relative error among the rows that there is a reference of."""
    return float(np.max(np.abs(scores[: len(reference)] - reference) / reference))


def _losses(count: int, num_epochs: int, *purpose: str) -> Float[np.ndarray, "N T"]:
    """Draws trajectories that look like losses: each example's own level, falling over the epochs."""
    draw = generator(0, "benchmark", "trajectories", *purpose)
    level = draw.gamma(2.0, size=(count, 1)).astype(np.float32)
    falling = np.exp(-np.linspace(0, 3, num_epochs, dtype=np.float32))
    return level * falling * draw.random((count, num_epochs), np.float32)


def _offset_losses(count: int, num_epochs: int) -> Float[np.ndarray, "N T"]:
    """Draws losses of 1000 to 1000.01, where a product of matrices cancels."""
    return np.float32(1000) + np.float32(0.01) * _losses(count, num_epochs, "offset", str(count))


def _limits() -> dict[str, float]:
    """Measures what memory and arithmetic give: bytes a second read and written by a copy, FLOP/s of a product."""
    source = np.ones(_COPIED, np.float32)
    target = np.empty(_COPIED, np.float32)
    copies = [seconds_of(partial(np.copyto, target, source)) for _ in range(_LIMIT_REPEATS)]

    matrix = generator(0, "benchmark", "matrix").random((_MATRIX, _MATRIX), np.float32)
    products = [seconds_of(partial(np.matmul, matrix, matrix)) for _ in range(_LIMIT_REPEATS)]

    return {
        "copy_bytes_per_second": 2 * source.nbytes / statistics.median(copies),
        "matmul_flops_per_second": 2 * _MATRIX**3 / statistics.median(products),
    }
