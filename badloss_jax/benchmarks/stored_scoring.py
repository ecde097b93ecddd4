"""Scoring from the disk, by `badloss score --trajectories` in a process of its own: its seconds, and its memory."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from badloss_jax.benchmarks.memory import anonymous_memory
from badloss_jax.core.errors import DataError
from badloss_jax.core.files import read_json
from badloss_jax.core.seeding import generator
from badloss_jax.trajectories.store import TrajectoryStore

_WIDTHS = {"features": 64, "ranked": 6}
_SECONDS_BETWEEN_SAMPLES = 0.005


@dataclass(frozen=True)
class _Shape:
    """What a store holds.

    Attributes:
      num_examples: N.
      num_epochs: T.
      num_probes: P.
      num_classes: K; 0 stores losses alone.
      dtype: of the losses.
    """

    num_examples: int
    num_epochs: int
    num_probes: int
    num_classes: int
    dtype: str

    @property
    def widths(self) -> dict[str, int]:
        """The kinds beside the losses, each float16, with their widths."""
        if self.num_classes:
            return _WIDTHS
        return {}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all columns."""
        a_cell = np.dtype(self.dtype).itemsize + 2 * sum(self.widths.values())
        return self.num_examples * self.num_epochs * a_cell


def measure_store(
    sizes: Sequence[int],
    num_epochs: int,
    num_probes: int,
    dtype: str,
    num_classes: int = 0,
) -> Iterator[dict[str, Any]]:
    """Writes stores of losses to the disk and scores each by `badloss score --trajectories`, in a process of its own.

    With classes, features and ranked log-probabilities are stored as well, noise about a centre for each class, and
    attacks are looked for in them.

    Args:
      sizes: N, each in turn.
      num_epochs: T.
      num_probes: P, the first examples.
      dtype: of the losses as stored, "float32" or "float16".
      num_classes: K; 0 stores losses alone.

    Yields:
      examples, epochs, probes, classes, dtype, stored_bytes, seconds (per phase; "all" with the start of Python and
      JAX), examples_per_second, anonymous_bytes: the process's peak of anonymous memory.

    Raises:
      DataError: the scoring failed; what it said is on the screen.
    """
    for size in sizes:
        shape = _Shape(size, num_epochs, num_probes, num_classes, dtype)
        with tempfile.TemporaryDirectory(prefix="badloss-bench-") as name:
            folder = Path(name)
            _write_store(folder / "store", shape)
            seconds, anonymous_bytes = _score(folder / "store", folder / "scores", shape)
            phases = read_json(folder / "scores" / "scoring.json")["seconds"]
            yield {
                "examples": size,
                "epochs": num_epochs,
                "probes": num_probes,
                "classes": num_classes,
                "dtype": dtype,
                "stored_bytes": shape.stored_bytes,
                "seconds": phases | {"all": seconds},
                "examples_per_second": size / seconds,
                "anonymous_bytes": anonymous_bytes,
            }


def _write_store(folder: Path, shape: _Shape) -> None:
    """Writes losses that fall over the epochs and, with classes, columns with a centre for each class."""
    size = shape.num_examples
    is_probe = np.arange(size) < shape.num_probes
    labels = generator(0, "benchmark", "labels").integers(0, max(shape.num_classes, 1), size).astype(np.int32)
    layout = {"loss": ((), shape.dtype)} | {kind: ((width,), "float16") for kind, width in shape.widths.items()}
    store = TrajectoryStore.create(folder, "", labels, is_probe, shape.num_epochs, layout)

    # Each example has its own level, so that distances differ; the noise of an epoch is that of its number.
    level = generator(0, "benchmark", "store").gamma(2.0, size=size).astype(np.float32)
    for epoch in range(shape.num_epochs):
        noise = generator(epoch, "benchmark", "store").random(size, np.float32)
        falling = np.exp(np.float32(-3 * epoch / shape.num_epochs))
        columns = {"loss": (level * noise * falling).astype(shape.dtype)}

        for kind, width in shape.widths.items():
            # Noise, then the centres of the classes, from one generator.
            draw = generator(epoch, "benchmark", kind)
            column = draw.standard_normal((size, width), np.float32).astype(np.float16)
            column += draw.standard_normal((shape.num_classes, width)).astype(np.float16)[labels]
            columns[kind] = column
        store.write_epoch(epoch, columns)


def _score(store: Path, workdir: Path, shape: _Shape) -> tuple[float, int]:
    """Scores a store in a process of its own; returns its seconds, and its peak of anonymous memory in bytes."""
    command = ["-m", "badloss_jax", "score", "--trajectories", str(store), "--workdir", str(workdir)]
    if shape.num_classes:
        command += ["--config.rejection.rules=('clusters',)", "--config.scoring.kinds=('combined',)"]

    # Its memory is sampled, since the peak that the system keeps counts mapped files, too.
    started = time.perf_counter()
    peak = 0
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(_SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise DataError(f"badloss score ended with exit code {process.returncode}; its message is above")

    return time.perf_counter() - started, peak
