"""The programs that a run consists of, with shapes in place of arrays, for a machine that need not be there.

They are the very functions that a run calls. Begin with `Programs.all`; `compiling` says what each takes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from badloss_jax.core.memory import free_on_devices
from badloss_jax.core.mesh import AnyMesh, abstract_mesh, by_rows, make_mesh, pass_batch_size, replicated
from badloss_jax.core.program import bytes_on_device
from badloss_jax.core.topology import Topology, compiler_devices, local_topology, why_not_compiled
from badloss_jax.runs.images import Images
from badloss_jax.runs.phases import records
from badloss_jax.runs.recording import Recording
from badloss_jax.runs.trainer import recipe_of, spec_of
from badloss_jax.scoring import parts_of
from badloss_jax.scoring.kernels import on_devices
from badloss_jax.scoring.rows import rows_of_chunk
from badloss_jax.training.footprint import constants_of, shapes_of_batch
from badloss_jax.training.loop import Recipe
from badloss_jax.training.recorder import step_kinds, sweep_kinds, written_by_steps
from badloss_jax.training.state import TrainState, shapes_of_state
from badloss_jax.training.step import make_sweep_step, make_train_step
from badloss_jax.trajectories.buffer import column_bytes, make_write, shapes_of_column
from badloss_jax.trajectories.kinds import Kinds

_QUICK = "--quick"


@dataclass(frozen=True)
class Machine:
    """What programs are for.

    Attributes:
      topology: its chips.
      mesh: of them, or of their number alone where nothing can be compiled for them.
      code_mesh: for which programs are made: the same, or a device that is here.
      why_not: nothing is compiled; "" if it is.
    """

    topology: Topology
    mesh: AnyMesh
    code_mesh: Mesh
    why_not: str = ""

    @classmethod
    def of(cls, topology: Topology | None, *, quick: bool = False) -> "Machine":
        """Returns the machine of a topology.

        Args:
          topology: its chips; None is the machine that is here.
          quick: compile nothing.
        """
        if topology is None:
            mesh = make_mesh()
            here = local_topology(list(mesh.devices.flat), free_on_devices(mesh) or 0)
            return cls(here, mesh, mesh, _QUICK if quick else "")

        why_not = _QUICK if quick else why_not_compiled(topology)
        if why_not:
            return cls(topology, abstract_mesh(topology.size), make_mesh(jax.local_devices()[:1]), why_not)
        mesh = make_mesh(compiler_devices(topology))
        return cls(topology, mesh, mesh)

    @property
    def platform(self) -> str:
        """Of the chips, in JAX's words."""
        if self.topology.chip:
            return "cuda" if self.topology.chip.platform == "gpu" else self.topology.chip.platform
        return self.code_mesh.devices.flat[0].platform


@dataclass(frozen=True)
class Program:
    """A jitted function of a run, and what it is called with.

    Attributes:
      name: what it is.
      phase: "recording", "scoring" or "retraining".
      function: jitted.
      arguments: of `jax.ShapeDtypeStruct`.
      calls: how often the run calls it.
      rows: of a call, of all devices together: images, or trajectories.
      updated: those of the arguments that are to be updated in place.
      beside: bytes of what lies on each device at the time, without being an argument.
      sums: bytes that devices have to add up at each call, by arithmetic.
      gathers: bytes that each device has to be given, likewise.
      keeps: whether what its convolutions leave counts as temporaries, by arithmetic; `temporaries` if it does not.
      temporaries: bytes on each device, by arithmetic.
    """

    name: str
    phase: str
    function: Any
    arguments: tuple[PyTree, ...]
    calls: int
    rows: int
    updated: PyTree = field(default=None)
    beside: int = 0
    sums: int = 0
    gathers: int = 0
    keeps: bool = False
    temporaries: int = 0


@dataclass(frozen=True)
class Programs:
    """All programs of a run on a machine.

    Attributes:
      config: of the run.
      images: that it trains on.
      machine: that it runs on.
    """

    config: ConfigDict
    images: Images
    machine: Machine

    @cached_property
    def recording(self) -> Recording:
        """The training that trajectories are recorded of."""
        spec = spec_of(self.config, self.images.shape, self.images.classes, self.config.model.name)
        return Recording.of(self.config, spec, ())

    @property
    def retraining(self) -> Recipe:
        """How the other networks are trained."""
        settings = self.config.retraining
        return recipe_of(self.config, settings.epochs, settings.epochs, settings.batch_size, settings.augment)

    @cached_property
    def state(self) -> TrainState:
        """The shapes of a training's state, which each device holds whole."""
        recipe = self.retraining
        state = shapes_of_state(self.recording.spec, recipe.optimizer, self.machine.code_mesh, recipe.objective)
        sharding = replicated(self.machine.mesh)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)

    def all(self, retrainings: int) -> list[Program]:
        """Lists the programs.

        Args:
          retrainings: how many networks are trained beside that which trajectories are recorded of.
        """
        programs = []
        if records(self.config):
            programs += self._of_recording()
        programs += self._of_scoring()
        if retrainings:
            epochs = retrainings * self.retraining.epochs
            programs.append(self._training("retraining step", "retraining", self.retraining, None, epochs))
        return programs

    def _of_recording(self) -> list[Program]:
        """Lists what trains, sweeps and writes."""
        recording = self.recording
        recipe = recording.recipe
        kinds = recording.kinds
        mesh = self.machine.mesh

        observed = step_kinds(kinds, recording.capture)
        programs = [self._training("training step", "recording", recipe, observed, recipe.epochs)]
        written = written_by_steps(kinds, recording.capture)
        if written:
            programs.append(self._write("write of a step", written, written, recipe.batch_size))

        if recording.capture == "sweep":
            batch_size = pass_batch_size(self.config.evaluation.batch_size, mesh)
            swept = sweep_kinds(kinds)
            programs.append(
                Program(
                    name="sweep step",
                    phase="recording",
                    function=make_sweep_step(recording.spec, swept, self.machine.code_mesh),
                    arguments=(self.state, shapes_of_batch(recording.spec, batch_size, mesh)),
                    calls=recipe.epochs * -(-self.images.examples // batch_size),
                    rows=batch_size,
                    beside=column_bytes(kinds, self.images.examples, mesh),
                    keeps=True,
                )
            )
            programs.append(self._write("write of a sweep", tuple(kinds.layout()), swept.observed, batch_size))
        return programs

    def _training(self, name: str, phase: str, recipe: Recipe, kinds: Kinds | None, epochs: int) -> Program:
        """Returns the step that trains, for so many epochs of all trainings of a phase."""
        recording = self.recording
        mesh = self.machine.mesh
        state = self.state
        function = make_train_step(
            recording.spec, recipe.optimizer, recipe.objective, recipe.augment, kinds, self.machine.code_mesh
        )
        beside = 0
        written = written_by_steps(recording.kinds, recording.capture)
        if phase == "recording":
            beside = bytes_on_device(shapes_of_column(recording.kinds, written, self.images.examples, mesh), mesh.size)

        # Gradients are of the computation's dtype, as it is their sum over the devices.
        numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
        return Program(
            name=name,
            phase=phase,
            function=function,
            arguments=(state, shapes_of_batch(recording.spec, recipe.batch_size, mesh), *constants_of(mesh), None),
            calls=epochs * -(-self.images.examples // recipe.batch_size),
            rows=recipe.batch_size,
            updated=state,
            beside=beside,
            sums=numbers * np.dtype(recording.spec.dtype).itemsize,
            keeps=True,
        )

    def _write(self, name: str, held: Sequence[str], written: Sequence[str], batch_size: int) -> Program:
        """Returns the write of some kinds of a batch into a column that holds these and perhaps others."""
        recording = self.recording
        mesh = self.machine.mesh
        column = shapes_of_column(recording.kinds, held, self.images.examples, mesh)
        sharding = by_rows(mesh)
        ids = jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=sharding)

        # An id of four bytes, and each value in the column's dtype.
        gathered = 4 * batch_size
        values = {}
        for kind in written:
            width = column[kind].shape[1:]
            values[kind] = jax.ShapeDtypeStruct((batch_size, *width), np.float32, sharding=sharding)
            gathered += batch_size * math.prod(width) * column[kind].dtype.itemsize
        return Program(
            name=name,
            phase="recording",
            function=make_write(self.machine.code_mesh),
            arguments=(column, ids, values),
            calls=recording.recipe.epochs * -(-self.images.examples // batch_size),
            rows=batch_size,
            updated=column,
            beside=bytes_on_device(self.state, mesh.size),
            gathers=gathered,
            temporaries=gathered,
        )

    def _of_scoring(self) -> list[Program]:
        """Lists the scorer's kernels, of each kind its own; on CPUs another kernel does their work."""
        if self.machine.platform == "cpu":
            return []
        recording = self.recording
        mesh = self.machine.mesh
        epochs = self.config.scoring.epochs or recording.recipe.epochs
        num_probes = self.config.probes.count
        layout = recording.kinds.layout()
        parts: dict[str, int] = {}
        for kind in self.config.scoring.kinds:
            parts |= parts_of(kind, self.config.scoring)

        programs = []
        for part, k in parts.items():
            shape, _ = layout[part]
            length = epochs * math.prod(shape)
            own_rows = -(-self.images.examples // mesh.size)
            share = min(own_rows, rows_of_chunk(length, num_probes, self.machine.platform))
            rows = jax.ShapeDtypeStruct((share * mesh.size, length), np.float32, sharding=by_rows(mesh))
            probes = jax.ShapeDtypeStruct((num_probes, length), np.float32, sharding=replicated(mesh))
            programs.append(
                Program(
                    name=f"scorer of {part}",
                    phase="scoring",
                    function=on_devices(k, self.machine.code_mesh),
                    arguments=(rows, probes, None),
                    calls=-(-own_rows // share),
                    rows=share * mesh.size,
                    beside=share * length * 4,  # the next chunk
                    temporaries=share * num_probes * 4,
                )
            )
        return programs
