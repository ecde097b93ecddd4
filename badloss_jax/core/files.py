"""Files written aside and renamed, so that a reader never sees half of one; locked folders; JSON read without trust."""

import fcntl
import json
import os
import tempfile
import time
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from badloss_jax.core.errors import BusyError, DataError, UsageError

# What NumPy and zipfile raise on a damaged or hostile .npz file.
NPZ_ERRORS = (
    OSError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a path beside `path` and renames what it wrote; on failure `path` stays as it was.

    Args:
      path: the file; its folders are made.
      write: gets a path with the same suffix, and writes there.

    Raises:
      DataError: the disk is full, the folder is read-only, or the like; the file is named.
    """
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        aside = Path(name)

        write(aside)
        aside.chmod(0o644)

        # On the disk before it is renamed: else a machine that loses power could be left with an empty file.
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        aside.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def check_writable(path: Path, *endings: str, option: str = "--out") -> None:
    """Checks the name of a file that will be written at the end, before work starts that may take hours.

    Args:
      path: the file; its folders are made.
      *endings: that it may have, in lower case.
      option: that named it.

    Raises:
      UsageError: it has another one, or cannot be written there.
    """
    if path.suffix.lower() not in endings:
        raise UsageError(f"{option} {path}: expected a file name that ends in {' or '.join(endings)}")
    try:
        if path.is_dir():
            raise UsageError(f"{option} {path}: expected a file, and it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"{option} {path}: nothing can be written there: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically.

    Args:
      path: the file.
      text: all that it will hold.

    Raises:
      DataError: it cannot be written.
    """
    write_atomically(path, lambda aside: aside.write_text(text, "utf-8"))


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Writes one line each, atomically; names of files, whatever their bytes, as the system has them.

    Args:
      path: the file.
      lines: without their ends.

    Raises:
      DataError: it cannot be written.
    """
    content = b"".join(os.fsencode(line) + b"\n" for line in lines)
    write_atomically(path, lambda aside: aside.write_bytes(content))


def as_unicode(name: str) -> str:
    """Returns the name of a file as UTF-8 can hold it: bytes that are none become backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def printable(name: str) -> str:
    """Returns the name of a file as text to show: bytes that are no UTF-8, and control characters, become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file that may hold anything.

    Raises:
      FileNotFoundError: there is no such file.
      DataError: it is no JSON object; it is named.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error

    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: it holds no JSON object")
    return content


def map_array(path: Path) -> np.ndarray:
    """Maps a .npy file that may hold anything into memory, read-only; nothing in it is run.

    Raises:
      DataError: it is missing, or no such file, or one of Python objects; it is named.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # its header may claim anything
    except NPZ_ERRORS as error:
        raise DataError(f"{path} is missing or damaged: {error}") from error

    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is damaged: it is an archive, not one array")
    return array


def check_free(
    folder: Path, marker: str = "", what: str = "", *, option: str = "--workdir", hidden_too: bool = False
) -> None:
    """Checks that a folder is ours to write to: new, empty, or with our `marker` in it.

    Args:
      folder: to write to.
      marker: the file that says it is ours.
      what: it would then hold, for the message.
      option: that named the folder.
      hidden_too: whether hidden files count; they are what another process may just begin with.

    Raises:
      UsageError: it is a file, or holds something else.
    """
    named = f"{option} {folder}".strip()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{named} is a file, not a folder")
    if not folder.is_dir():
        return
    if marker and (folder / marker).is_file():
        return

    if any(hidden_too or not file.name.startswith(".") for file in folder.iterdir()):
        holds = "other files"
        if what:
            holds += f" and no {what}"
        raise UsageError(f"{named} holds {holds}: choose an empty or a new folder")


@contextmanager
def locked(folder: Path, wait: Callable[[str], object] | None = None) -> Iterator[None]:
    """Makes the folder and holds its lock, which goes with the process, however that ends.

    Args:
      folder: to lock.
      wait: wait for another process that holds it, and tell this function which that is; by default it is an error.

    Raises:
      BusyError: another process holds it.
      DataError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}") from error

    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(file)
            if wait is None:
                raise BusyError(f"another run (process {holder}) is at work in {folder}: wait for it") from error
            wait(holder)
            fcntl.flock(file, fcntl.LOCK_EX)

        # For the message of whoever comes next.
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _holder(file: TextIO) -> str:
    """Returns the process that holds a lock; it writes its number just after it has it."""
    for _ in range(50):
        file.seek(0)
        number = file.read().strip()
        if number:
            return number
        time.sleep(0.01)
    return "unknown"
