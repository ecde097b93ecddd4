"""A copy of a training set without what a scan removed."""

import os
import shutil
from pathlib import Path

import numpy as np

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import printable
from badloss_jax.core.progress import Progress
from badloss_jax.data.arrays import write_arrays_without

_ASIDE = ".badloss-copy"  # a file on its way; hidden, so that nobody takes it for an image


def check_target(data: str, workdir: Path, target: Path) -> None:
    """Checks that a cleaned copy of the training set can lie somewhere, before a scan takes its time.

    Args:
      data: that is scanned.
      workdir: of the scan.
      target: the folder or .npz file to be.

    Raises:
      UsageError: the data is of TFDS, the target is of another kind than the data, is a file that exists, or lies in
        the folder of the data or of the scan, or one of them in it.
    """
    source = Path(data).expanduser()
    if data.startswith("tfds:") or (source.suffix == ".npz") != (target.suffix == ".npz"):
        raise UsageError(
            f"--apply {target} for --data {data}: a folder of images becomes a folder, an .npz file another .npz file;"
            " of TFDS, leave out the rows of remove.txt when reading it"
        )

    if source.suffix == ".npz":
        if target.exists():
            raise UsageError(f"--apply {target} exists: choose another file")
        return

    if _overlap(target, source) or _overlap(target, workdir):
        raise UsageError(
            f"--apply {target} lies in --data {data} or --workdir {workdir}, or one of them in it: choose another"
            " folder"
        )


def _overlap(one: Path, other: Path) -> bool:
    """Returns whether one of two folders lies in the other, wherever links lead."""
    one = one.resolve()
    other = other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)


def write_cleaned(data: str, workdir: Path, target: Path, links: bool = False, progress: Progress | None = None) -> int:
    """Makes a copy of the training set without what a scan removed; a test set is not copied.

    Args:
      data: that was scanned: a folder of images, or an .npz file.
      workdir: of the scan.
      target: a new or empty folder, or what an interrupted call left there; of arrays, an .npz file.
      links: make links to the files of the training set, in place of copies.
      progress: tells how far it is; silent by default.

    Returns:
      How many examples it has.

    Raises:
      UsageError: the scan is not finished, or the target lies in the data's folder or holds something else.
      DataError: a file cannot be read or written.
    """
    check_target(data, workdir, target)
    source = Path(data).expanduser()
    keep = _read_list(workdir / "keep.txt")
    remove = _read_list(workdir / "remove.txt")

    if source.suffix == ".npz":
        rows = np.array([int(row) for row in remove], np.int64)
        write_arrays_without(source, target, rows)
        return len(keep)

    _check_files(target, keep)
    if progress is None:
        progress = Progress(None)
    progress.phase("applying")
    progress.begin(len(keep))

    root = source.resolve()
    for name in keep:
        # The list is a file that anybody may have changed.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{workdir / 'keep.txt'} has the path {printable(name)!r}, which leads out of the folder")
        _copy(root / name, target / name, links)
        progress.advance(1, "files")
        progress.say(f"{target}")

    progress.end()
    return len(keep)


def _read_list(path: Path) -> list[str]:
    """Reads one path or row number a line, whatever its bytes."""
    try:
        return [os.fsdecode(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error}): finish the scan first") from error


def _check_files(target: Path, keep: list[str]) -> None:
    """Refuses a target that holds other files than those to write, or than those on their way."""
    expected = set(keep)
    expected.update(str(Path(name).with_name(_ASIDE)) for name in keep)
    for path in target.rglob("*"):
        is_file = path.is_symlink() or not path.is_dir()
        if is_file and path.relative_to(target).as_posix() not in expected:
            raise UsageError(f"--apply {target} holds other files, such as {path}: choose a new or empty folder")


def _copy(old: Path, new: Path, link: bool) -> None:
    """Copies a file, or links to it, unless that was done before."""
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        if link and not new.is_symlink():
            new.unlink(missing_ok=True)
            new.symlink_to(old)
        elif not link and (new.is_symlink() or not new.is_file()):
            # Whoever is interrupted leaves no half of a file under its name.
            aside = new.with_name(_ASIDE)
            shutil.copyfile(old, aside)
            aside.replace(new)
    except OSError as error:
        raise DataError(f"{new} cannot be made of {old}: {error}") from error
