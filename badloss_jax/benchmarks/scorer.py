"""How fast scoring is: kernels beside their peers and the machine's limits, whole detectors, stores on the disk."""

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.stats import rankdata
from sklearn.neighbors import NearestNeighbors

from badloss_jax.attacks.manifest import read_manifest
from badloss_jax.benchmarks.timing import seconds_of, summary
from badloss_jax.core.errors import DataError
from badloss_jax.core.files import read_json, write_atomically
from badloss_jax.core.mesh import make_mesh
from badloss_jax.core.seeding import generator
from badloss_jax.defenses.badloss import detect
from badloss_jax.evaluation.detection import detection_metrics
from badloss_jax.runs.workdir import read_config
from badloss_jax.scoring import knn_distances, reject
from badloss_jax.trajectories.store import TrajectoryStore

KERNELS = ("numba", "xla")
PEERS = ("sklearn brute", "sklearn kd_tree", "sklearn ball_tree", "faiss", "numpy", "jax top_k")
_SAMPLE = 2000  # rows compared with float64
_CHUNK = 4096  # rows that NumPy and top_k take at a time, the fastest of 512 to 65,536 here
_COPIED = 2**26  # float32 values
_MATRIX = 2048

Score = Callable[[np.ndarray], np.ndarray]


def measure_scorer(
    sizes: Sequence[int], num_epochs: int, num_probes: int, k: int, dtypes: Sequence[str], methods: Sequence[str],
    repeats: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Times every method on the same trajectories, in turns, after a first call that compiles.

    Args:
      sizes: N, each in turn.
      num_epochs, num_probes, k: T, P and k.
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
    usable = [method for method in methods if method != "faiss" or _has_faiss()]
    limits = _limits()
    for size in sizes:
        rows, probes = _losses(size, num_epochs), _losses(num_probes, num_epochs, "probes")
        offset = [
            np.float32(1000) + np.float32(0.01) * _losses(n, num_epochs, "offset", n) for n in (_SAMPLE, num_probes)
        ]
        for dtype in dtypes:
            stored = rows.astype(dtype)
            known = probes.astype(dtype)
            chosen = [method for method in usable if dtype == "float32" or method in KERNELS]
            ready = {method: _METHODS[method](known, k) for method in chosen}
            firsts = {method: seconds_of(partial(score, stored)) for method, score in ready.items()}
            spent: dict[str, list[float]] = {method: [] for method in chosen}
            for _ in range(repeats):
                for method in chosen:
                    spent[method].append(seconds_of(partial(ready[method], stored)))
            expected = _reference(stored[:_SAMPLE], known, k)
            far = _reference(offset[0], offset[1], k)
            for method in chosen:
                taken = summary(spent[method])
                with _peak_memory() as peak:
                    got = ready[method](stored)
                yield {
                    "examples": size, "epochs": num_epochs, "probes": num_probes, "k": k, "dtype": dtype,
                    "method": method, "version": _version(method), "threads": len(os.sched_getaffinity(0)),
                    "first_call_seconds": firsts[method], "seconds": taken,
                    "examples_per_second": size / taken["median"],
                    "bytes_per_second": stored.nbytes / taken["median"],
                    "flops_per_second": 3 * size * num_epochs * num_probes / taken["median"],
                    "limits": limits, "memory_bytes": peak[0],
                    "error": _error(got[:_SAMPLE], expected),
                    "offset_error": _error(_METHODS[method](offset[1], k)(offset[0]), far),
                }  # fmt: skip


def measure_detectors(workdir: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """Times every detector on the trajectories of a finished run, from its files to its removal lists.

    Yields:
      detector, examples, seconds, examples_per_second, auroc (overall), and float16: what storing a kind as float16
      would change that is stored as float32 (Spearman's correlation of the ranks, the largest change of a rank as a
      share of N, the share of the examples removed at 40 % that changes, auroc); None for other kinds.

    Raises:
      UsageError, DataError: there is no finished run in the folder, or it is damaged.
    """
    config = read_config(workdir)
    store = TrajectoryStore.open(workdir / "trajectories")
    attack_of, probe_ids = read_manifest(workdir / "manifest.json").attack_of(), store.probe_ids()
    is_probe = np.isin(np.arange(store.num_examples), probe_ids)

    def auroc(distances: np.ndarray) -> float | None:
        return detection_metrics(distances, attack_of, is_probe)["auroc"]["overall"]

    for kind in config.scoring.kinds:
        scoring = config.scoring.to_dict() | {"kinds": (kind,)}
        work = partial(detect, store, probe_ids, scoring, config.rejection, make_mesh())
        detections, epochs = work()
        taken = summary([seconds_of(lambda: work()[1]) for _ in range(repeats)])  # noqa: B023
        found: dict[str, Any] = {
            "detector": f"badloss {kind}", "examples": store.num_examples, "seconds": taken,
            "examples_per_second": store.num_examples / taken["median"],
            "auroc": auroc(detections[kind].distances), "float16": None,
        }  # fmt: skip
        if store.layout.get(kind, ((), ""))[1] == "float32":
            rounded = store.read(kind, epochs).astype(np.float16)
            distances = detections[kind].distances, knn_distances(rounded, rounded[probe_ids], scoring[kind]["k"])
            ranks = [rankdata(part) for part in distances]
            lists = [reject("fraction", 0.4, part, np.ones(len(part)), is_probe) for part in distances]
            found["float16"] = {
                "rank_correlation": float(np.corrcoef(*ranks)[0, 1]),
                "largest_rank_change": float(np.abs(ranks[0] - ranks[1]).max() / len(is_probe)),
                "removed_changed": float((lists[0] != lists[1]).mean()),
                "auroc": auroc(distances[1]),
            }
        yield found


def measure_store(
    sizes: Sequence[int], num_epochs: int, num_probes: int, dtype: str, num_classes: int = 0
) -> Iterator[dict[str, Any]]:
    """Writes stores of losses to the disk and scores each by `badloss score --trajectories`, in a process of its own.

    With classes, features and ranked log-probabilities are stored as well, noise about a centre for each class, and
    attacks are looked for in them.

    Yields:
      examples, epochs, probes, classes, dtype, stored_bytes, seconds (per phase; "all" with the start of Python and
      JAX), examples_per_second, anonymous_bytes: the process's peak of anonymous memory.

    Raises:
      DataError: the scoring failed; what it said is on the screen.
    """
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="badloss-bench-") as name:
            folder, is_probe = Path(name), np.arange(size) < num_probes
            labels = generator(0, "benchmark", "labels").integers(0, max(num_classes, 1), size).astype(np.int32)
            widths: dict[str, int] = {"features": 64, "ranked": 6} if num_classes else {}
            layout = {"loss": ((), dtype)} | {kind: ((width,), "float16") for kind, width in widths.items()}
            store = TrajectoryStore.create(folder / "store", "", labels, is_probe, num_epochs, layout)
            level = generator(0, "benchmark", "store").gamma(2.0, size=size).astype(np.float32)
            for epoch in range(num_epochs):
                noise = generator(epoch, "benchmark", "store").random(size, np.float32)
                falling = np.exp(np.float32(-3 * epoch / num_epochs))
                columns = {"loss": (level * noise * falling).astype(dtype)}
                for kind, width in widths.items():
                    draw = generator(epoch, "benchmark", kind)
                    columns[kind] = draw.standard_normal((size, width), np.float32).astype(np.float16)
                    columns[kind] += draw.standard_normal((num_classes, width)).astype(np.float16)[labels]
                store.write_epoch(epoch, columns)
            del level, noise, columns
            out = folder / "scores"
            command = ["-m", "badloss_jax", "score", "--trajectories", str(store.folder), "--workdir", str(out)]
            if num_classes:
                command += ["--config.rejection.rules=('clusters',)", "--config.scoring.kinds=('combined',)"]
            started, peak = time.perf_counter(), 0
            with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL) as process:
                while process.poll() is None:
                    peak = max(peak, _anonymous(process.pid))
                    time.sleep(0.005)
            if process.returncode:
                raise DataError(f"badloss score ended with exit code {process.returncode}; its message is above")
            spent = time.perf_counter() - started
            yield {
                "examples": size, "epochs": num_epochs, "probes": num_probes, "classes": num_classes, "dtype": dtype,
                "stored_bytes": size * num_epochs * (np.dtype(dtype).itemsize + 2 * sum(widths.values())),
                "seconds": read_json(out / "scoring.json")["seconds"] | {"all": spent},
                "examples_per_second": size / spent,
                "anonymous_bytes": peak,
            }  # fmt: skip


def save_slopes(path: Path, figures: Sequence[Mapping[str, Any]]) -> None:
    """Plots seconds against N, both logarithmic: a straight line of slope one is linear."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for entry in figures:
        name = entry["method"] + ("" if entry["dtype"] == "float32" else f", {entry['dtype']}")
        lines.setdefault(name, []).append((entry["examples"], entry["seconds"]["median"]))
    for (name, points), marker in zip(lines.items(), "osD^v<>Px*", strict=False):
        ours = name.split(",")[0] in KERNELS
        axis.plot(*zip(*sorted(points), strict=True), marker=marker, linewidth=2.5 if ours else 1.2, label=name)
    about = figures[0]
    title = f"T = {about['epochs']}, P = {about['probes']}, k = {about['k']}, {about['threads']} CPU cores"
    axis.set(xscale="log", yscale="log", xlabel="trajectories N", ylabel="seconds (median)", title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    write_atomically(path, lambda aside: figure.savefig(aside, dpi=110))


def _losses(count: int, num_epochs: int, *name: Any) -> Float[np.ndarray, "N T"]:
    """Draws trajectories that look like losses: each example's own level, falling over the epochs."""
    draw = generator(0, "benchmark", "trajectories", *map(str, name))
    level = draw.gamma(2.0, size=(count, 1)).astype(np.float32)
    falling = np.exp(-np.linspace(0, 3, num_epochs, dtype=np.float32))
    return level * falling * draw.random((count, num_epochs), np.float32)


def _reference(rows: np.ndarray, probes: np.ndarray, k: int) -> np.ndarray:
    ours, others = rows.astype(np.float64), probes.astype(np.float64)
    squares = ((ours[:, None] - others[None]) ** 2).sum(-1)
    return np.sqrt(np.sort(squares, axis=1)[:, :k]).mean(1)


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(got - expected) / expected))


def _kernel(name: str, probes: np.ndarray, k: int) -> Score:
    return partial(lambda rows: knn_distances(rows, probes, k, kernel=name))


def _sklearn(algorithm: str, probes: np.ndarray, k: int) -> Score:
    fitted = NearestNeighbors(n_neighbors=k, algorithm=algorithm, n_jobs=-1).fit(probes)
    return lambda rows: fitted.kneighbors(rows)[0].mean(1)


def _faiss(probes: np.ndarray, k: int) -> Score:
    import faiss

    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    index = faiss.IndexFlatL2(probes.shape[1])
    index.add(np.ascontiguousarray(probes))
    return lambda rows: np.sqrt(np.maximum(index.search(rows, k)[0], 0)).mean(1)


def _numpy(probes: np.ndarray, k: int) -> Score:
    squares = (probes**2).sum(1)

    def score(rows: np.ndarray) -> np.ndarray:
        out = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            all_squares = (part**2).sum(1)[:, None] - 2 * part @ probes.T + squares
            nearest = np.partition(all_squares, k - 1, axis=1)[:, :k]
            out[start : start + _CHUNK] = np.sqrt(np.maximum(nearest, 0)).mean(1)
        return out

    return score


def _top_k(probes: np.ndarray, k: int) -> Score:
    @jax.jit
    def kernel(part: jax.Array) -> jax.Array:
        squares = jnp.sum((part[:, None] - probes[None]) ** 2, axis=-1)
        nearest, _ = jax.lax.top_k(-squares, k)
        return jnp.sqrt(-nearest).mean(1)

    def score(rows: np.ndarray) -> np.ndarray:
        padded = -(-len(rows) // _CHUNK) * _CHUNK
        parts = []
        for start in range(0, padded, _CHUNK):
            part = rows[start : start + _CHUNK]
            if len(part) < _CHUNK:
                part = np.concatenate([part, np.zeros((_CHUNK - len(part), rows.shape[1]), rows.dtype)])
            parts.append(kernel(part))
        return np.concatenate(parts)[: len(rows)]

    return score


_METHODS: dict[str, Callable[[np.ndarray, int], Score]] = {
    "numba": partial(_kernel, "numba"),
    "xla": partial(_kernel, "xla"),
    "sklearn brute": partial(_sklearn, "brute"),
    "sklearn kd_tree": partial(_sklearn, "kd_tree"),
    "sklearn ball_tree": partial(_sklearn, "ball_tree"),
    "faiss": _faiss,
    "numpy": _numpy,
    "jax top_k": _top_k,
}


def _has_faiss() -> bool:
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def _version(method: str) -> str:
    package = {"xla": "jax", "sklearn": "scikit-learn", "faiss": "faiss-cpu"}
    name = method.split()[0]
    return metadata.version(package.get(name, name))


def _limits() -> dict[str, float]:
    """Measures what memory and arithmetic give: bytes a second read and written by a copy, FLOP/s of a product."""
    source, target = np.ones(_COPIED, np.float32), np.empty(_COPIED, np.float32)
    matrix = generator(0, "benchmark", "matrix").random((_MATRIX, _MATRIX), np.float32)
    copies = [seconds_of(partial(np.copyto, target, source)) for _ in range(5)]
    products = [seconds_of(partial(np.matmul, matrix, matrix)) for _ in range(5)]
    return {"copy_bytes_per_second": 2 * source.nbytes / statistics.median(copies),
            "matmul_flops_per_second": 2 * _MATRIX**3 / statistics.median(products)}  # fmt: skip


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Samples this process's anonymous memory; at the end the list holds its peak beyond the beginning, in bytes."""
    begun, peak, done = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _anonymous() - begun)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _anonymous(process: int | str = "self") -> int:
    """Returns a process's anonymous memory in bytes, 0 if it is over."""
    try:
        with open(f"/proc/{process}/status") as status:
            return next((1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon")), 0)
    except OSError:
        return 0
