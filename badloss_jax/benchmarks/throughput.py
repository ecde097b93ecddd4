"""Training throughput, what recording costs, what scanning whole epochs would gain, and how fast others are.

The steps are the trainer's own. Modes are measured in turns, a few steps each, in an order that is drawn for every
round and then mirrored (sweep, off, step, step, off, sweep), so that a machine that slows down or is busy with other
work does not favour one of them. A peer, the same training by another framework, is one more mode.
"""

import inspect
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from badloss_jax.benchmarks.peers import Peer, make_peer
from badloss_jax.benchmarks.timing import overhead, ratio, seconds_of, summary
from badloss_jax.benchmarks.workload import Workload
from badloss_jax.core.errors import NonFiniteLossError
from badloss_jax.core.mesh import jit_on, place, replicated
from badloss_jax.core.order import cut_batches, epoch_batches
from badloss_jax.core.seeding import generator
from badloss_jax.training.batch import Batch
from badloss_jax.training.in_flight import InFlight
from badloss_jax.training.recorder import Recorder
from badloss_jax.training.resident import ResidentData
from badloss_jax.training.state import TrainState, create_state
from badloss_jax.training.step import make_train_step
from badloss_jax.trajectories.buffer import padding_id
from badloss_jax.trajectories.store import TrajectoryStore

MODES = ("off", "sweep", "step")
_RECORDING = MODES[1:]
_BLOCK = 0.1  # seconds of steps that are timed at a time, so that waiting for the last one does not count
_ENDS = 5  # how often the end of an epoch is measured, and a scanned epoch
_DISPATCHES = 4  # steps whose dispatch is timed, after each of these


def measure_training(workload: Workload, seconds: float, scan: bool = False, peer: str | None = None) -> dict[str, Any]:
    """Measures one network's training.

    Args:
      workload: the network, its examples, how it is trained, what is recorded.
      seconds: to spend on steps, beside compiling and the ends of epochs.
      scan: measure an epoch in one `lax.scan` as well, beside the same epoch in a Python loop.
      peer: of `PEERS`, measured beside; it begins with the same weights, and trains on the same batches.

    Returns:
      Sizes, and
      first_call_seconds: of each program: it is compiled, unless the compilation cache has it.
      step_seconds, examples_per_second: per mode, without the end of the epoch.
      step_overhead: per mode, of a step, against "off". "sweep" trains by the same step as "off": what it shows beyond
        zero is the error of this measurement.
      dispatch_seconds: per mode, that the host takes for a step whose devices have nothing to do: what it needs to keep
        ahead of them. A CPU device begins to work meanwhile.
      epoch_end_seconds: per mode, to sweep (if it does), copy the epoch's column to the host and store it.
      epoch_overhead_percent: per mode, of an epoch with its end against one without recording.
      scan: seconds of a looped and of a scanned epoch, and the overhead of the latter; None if not asked for.
      peer: its name, version and threads, its first_call_seconds, step_seconds and examples_per_second, and ratio, how
        many times as long our step takes with recording off; None if not asked for.

    Raises:
      UsageError: the peer cannot do the same work.
      NonFiniteLossError: the training diverged, so that its figures mean nothing.
    """
    with tempfile.TemporaryDirectory(prefix="badloss-bench-") as folder:
        training = _Training(workload, Path(folder), peer)
        first_calls = _first_calls(training)
        samples = _sample(training, seconds)
        scanned = training.scan() if scan else None

    # The figures of a training that diverged mean nothing.
    for loss in training.losses():
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss of {workload.spec.name} became {loss} in the benchmark")

    beside = None
    if training.peer:
        beside = _peer_figures(training.peer, samples, first_calls.pop(f"step, {peer}"), workload.recipe.batch_size)

    return {
        "model": asdict(workload.spec),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(training.state.params)),
        "batch_size": workload.recipe.batch_size,
        "examples": len(workload.data),
        "steps_per_epoch": training.steps,
        "kinds": list(workload.kinds.layout()),
        "steps_per_block": samples.steps_per_block,
        "first_call_seconds": first_calls,
        **_costs(samples, workload.recipe.batch_size, training.steps),
        "scan": scanned,
        "peer": beside,
    }


@dataclass(frozen=True)
class _Samples:
    """Seconds that were measured.

    Attributes:
      steps_per_block: steps that were timed at a time.
      steps: mode, or name of a peer -> seconds of a step, per round.
      dispatches: mode -> seconds that the host takes for a step.
      ends: mode -> seconds of the end of an epoch.
    """

    steps_per_block: int
    steps: dict[str, list[float]]
    dispatches: dict[str, list[float]]
    ends: dict[str, list[float]]


@dataclass
class _Training:
    """One network in training; all modes take it on from where the last one left it.

    Attributes:
      workload: what is trained.
      folder: an empty one, to store columns in.
      peer_name: of `PEERS`, or None.
      loss: of the last step.
      state: of the network.
      steps: of an epoch.
      peer: trains a network of its own, from the same weights.
      modes: `MODES`, and the peer.
    """

    workload: Workload
    folder: Path
    peer_name: str | None = None
    loss: float = 0.0
    state: TrainState = field(init=False)
    steps: int = field(init=False)
    peer: Peer | None = field(init=False, default=None)
    modes: tuple[str, ...] = field(init=False, default=MODES)

    def __post_init__(self) -> None:
        workload = self.workload
        self.state = create_state(workload.spec, workload.recipe.optimizer, 0, workload.mesh)
        self._recorders = {mode: self._make_recorder(mode) for mode in _RECORDING}
        self._steps = {mode: self._make_step(self._recorders.get(mode)) for mode in MODES}
        constants = (np.int32(0), np.float32(workload.recipe.learning_rate_at(0)), np.uint32(0))
        self._constants = place(constants, replicated(workload.mesh))
        self._in_flight = InFlight(self._settle, workload.mesh)
        self._batches = self._endless()
        self._draw = generator(0, "benchmark", "modes")
        self.steps = len(self._order(0))

        if self.peer_name:
            self.peer = make_peer(self.peer_name, workload, self.state)
            self.modes = (*MODES, self.peer_name)
            self._peer_ids = self._endless_ids()

    def losses(self) -> list[float]:
        """Returns the loss of the last step, and the peer's."""
        if self.peer:
            return [self.loss, self.peer.loss]
        return [self.loss]

    def round(self, steps: int) -> dict[str, float]:
        """Returns seconds a step in every mode, from two blocks each in mirrored order."""
        seconds = dict.fromkeys(self.modes, 0.0)
        drawn = self._draw.permutation(self.modes).tolist()
        # Mirrored, so that a steady drift of the machine's speed adds the same to every mode.
        for mode in (*drawn, *reversed(drawn)):
            seconds[mode] += self.block(mode, steps) / 2
        return seconds

    def block(self, mode: str, steps: int) -> float:
        """Measures some steps in one mode.

        Args:
          mode: one of `modes`.
          steps: how many.

        Returns:
          Seconds a step.
        """
        if self.peer and mode == self.peer.name:
            return seconds_of(partial(self.peer.train, itertools.islice(self._peer_ids, steps))) / steps

        recorder = self._recorders.get(mode)
        batches = itertools.islice(self._batches, steps)

        def work() -> TrainState:
            self._walk(self._steps[mode], batches, recorder)
            return self.state

        return seconds_of(work) / steps

    def dispatch(self, mode: str) -> float:
        """Returns the seconds that the host takes to start a step, once the devices have done all before."""
        recorder = self._recorders.get(mode)
        jax.block_until_ready(self.state)

        started = time.perf_counter()
        loss = self._start(self._steps[mode], next(self._batches), recorder)
        seconds = time.perf_counter() - started
        self._settle(loss)
        return seconds

    def end_epoch(self, mode: str) -> float:
        """Returns the seconds from an epoch's last step to the column on disk.

        In "step" mode some cells are still empty here, which the recorder would object to: so it only stores them.
        """
        recorder = self._recorders[mode]

        started = time.perf_counter()
        if mode == "sweep":
            count = len(self.workload.data)
            padding = padding_id(count, self.workload.mesh)
            order = cut_batches(np.arange(count), recorder.batch_size, padding)
            recorder.end_epoch(self.workload.spec, self.state, self.workload.data.batches(order), 0)
        else:
            recorder.flush(0)
        return time.perf_counter() - started

    def scan(self) -> dict[str, Any]:
        """Measures a whole epoch in a Python loop and in one `lax.scan`, in turns."""
        data = self.workload.data
        order = self._order(0)
        scanned = _make_scan(inspect.unwrap(self._steps["off"]), self.workload.mesh)

        def loop() -> TrainState:
            self._walk(self._steps["off"], data.batches(order))
            return self.state

        def scan() -> TrainState:
            self.state, losses = scanned(self.state, data, order, *self._constants)
            # A loop waits for its losses, too.
            self.loss = float(losses[-1])
            return self.state

        # The steps of the loop have been compiled before, the scan has not.
        first_call = seconds_of(scan)
        pairs = [(seconds_of(loop), seconds_of(scan)) for _ in range(_ENDS)]
        looped, whole = zip(*pairs, strict=True)

        return {
            "first_call_seconds": first_call,
            "loop_seconds": summary(looped),
            "scan_seconds": summary(whole),
            "overhead": overhead(looped, whole),
        }

    def _walk(self, step: Callable, batches: Iterator[Batch], recorder: Recorder | None = None) -> None:
        """Trains on some batches, waiting for losses while later steps run, as the trainer does."""
        for batch in batches:
            self._in_flight.append(self._start(step, batch, recorder))
        self._in_flight.settle_all()

    def _start(self, step: Callable, batch: Batch, recorder: Recorder | None) -> jax.Array:
        """Starts a step, and writing what is recorded of it; returns the loss."""
        self.state, loss, losses, values = step(self.state, batch, *self._constants, None)
        if recorder:
            recorder.end_step(batch, losses, values)
        return loss

    def _settle(self, loss: jax.Array) -> None:
        self.loss = float(loss)

    def _endless(self) -> Iterator[Batch]:
        for epoch in itertools.count():
            yield from self.workload.data.batches(self._order(epoch))

    def _endless_ids(self) -> Iterator[Int[np.ndarray, "B"]]:
        for epoch in itertools.count():
            yield from self._order(epoch)

    def _order(self, epoch: int) -> Int[np.ndarray, "S B"]:
        workload = self.workload
        count = len(workload.data)
        return epoch_batches(
            np.arange(count),
            workload.recipe.batch_size,
            padding_id(count, workload.mesh),
            seed=0,
            phase="benchmark",
            epoch=epoch,
        )

    def _make_step(self, recorder: Recorder | None) -> Callable:
        workload = self.workload
        kinds = recorder.step_kinds if recorder else None
        recipe = workload.recipe
        return make_train_step(workload.spec, recipe.optimizer, recipe.objective, recipe.augment, kinds, workload.mesh)

    def _make_recorder(self, mode: str) -> Recorder:
        workload = self.workload
        labels = np.asarray(workload.data.labels)
        nobody = np.zeros(len(labels), bool)
        store = TrajectoryStore.create(
            self.folder / mode, "", labels, nobody, workload.recipe.epochs, workload.kinds.layout()
        )
        return Recorder(workload.kinds, mode, store, workload.mesh, workload.sweep_batch)


def _first_calls(training: _Training) -> dict[str, float]:
    """Returns the seconds of the first call of each program, which compiles it."""
    steps = {f"step, {mode}": training.block(mode, 1) for mode in training.modes}
    ends = {f"end of epoch, {mode}": training.end_epoch(mode) for mode in _RECORDING}
    return steps | ends


def _sample(training: _Training, seconds: float) -> _Samples:
    """Measures rounds of all modes for so many seconds, with a few ends of epochs among them."""
    # Of two, the faster: a program that is still warming up would make blocks too short.
    a_step = min(training.block("off", 2) for _ in range(2))
    steps_per_block = max(1, math.ceil(_BLOCK / a_step))

    steps: dict[str, list[float]] = {mode: [] for mode in training.modes}
    dispatches: dict[str, list[float]] = {mode: [] for mode in MODES}
    ends: dict[str, list[float]] = {mode: [] for mode in _RECORDING}
    for _ in range(_ENDS):
        # One round at least, however few the seconds are.
        until = time.perf_counter() + seconds / _ENDS
        while True:
            for mode, spent in training.round(steps_per_block).items():
                steps[mode].append(spent)
            if time.perf_counter() > until:
                break

        for mode in MODES:
            dispatches[mode] += [training.dispatch(mode) for _ in range(_DISPATCHES)]
        for mode in _RECORDING:
            ends[mode].append(training.end_epoch(mode))
    return _Samples(steps_per_block, steps, dispatches, ends)


def _costs(samples: _Samples, batch_size: int, steps_per_epoch: int) -> dict[str, Any]:
    """Returns seconds and rates of all modes, and what recording adds to a step and to an epoch."""
    medians = {mode: float(np.median(samples.steps[mode])) for mode in MODES}
    overheads = {mode: overhead(samples.steps["off"], samples.steps[mode]) for mode in _RECORDING}

    # An epoch costs what its steps do, and its end beside.
    of_epoch = {}
    plain_epoch = steps_per_epoch * medians["off"]
    for mode in _RECORDING:
        of_end = 100 * float(np.median(samples.ends[mode])) / plain_epoch
        of_epoch[mode] = overheads[mode]["percent"] + of_end

    return {
        "step_seconds": {mode: summary(samples.steps[mode]) for mode in MODES},
        "examples_per_second": {mode: batch_size / medians[mode] for mode in MODES},
        "step_overhead": overheads,
        "dispatch_seconds": {mode: summary(samples.dispatches[mode]) for mode in MODES},
        "epoch_end_seconds": {mode: summary(samples.ends[mode]) for mode in _RECORDING},
        "epoch_overhead_percent": of_epoch,
    }


def _peer_figures(peer: Peer, samples: _Samples, first_call: float, batch_size: int) -> dict[str, Any]:
    """Returns who the peer is, its seconds and its rate, and how many times as long ours takes."""
    seconds = summary(samples.steps[peer.name])
    return {
        "name": peer.name,
        "version": peer.version,
        "threads": peer.threads,
        "first_call_seconds": first_call,
        "step_seconds": seconds,
        "examples_per_second": batch_size / seconds["median"],
        "ratio": ratio(samples.steps[peer.name], samples.steps["off"]),
    }


def _make_scan(step: Callable, mesh: Mesh) -> Callable:
    """Compiles (state, data, order, epoch, learning_rate, seed) -> (state, losses [S]): a whole epoch of `step`."""

    def run(
        state: TrainState,
        data: ResidentData,
        order: Int[Array, "S B"],
        *rest: Array,
    ) -> tuple[TrainState, Float[Array, "S"]]:
        def body(carried: TrainState, ids: Int[Array, "B"]) -> tuple[TrainState, Array]:
            carried, loss, *_ = step(carried, data.batch(ids), *rest, None)
            return carried, loss

        return jax.lax.scan(body, state, order)

    return jit_on(run, mesh, donate_argnums=0)
