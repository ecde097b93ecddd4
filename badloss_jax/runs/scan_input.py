"""What a scan is given: a training set in one of several forms, and what about it calls for caution."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import ConfigDict

from badloss_jax.config import default_config, override
from badloss_jax.core.errors import UsageError
from badloss_jax.core.files import printable
from badloss_jax.core.progress import Progress
from badloss_jax.data.training_set import (
    TrainingSet,
    list_folder,
    read_arrays,
    read_folder,
    read_tfds,
    suggested_size,
)
from badloss_jax.scoring import unsupported
from badloss_jax.settings import parse_rule

_NAMED = 5  # classes in a warning


@dataclass(frozen=True)
class ScanRequest:
    """What a scan is asked for, as `scan` takes it.

    Attributes:
      data: a folder, an .npz file, or tfds:NAME.
      probes: a file of names, a folder of trusted images, or how many to draw.
      workdir: the folder to write to.
      overrides: `--config.KEY=VALUE`.
      minutes: that it may take.
      follow_links: read files that links lead to outside of the data's folder, too.
      progress: is told how far it is.
      mesh: the devices.
    """

    data: str
    probes: str
    workdir: Path
    overrides: Sequence[str]
    minutes: float
    follow_links: bool
    progress: Progress
    mesh: Mesh

    @property
    def trusted_folder(self) -> Path | None:
        """The folder of trusted images, if the probes are one."""
        folder = Path(self.probes).expanduser()
        return folder if folder.is_dir() else None


def read_training_set(request: ScanRequest) -> tuple[TrainingSet, ConfigDict]:
    """Reads the training set.

    Args:
      request: of which the overrides of `config.data` say how it is read; trusted images beside the data are read with
        it.

    Returns:
      It, and the default config with how it was read.

    Raises:
      UsageError: there is no such data, or folders lie in one another.
      DataError: a file is damaged.
    """
    config = default_config()
    read = _reader(request, config)

    # The folder that is written must not lie in what is read, nor the other way round.
    read_only = {"--data": Path(config.data.dir).expanduser()}
    if request.trusted_folder:
        read_only["--probes"] = request.trusted_folder
    out = request.workdir.resolve()
    for option, folder in read_only.items():
        if out.is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(out):
            raise UsageError(
                f"--workdir {request.workdir} and {option} {folder} lie in one another: your images' folders are never"
                " written, choose another for the scan"
            )

    of_data = [text for text in request.overrides if text.startswith("--config.data.")]
    return read(override(config, of_data).data), config


def _reader(request: ScanRequest, config: ConfigDict) -> Callable[[ConfigDict], TrainingSet]:
    """Returns what reads this form of data, and sets `config.data` to it."""
    data = request.data
    if data.startswith("tfds:"):
        name = Path(data.removeprefix("tfds:")).expanduser()
        home = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
        folder = name if name.is_dir() else home / name
        config.data.update(source="tfds", dir=str(folder))
        return read_tfds
    if Path(data).suffix == ".npz":
        config.data.update(source="arrays", dir=data)
        return read_arrays

    listing = list_folder(Path(data).expanduser(), request.follow_links)
    size, channels = suggested_size(listing)
    config.data.update(source="image_folder", dir=str(listing.root), image_size=size, channels=channels)

    # Trusted images within the data's folder are in its own listing.
    trusted = request.trusted_folder
    beside = None
    if trusted and not trusted.resolve().is_relative_to(listing.root):
        beside = list_folder(trusted, request.follow_links, listing.class_names)
    return partial(read_folder, listing, trusted=beside)


def describe(request: ScanRequest, config: ConfigDict, examples: TrainingSet, probe_ids: Int[np.ndarray, "P"]) -> None:
    """Says in a few lines what is about to be done, and warns of what about it calls for caution.

    Args:
      request: of the scan.
      config: its config.
      examples: the training set.
      probe_ids: int [P].
    """
    height, width, channels = examples.image_shape
    request.progress.note(
        f"{len(examples.names):,} images of {height} x {width} x {channels} in {examples.num_classes} classes,"
        f" {len(probe_ids)} of them probes; batches of {config.recording.batch_size} (--config.KEY=VALUE changes it)"
    )

    if examples.left_out:
        name, reason = next(iter(examples.left_out.items()))
        _warn(
            f"left out {len(examples.left_out):,} files, such as {printable(name)}: {reason}; all are in left_out.txt"
        )
    if request.probes.isdigit():
        _warn(
            "the probes were drawn at random and nobody looked at them: where a share of the images is poisoned, about"
            " that share of the probes is, too, and less is found"
        )

    without = np.setdiff1d(examples.split.labels, examples.split.labels[probe_ids])
    if len(without):
        names = ", ".join(printable(examples.class_names[label]) for label in without[:_NAMED])
        if len(without) > _NAMED:
            names += ", ..."
        _warn(
            f"{len(without)} of {examples.num_classes} classes have no probe ({names}): their images are judged by the"
            " probes of others"
        )

    rule, level = parse_rule(config.rejection.rules[0], config.rejection)
    reason = unsupported(rule, level, len(probe_ids))
    if reason:
        _warn(f"--config.rejection.{reason}")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
