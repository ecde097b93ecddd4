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
    """Raises UsageError if a cleaned copy of the training set cannot lie there, before a scan takes its time."""
    source = Path(data).expanduser()
    if data.startswith("tfds:") or (source.suffix == ".npz") != (target.suffix == ".npz"):
        raise UsageError(f"--apply {target} for --data {data}: a folder of images becomes a folder, an .npz file"
                         " another .npz file; of TFDS, leave out the rows of remove.txt when reading it")  # fmt: skip
    if source.suffix == ".npz":
        if target.exists():
            raise UsageError(f"--apply {target} exists: choose another file")
        return
    root, end, out = source.resolve(), target.resolve(), workdir.resolve()
    if end.is_relative_to(root) or root.is_relative_to(end) or end.is_relative_to(out) or out.is_relative_to(end):
        raise UsageError(f"--apply {target} lies in --data {data} or --workdir {workdir}, or one of them in it: choose"
                         " another folder")  # fmt: skip


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
    progress, source, lists = progress or Progress(None), Path(data).expanduser(), {}
    for name in ("keep.txt", "remove.txt"):
        try:
            lists[name] = [os.fsdecode(line) for line in (workdir / name).read_bytes().splitlines()]
        except OSError as error:
            raise UsageError(f"{workdir / name} cannot be read ({error}): finish the scan first") from error
    keep = lists["keep.txt"]
    if source.suffix == ".npz":
        write_arrays_without(source, target, np.array([int(row) for row in lists["remove.txt"]], np.int64))
        return len(keep)
    root = source.resolve()
    wanted = {*keep, *(str(Path(name).with_name(_ASIDE)) for name in keep)}
    found = (path for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
    strangers = [path for path in found if path.relative_to(target).as_posix() not in wanted]
    if strangers:
        raise UsageError(f"--apply {target} holds other files, such as {strangers[0]}: choose a new or empty folder")
    progress.phase("applying")
    progress.begin(len(keep))
    for name in keep:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{workdir / 'keep.txt'} has the path {printable(name)!r}, which leads out of the folder")
        old, new = root / name, target / name
        try:
            new.parent.mkdir(parents=True, exist_ok=True)
            if links and not new.is_symlink():
                new.unlink(missing_ok=True)
                new.symlink_to(old)
            elif not links and (new.is_symlink() or not new.is_file()):
                aside = new.with_name(_ASIDE)
                shutil.copyfile(old, aside)
                aside.replace(new)
        except OSError as error:
            raise DataError(f"{new} cannot be made of {old}: {error}") from error
        progress.advance(1, "files")
        progress.say(f"{target}")
    progress.end()
    return len(keep)
