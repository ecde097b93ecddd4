"""Optional copies of the metrics for TensorBoard and Weights & Biases; their packages are imported when asked for.

metrics.jsonl is always written. Models that were finished before are not written again. A new writer is a class with
`start`, `write` and `close`, and one line in `_WRITERS`.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ml_collections import ConfigDict

from badloss_jax.config import config_hash, to_dict
from badloss_jax.core.errors import UsageError
from badloss_jax.core.hashing import digest


class Writer(Protocol):
    """Takes the scalars of one model after the other."""

    def start(self, model: str, epoch: int) -> None:
        """Is told before a model is trained, perhaps for the second time.

        Args:
          model: its name.
          epoch: from which on.
        """

    def write(self, model: str, values: Mapping[str, float], epoch: int) -> None:
        """Adds scalars of an epoch.

        Args:
          model: its name.
          values: tag -> value.
          epoch: from 0.
        """

    def close(self) -> None:
        """Ends."""


class TensorBoardWriter:
    """One TensorBoard run a model, under tensorboard/ in the folder of the run."""

    def __init__(self, folder: Path, config: ConfigDict):
        self._package = _require("tensorboardX", "tensorboard")
        self._folder = folder / "tensorboard"
        self._open: dict[str, Any] = {}

    def start(self, model: str, epoch: int) -> None:
        """Removes the events that an interrupted training left, from the epoch on.

        Args:
          model: its name.
          epoch: from which on it is trained.
        """
        if not epoch:
            shutil.rmtree(self._path(model), ignore_errors=True)

        self._open[model] = self._package.SummaryWriter(str(self._path(model)), purge_step=epoch or None)

    def write(self, model: str, values: Mapping[str, float], epoch: int) -> None:
        """Adds scalars; all models share the tags, so that TensorBoard shows them in one chart.

        Args:
          model: its name.
          values: tag -> value.
          epoch: from 0.
        """
        for tag, value in values.items():
            self._open[model].add_scalar(tag, value, epoch)
        self._open[model].flush()

    def close(self) -> None:
        """Closes the event files."""
        for writer in self._open.values():
            writer.close()

    def _path(self, model: str) -> Path:
        return self._folder / model.replace("/", "-")


class WandbWriter:
    """One Weights & Biases run for the folder, with a group of charts a model; WANDB_MODE=offline keeps it local."""

    def __init__(self, folder: Path, config: ConfigDict):
        package = _require("wandb", "wandb")
        try:
            self._run = package.init(
                project="badloss_jax",
                name=folder.resolve().name,
                dir=str(folder),
                config=to_dict(config),
                id=digest(str(folder.resolve()), config_hash(config)),
                resume="allow",
            )
        except package.errors.Error as error:
            raise UsageError(
                f"report.writers has 'wandb', which does not start: {error}; WANDB_MODE=offline keeps it local"
            ) from error

    def start(self, model: str, epoch: int) -> None:
        """Gives the model's charts its own epochs as their axis; a second training's points join the first's.

        Args:
          model: its name.
          epoch: from which on it is trained.
        """
        self._run.define_metric(f"{model}/*", step_metric=f"{model}/epoch")

    def write(self, model: str, values: Mapping[str, float], epoch: int) -> None:
        """Logs scalars.

        Args:
          model: its name.
          values: tag -> value.
          epoch: from 0.
        """
        scalars: dict[str, float] = {f"{model}/{tag}": value for tag, value in values.items()}
        scalars[f"{model}/epoch"] = epoch
        self._run.log(scalars)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


_WRITERS: dict[str, Callable[[Path, ConfigDict], Writer]] = {"tensorboard": TensorBoardWriter, "wandb": WandbWriter}


@contextmanager
def open_writers(folder: Path, config: ConfigDict) -> Iterator[Sequence[Writer]]:
    """Opens the writers of `config.report.writers`, and closes them however the run ends.

    Args:
      folder: of the run.
      config: of the run.

    Yields:
      The writers.

    Raises:
      UsageError: a writer's package is not installed; says how to install it.
    """
    with ExitStack() as stack:
        writers = []
        for name in config.report.writers:
            writer = _WRITERS[name](folder, config)
            # At once: a writer that cannot be opened closes those before it.
            stack.callback(writer.close)
            writers.append(writer)

        yield writers


def _require(package: str, extra: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError as error:
        raise UsageError(
            f"report.writers has {extra!r}, and {package} is not installed: pip install 'badloss_jax[{extra}]'"
        ) from error
