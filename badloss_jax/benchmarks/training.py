"""Training throughput, what recording costs, and what scanning whole epochs would gain.

The steps are the trainer's own. Modes are measured in turns, a few steps each, in an order that is drawn for every
round and then mirrored (sweep, off, step, step, off, sweep), so that a machine that slows down or is busy with other
work does not favour one of them.
"""

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from badloss_jax.benchmarks.timing import overhead, seconds_of, summary
from badloss_jax.core.errors import NonFiniteLossError
from badloss_jax.core.order import epoch_batches
from badloss_jax.core.seeding import generator
from badloss_jax.models import ModelSpec
from badloss_jax.training.batch import Batch
from badloss_jax.training.loop import Recipe
from badloss_jax.training.recorder import Recorder
from badloss_jax.training.resident import ResidentBatch, ResidentData
from badloss_jax.training.state import TrainState, create_state
from badloss_jax.training.step import make_train_step
from badloss_jax.trajectories.buffer import Buffer, padding_id
from badloss_jax.trajectories.kinds import Kinds
from badloss_jax.trajectories.store import TrajectoryStore

MODES = ("off", "sweep", "step")
_BLOCK = 0.1  # seconds of steps that are timed at a time, so that waiting for the last one does not count
_ENDS = 5  # how often the end of an epoch is measured, and a scanned epoch


def synthetic_data(mesh: Mesh, num_examples: int, image_shape: tuple[int, int, int], num_classes: int) -> ResidentData:
    """Places uint8 noise with random labels on the devices."""
    draw = generator(0, "benchmark")
    images = draw.integers(0, 256, (num_examples, *image_shape), dtype=np.uint8)
    return clean_data(mesh, images, draw.integers(0, num_classes, num_examples))


def clean_data(mesh: Mesh, images: np.ndarray, labels: np.ndarray) -> ResidentData:
    """Places images uint8 [N, H, W, C] and labels [N] on the devices, none of them poisoned."""
    nobody = np.zeros(0, int), np.zeros((0, *images.shape[1:]), np.float32)
    return ResidentData.place(mesh, images, labels, *nobody)


def measure_training(
    spec: ModelSpec, recipe: Recipe, kinds: Kinds, data: ResidentData, mesh: Mesh, *, sweep_batch: int,
    seconds: float, scan: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measures one network's training.

    Args:
      spec, recipe, kinds: the network, how it is trained, what is recorded.
      data: its examples, all of which make an epoch.
      mesh: the devices.
      sweep_batch: batch size of a sweep.
      seconds: to spend on steps, beside compiling and the ends of epochs.
      scan: measure an epoch in one `lax.scan` as well, beside the same epoch in a Python loop.

    Returns:
      Sizes, and
      first_call_seconds: of each program: it is compiled, unless the compilation cache has it.
      step_seconds, examples_per_second: per mode, without the end of the epoch.
      step_overhead: per mode, of a step, against "off". "sweep" trains by the same step as "off", which carries the
        buffer along: what it shows beyond zero is the error of this measurement.
      epoch_end_seconds: per mode, to sweep (if it does), copy the epoch's column to the host and store it.
      epoch_overhead_percent: per mode, of an epoch with its end against one without recording.
      scan: seconds of a looped and of a scanned epoch, and the overhead of the latter; None if not asked for.

    Raises:
      NonFiniteLossError: the training diverged, so that its figures mean nothing.
    """
    with tempfile.TemporaryDirectory(prefix="badloss-bench-") as folder:
        bench = _Training(spec, recipe, kinds, data, mesh, sweep_batch, Path(folder))
        first_calls = {f"step, {mode}": bench.block(mode, 1) for mode in MODES}
        first_calls |= {f"end of epoch, {mode}": bench.end_epoch(mode) for mode in MODES[1:]}
        a_step = min(bench.block("off", 2) for _ in range(2))
        steps = max(1, math.ceil(_BLOCK / a_step))
        taken: dict[str, list[float]] = {mode: [] for mode in MODES}
        ends: dict[str, list[float]] = {mode: [] for mode in MODES[1:]}
        for _ in range(_ENDS):
            until = time.perf_counter() + seconds / _ENDS
            while True:
                for mode, spent in bench.round(steps).items():
                    taken[mode].append(spent)
                if time.perf_counter() > until:
                    break
            for mode, past in ends.items():
                past.append(bench.end_epoch(mode))
        scanned = bench.scan() if scan else None
    if not math.isfinite(bench.loss):
        raise NonFiniteLossError(f"the loss of {spec.name} became {bench.loss} in the benchmark")
    medians = {mode: float(np.median(taken[mode])) for mode in MODES}
    epoch = bench.steps * medians["off"]
    return {
        "model": asdict(spec),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(bench.state.params)),
        "batch_size": recipe.batch_size,
        "examples": len(data),
        "steps_per_epoch": bench.steps,
        "kinds": list(kinds.layout()),
        "steps_per_block": steps,
        "first_call_seconds": first_calls,
        "step_seconds": {mode: summary(taken[mode]) for mode in MODES},
        "examples_per_second": {mode: recipe.batch_size / medians[mode] for mode in MODES},
        "step_overhead": {mode: overhead(taken["off"], taken[mode]) for mode in MODES[1:]},
        "epoch_end_seconds": {mode: summary(ends[mode]) for mode in ends},
        "epoch_overhead_percent": {
            mode: overhead(taken["off"], taken[mode])["percent"] + 100 * float(np.median(ends[mode])) / epoch
            for mode in ends
        },
        "scan": scanned,
    }


@dataclass
class _Training:
    """One network in training; all modes take it on from where the last one left it."""

    spec: ModelSpec
    recipe: Recipe
    kinds: Kinds
    data: ResidentData
    mesh: Mesh
    sweep_batch: int
    folder: Path
    loss: float = 0.0
    state: TrainState = field(init=False)

    def __post_init__(self) -> None:
        self.state = create_state(self.spec, self.recipe.optimizer, 0, self.mesh)
        self._steps = {mode: self._make_step(self.kinds if mode == "step" else None) for mode in MODES}
        self._recorders = {mode: self._make_recorder(mode) for mode in MODES[1:]}
        self._batches, self._draw = self._endless(), generator(0, "benchmark", "modes")
        self.steps = len(self._order(0))

    def round(self, steps: int) -> dict[str, float]:
        """Returns seconds a step in every mode, from two blocks each in mirrored order."""
        spent, drawn = dict.fromkeys(MODES, 0.0), self._draw.permutation(MODES).tolist()
        for mode in (*drawn, *reversed(drawn)):
            spent[mode] += self.block(mode, steps) / 2
        return spent

    def block(self, mode: str, steps: int) -> float:
        """Returns seconds a step, of so many in one mode."""
        recorder = self._recorders.get(mode)
        batches = itertools.islice(self._batches, steps)

        def work() -> TrainState:
            buffer = self._walk(self._steps[mode], recorder.buffer if recorder else {}, batches)
            if recorder:
                recorder.buffer = buffer
            return self.state

        return seconds_of(work) / steps

    def end_epoch(self, mode: str) -> float:
        """Returns the seconds from an epoch's last step to the column on disk.

        In "step" mode some cells are still empty here, which the recorder would object to: so it only stores them.
        """
        recorder = self._recorders[mode]
        started = time.perf_counter()
        if mode == "sweep":
            recorder.end_epoch(self.spec, self.state, self.data, 0)
        else:
            recorder.flush(0)
        return time.perf_counter() - started

    def scan(self) -> dict[str, Any]:
        """Measures a whole epoch in a Python loop and in one `lax.scan`, in turns."""
        scanned, order = _make_scan(self._steps["off"]), self._order(0)
        rest = np.int32(0), self._rate(), np.uint32(0)

        def loop() -> TrainState:
            self._walk(self._steps["off"], {}, self.data.batches(order))
            return self.state

        def scan() -> TrainState:
            self.state, losses = scanned(self.state, self.data, order, *rest)
            self.loss = float(losses[-1])
            return self.state

        first_call = seconds_of(scan)
        pairs = [(seconds_of(loop), seconds_of(scan)) for _ in range(_ENDS)]
        looped, whole = zip(*pairs, strict=True)
        return {"first_call_seconds": first_call, "loop_seconds": summary(looped), "scan_seconds": summary(whole),
                "overhead": overhead(looped, whole)}  # fmt: skip

    def _walk(self, step: Callable, buffer: Buffer, batches: Iterator[Batch]) -> Buffer:
        """Trains on some batches, waiting for each loss while the next step runs, as the trainer does."""
        before = None
        for batch in batches:
            self.state, buffer, loss = step(self.state, buffer, batch, np.int32(0), self._rate(), np.uint32(0), None)
            if before is not None:
                self.loss = float(before)
            before = loss
        self.loss = float(before) if before is not None else self.loss
        return buffer

    def _endless(self) -> Iterator[ResidentBatch]:
        for epoch in itertools.count():
            yield from self.data.batches(self._order(epoch))

    def _order(self, epoch: int) -> Int[np.ndarray, "S B"]:
        padding = padding_id(len(self.data), self.mesh)
        every = np.arange(len(self.data))
        return epoch_batches(every, self.recipe.batch_size, padding, seed=0, phase="benchmark", epoch=epoch)

    def _rate(self) -> np.float32:
        return np.float32(self.recipe.learning_rate_at(0))

    def _make_step(self, kinds: Kinds | None) -> Callable:
        recipe = self.recipe
        return make_train_step(self.spec, recipe.optimizer, recipe.objective, recipe.augment, kinds, self.mesh)

    def _make_recorder(self, mode: str) -> Recorder:
        labels = np.asarray(self.data.labels)
        store = TrajectoryStore.create(self.folder / mode, "", labels, np.zeros(len(labels), bool),
                                       self.recipe.epochs, self.kinds.layout())  # fmt: skip
        return Recorder(self.kinds, mode, store, self.mesh, self.sweep_batch)


def _make_scan(step: Callable) -> Callable:
    """Compiles (state, data, order, epoch, learning_rate, seed) -> (state, losses [S]): a whole epoch of `step`."""

    def run(
        state: TrainState, data: ResidentData, order: Int[Array, "S B"], *rest: Array
    ) -> tuple[TrainState, Float[Array, "S"]]:
        def body(carried: TrainState, ids: Int[Array, "B"]) -> tuple[TrainState, Array]:
            carried, _, loss = step(carried, {}, ResidentBatch(data, ids), *rest, None)
            return carried, loss

        return jax.lax.scan(body, state, order)

    return jax.jit(run, donate_argnums=0)
