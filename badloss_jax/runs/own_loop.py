"""Recording in a training loop of your own, in PyTorch, JAX or NumPy: three lines there, scores of every example after.

A saved recorder is a `TrajectoryStore`, which `badloss score --trajectories` takes, and what it was made with:

    DIR/recorder.json    num_classes, num_features, ...
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import check_free, write_text
from badloss_jax.core.hashing import digest
from badloss_jax.core.mesh import by_rows, make_mesh, replicated
from badloss_jax.runs.recorder_settings import (
    SETTINGS,
    SETTINGS_FILE,
    check_made_alike,
    checked_sizes,
    kinds_of,
    put_in_place,
    read_settings,
)
from badloss_jax.runs.recorder_values import check_finite, fill_missing, on_devices, shapes_of
from badloss_jax.scoring.buffer_scores import Request, Scores, score_buffer
from badloss_jax.trajectories.batches import check, integer, integers, make_update, padded, take, write_batch
from badloss_jax.trajectories.buffer import Buffer, column_of, create_buffer, local_runs, padding_id
from badloss_jax.trajectories.kinds import Kinds
from badloss_jax.trajectories.store import TrajectoryStore


@dataclass(eq=False)
class TrajectoryRecorder:
    """Records what a training loop of any framework sees of each example, and scores the examples by it.

    In PyTorch, with a data set that returns the index of each example, too:

        recorder = badloss_jax.TrajectoryRecorder(len(dataset), num_epochs, num_classes=10, num_features=512)
        for epoch in range(num_epochs):
            for ids, images, labels in loader:
                features = backbone(images)
                logits = head(features)
                losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                recorder.update(losses, ids, epoch, logits=logits, features=features, labels=labels)
        scores = recorder.score(probe_ids)  # ids of examples that are known to be clean
        suspects = np.flatnonzero(scores.p_values <= 0.01)

    In a jitted step, where the buffer is donated like the state, and padded batches have ids past the end:

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(state, buffer, batch, epoch):
            (_, (losses, logits)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params, batch)
            buffer = recorder.write(buffer, losses, batch["id"], epoch, logits=logits, labels=batch["label"])
            return state.apply_gradients(grads=gradients), buffer

        recorder = badloss_jax.TrajectoryRecorder(num_examples, num_epochs, num_classes=10)
        buffer = recorder.init()
        for epoch in range(num_epochs):
            for batch in batches:
                state, buffer = step(state, buffer, batch, epoch)
        recorder.adopt(buffer)
        scores = recorder.score(probe_ids)

    The buffer takes N T (4 + 2 (m + 1) + 2 d) bytes. Beside PyTorch on a GPU, a JAX for CUDA is to leave it memory:
    XLA_PYTHON_CLIENT_PREALLOCATE=false. Of many processes each has a recorder, for the ids that it sees; `merge` them.

    Attributes:
      num_examples: N; ids are 0 to N - 1.
      num_epochs: T, at least 3.
      num_classes: K; each batch comes with logits and labels, for the kind "ranked". None records no such kind.
      num_features: F; each batch comes with features, the penultimate layer's, for the kind "features", and with
        logits for "combined", which found most. None records no such kind.
      feature_dim: d, columns of the random projection of the features.
      ranked_others: m, how many of the other classes' log-probabilities, at most K - 1.
      keep_logits: record the kind "logits", too: K values an example and epoch.
      seed: of the projection.
      mesh: the devices of this process that share the rows, by default the first.

    Raises:
      UsageError: a size is impossible, or the mesh spans processes.
    """

    num_examples: int
    num_epochs: int
    num_classes: int | None = field(default=None, kw_only=True)
    num_features: int | None = field(default=None, kw_only=True)
    feature_dim: int = field(default=64, kw_only=True)
    ranked_others: int = field(default=5, kw_only=True)
    keep_logits: bool = field(default=False, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    mesh: Mesh = field(default_factory=lambda: make_mesh(jax.local_devices()[:1]), kw_only=True)
    kinds: Kinds = field(init=False, repr=False)
    _buffer: Buffer | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, size in checked_sizes(vars(self)).items():
            setattr(self, name, size)

        self.mesh = make_mesh(list(self.mesh.devices.flat))
        if self.mesh.is_multi_process:
            raise UsageError("the mesh spans processes: give each a recorder on devices of its own, and merge them")

        self.kinds = kinds_of(self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        """What a saved recorder says that it was made with."""
        return {name: getattr(self, name) for name in SETTINGS}

    def init(self) -> Buffer:
        """Makes an empty buffer for `write`.

        Returns:
          kind -> [N', T, ...] of NaN; N' is N rounded up to a multiple of the devices.
        """
        return create_buffer(self.kinds, self.num_examples, self.num_epochs, self.mesh)

    @property
    def buffer(self) -> Buffer:
        """What was recorded; made when it is first asked for.

        Raises:
          UsageError: it was adopted, and donated to a step after that.
        """
        if self._buffer is None:
            self._buffer = self.init()
        if any(array.is_deleted() for array in self._buffer.values()):
            raise UsageError("the recorder's buffer was donated to a later step: adopt the one which that returned")
        return self._buffer

    def adopt(self, buffer: Buffer) -> None:
        """Takes a buffer that `write` has filled, in place of what the recorder held.

        Args:
          buffer: kind -> [N', T, ...], as `init` makes it; the recorder keeps it until it is donated.

        Raises:
          UsageError: it is not of this recorder's kinds and sizes.
        """
        expected = shapes_of(jax.eval_shape(self.init))
        given = shapes_of(buffer)
        if given != expected:
            raise UsageError(f"the buffer is {given}: expected {expected}, as init() makes it")
        self._buffer = jax.device_put(buffer, by_rows(self.mesh))

    def write(
        self,
        buffer: Buffer,
        losses: Float[Array, "B"],
        example_ids: Int[Array, "B"],
        epoch: Int[Array, ""] | int,
        *,
        logits: Float[Array, "B K"] | None = None,
        features: Float[Array, "B F"] | None = None,
        labels: Int[Array, "B"] | None = None,
    ) -> Buffer:
        """Writes a batch into column `epoch` of a buffer, for use inside jit.

        Of an id that is twice in a batch, either counts. A value that is not finite counts as not recorded.

        Args:
          buffer: kind -> [N', T, ...], as `init` makes it; donate it, else every step copies it.
          losses: floats [B], of the examples, before any mean.
          example_ids: integers [B]; rows whose id is outside of 0 to N - 1, such as padding, are dropped.
          epoch: 0 to T - 1; nothing is recorded in others.
          logits: floats [B, K], with num_classes.
          features: floats [B, F], the penultimate layer's, with num_features.
          labels: integers [B], 0 to K - 1, with num_classes.

        Returns:
          The buffer with the batch in it.

        Raises:
          UsageError: shapes or dtypes that do not fit, or something that the recorder was made for is missing.
        """
        given = {"losses": losses, "example_ids": example_ids, "logits": logits, "features": features, "labels": labels}
        batch = {name: jnp.asarray(value) for name, value in given.items() if value is not None}
        check(batch, self.kinds)
        return write_batch(buffer, batch, jnp.asarray(epoch), self.kinds)

    def update(
        self,
        losses: Any,
        example_ids: Any,
        epoch: int,
        *,
        logits: Any = None,
        features: Any = None,
        labels: Any = None,
    ) -> None:
        """Records a batch, of JAX or NumPy arrays, PyTorch tensors, or lists; of an id that is twice in it, the last.

        Args:
          losses: floats [B], of the examples, before any mean.
          example_ids: integers [B], 0 to N - 1.
          epoch: 0 to T - 1.
          logits: floats [B, K], with num_classes.
          features: floats [B, F], the penultimate layer's, with num_features.
          labels: integers [B], 0 to K - 1, with num_classes.

        Raises:
          UsageError: shapes, dtypes or values that do not fit, or something that the recorder was made for is missing.
          NonFiniteLossError: a loss, logit or feature is NaN or infinite (epoch and ids are named).
            Either way nothing of the batch is recorded.

        Example:
          >>> import numpy as np
          >>> from badloss_jax import TrajectoryRecorder
          >>> recorder = TrajectoryRecorder(num_examples=3, num_epochs=3)
          >>> recorder.update(np.array([0.5, 2.0]), np.array([0, 2]), epoch=0)
          >>> np.asarray(recorder.buffer["loss"][:, 0]).tolist()
          [0.5, nan, 2.0]
        """
        given = {"losses": losses, "example_ids": example_ids, "logits": logits, "features": features, "labels": labels}
        batch = take(given, self.num_examples, self.kinds)
        column = integer("epoch", epoch, 0, self.num_epochs - 1)
        ids = batch["example_ids"]

        # Padded, so that batches of all sizes compile a few programs.
        batch = jax.device_put(padded(batch, padding_id(self.num_examples, self.mesh)), replicated(self.mesh))
        step = make_update(self.kinds, self.mesh)
        # Waited for: what came without a copy may be overwritten by whoever owns it.
        self._buffer, finite = jax.block_until_ready(step(self.buffer, batch, np.int32(column)))
        check_finite(finite, ids, column)

    def score(
        self,
        probe_ids: Any,
        k: int | None = None,
        kind: str | None = None,
        *,
        epochs: int | None = None,
        incomplete: str = "error",
        labels: Any = None,
        by_class: bool = False,
    ) -> Scores:
        """Scores every example by its distance to the k nearest probes.

        Args:
          probe_ids: integers [P], examples that are known to be clean, P at least 2.
          k: 1 to P - 1, by default what `badloss_jax/settings.py` says, but at most P - 1.
          kind: by default the first of "combined", "features", "ranked", "loss" that was recorded.
          epochs: score the first so many, by default all.
          incomplete: of examples that lack an epoch: "error", or "exclude" to leave them out.
          labels: integers [N], as trained on: looks for attacks, too, if features or ranked were recorded.
          by_class: put every class on the scale of its own probes, so that a hard or small one is not suspicious as a
            whole; needs labels.

        Returns:
          Distances and p-values [N], the epochs that they are of, and attacks.

        Raises:
          UsageError: an argument is impossible, or examples lack an epoch (how many, ids and epochs are named).

        Example:
          >>> import numpy as np
          >>> from badloss_jax import TrajectoryRecorder
          >>> recorder = TrajectoryRecorder(num_examples=40, num_epochs=3)
          >>> losses = np.random.default_rng(0).uniform(0.9, 1.1, size=40)
          >>> for epoch in range(3):
          ...     losses[:39] *= 0.5  # all but the last are learnt
          ...     recorder.update(losses, np.arange(40), epoch)
          >>> scores = recorder.score(probe_ids=np.arange(30), k=5)
          >>> int(np.argmax(scores.distances))
          39
          >>> round(float(scores.p_values[39]), 3)  # 1 / (P + 1): no probe lies further out
          0.032
        """
        request = Request(probe_ids, k, kind, epochs, incomplete, labels, by_class)
        return score_buffer(self.buffer, self.num_examples, request, self.mesh)

    def save(self, folder: Path | str, *, labels: Any = None) -> None:
        """Writes a trajectory store; what was saved there before stays until the new one is whole.

        Args:
          folder: new or empty, or one that `save` wrote.
          labels: integers [N], for `badloss score` to show; by default -1, unknown.

        Raises:
          UsageError: the folder holds other files, or labels do not fit.
          DataError: a file cannot be written.

        Example:
          >>> import tempfile
          >>> from badloss_jax import TrajectoryRecorder
          >>> recorder = TrajectoryRecorder(num_examples=3, num_epochs=3)
          >>> recorder.update([0.5, 2.0], [0, 2], epoch=0)
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     recorder.save(folder)
          ...     same = TrajectoryRecorder.load(folder)
          >>> same.update([1.0], [1], epoch=0)  # recording goes on
          >>> same.buffer["loss"][:, 0].tolist()
          [0.5, 1.0, 2.0]
        """
        folder = Path(folder).resolve()
        check_free(folder, SETTINGS_FILE, option="", hidden_too=True)
        classes = np.full(self.num_examples, -1)
        if labels is not None:
            classes = integers("labels", labels, 2**31)
        if len(classes) != self.num_examples:
            raise UsageError(f"there are {len(classes)} labels for {self.num_examples} examples")

        # Written beside it, so that a failure leaves what was saved before.
        beside = folder.with_name(f".{folder.name}.new")
        no_probe = np.zeros(self.num_examples, bool)
        layout = self.kinds.layout()
        store = TrajectoryStore.create(beside, digest(self._settings), classes, no_probe, self.num_epochs, layout)
        for epoch in range(self.num_epochs):
            column = column_of(self.buffer, np.int32(epoch))
            runs = local_runs(column, self.num_examples, self.mesh)
            store.write_epoch(epoch, {kind: run for kind, (run,) in runs.items()})
        write_text(beside / SETTINGS_FILE, json.dumps(self._settings))
        put_in_place(beside, folder)

    @classmethod
    def load(cls, folder: Path | str, *, mesh: Mesh | None = None) -> "TrajectoryRecorder":
        """Reads what `save` wrote; recording can go on.

        Args:
          folder: that `save` wrote.
          mesh: the devices of this process that share the rows, by default the first.

        Returns:
          A recorder that holds the same.

        Raises:
          DataError: it is missing or damaged.
        """
        store = TrajectoryStore.open(Path(folder))
        settings = read_settings(store)
        if mesh is not None:
            settings["mesh"] = mesh
        try:
            recorder = cls(store.num_examples, store.num_epochs, **settings)
        except UsageError as error:
            raise DataError(f"{store.folder / SETTINGS_FILE} is missing or damaged: {error}") from error

        layout = {kind: (shape, dtype.name) for kind, (shape, dtype) in recorder.kinds.layout().items()}
        if layout != store.layout:
            raise DataError(f"{store.folder} holds {store.layout}, and recorder.json speaks of {layout}")
        values = {kind: store.rows(kind, check=False)[:] for kind in layout}
        recorder._buffer = on_devices(values, recorder.mesh)
        return recorder

    @classmethod
    def merge(
        cls, parts: Iterable["Path | str | TrajectoryRecorder"], *, mesh: Mesh | None = None
    ) -> "TrajectoryRecorder":
        """Puts together what several recorders, or saved ones, saw; a cell that two recorded is the first's.

        Args:
          parts: recorders, or folders that they saved, all made with the same sizes and settings.
          mesh: the devices of this process that share the rows, by default those of the first part.

        Returns:
          A new recorder; the parts stay as they are.

        Raises:
          UsageError: there are none, or they were made differently (both values are named).
          DataError: a folder is damaged.

        Example:
          >>> from badloss_jax import TrajectoryRecorder
          >>> parts = [TrajectoryRecorder(num_examples=3, num_epochs=3) for _ in range(2)]
          >>> parts[0].update([0.5, 2.0], [0, 2], epoch=0)
          >>> parts[1].update([1.0, 9.0], [1, 2], epoch=0)
          >>> whole = TrajectoryRecorder.merge(parts)
          >>> whole.buffer["loss"][:, 0].tolist()
          [0.5, 1.0, 2.0]
        """
        whole: TrajectoryRecorder | None = None
        merged: dict[str, np.ndarray] = {}
        for number, part in enumerate(parts):
            recorder = cls.load(part) if isinstance(part, Path | str) else part
            if whole is None:
                whole = replace(recorder, mesh=mesh or recorder.mesh)
            check_made_alike(whole, recorder, number)

            values = {kind: np.asarray(array)[: recorder.num_examples] for kind, array in recorder.buffer.items()}
            if not merged:
                merged = {kind: array.copy() for kind, array in values.items()}
            fill_missing(merged, values)

        if whole is None:
            raise UsageError("there is nothing to merge: expected recorders, or folders that they saved")
        whole._buffer = on_devices(merged, whole.mesh)
        return whole
