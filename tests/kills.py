"""What `kill -9` at any moment leaves of a folder, taken from one run that nothing kills.

Python tells its audit hooks of every file that it renames, removes or appends to, in every thread and before it does.
A copy of the folder at each of these moments is what a process that was killed there would have left. Half-written
files have names of their own until they are renamed, so that these moments stand for all others.
"""

import hashlib
import os
import re
import shutil
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

_OF_A_TREE = 7  # one of so many files that are removed with their folder
_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


class Snapshots:
    """Copies of a folder, one before each change that leaves it other than it was at the last.

    Args:
      folder: that is watched, with all below it.
      copies: the folder for the copies, 0, 1, ...

    """

    def __init__(self, folder, copies):
        self._folder = folder
        self._copies = copies
        self._of_state = {}
        self._count = 0
        self._removed = 0
        self._lock = threading.RLock()
        self._copying = False

    @property
    def taken(self):
        """(the change that came next, the copy), in order."""
        return list(self._of_state.values())

    def before(self, event, arguments):
        """Is told of an event before it happens."""
        if event not in _EVENTS or (self._copying and self._lock._is_owned()):
            return
        path = _path_of(event, arguments)
        if event in ("os.remove", "os.rmdir") and arguments[-1] != -1:
            self._removed += 1
            if self._removed % _OF_A_TREE:
                return
        if path.startswith(f"{self._folder}{os.sep}"):
            with self._lock:  # no other thread changes anything meanwhile
                self._copying = True
                try:
                    self._take(f"{event} {path.removeprefix(str(self._folder))}")
                finally:
                    self._copying = False

    def _take(self, change):
        copy = self._copies / str(self._count)
        self._count += 1
        while True:
            try:
                shutil.copytree(self._folder, copy)
                break
            except (shutil.Error, FileNotFoundError):  # what is not Python's went on, and renamed a file
                shutil.rmtree(copy, ignore_errors=True)
        # Of two that differ in files that are half-written the later one, which has more of them.
        self._of_state[_state_of(copy)] = change, copy


def _path_of(event, arguments):
    """Returns the path that is about to change, or "" where none is."""
    path, *rest = arguments
    if isinstance(path, int) or (event == "open" and not rest[1] & os.O_APPEND):
        return ""
    path = os.fsdecode(path)
    folder = rest[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
    return os.path.abspath(path) if folder == -1 else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)


def _state_of(folder):
    """Returns a hash of all names and contents, but for files that nothing ever reads."""
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        half_written = re.fullmatch(r"\.\w+-\w{8}\.\w+", path.name)
        if not half_written and path.name != ".lock":
            content = path.read_bytes() if path.is_file() else b""
            state.update(repr((str(path.relative_to(folder)), content)).encode())
    return state.digest()


_watching: list[Snapshots] = []
_installed = False


def _hook(event, arguments):
    for snapshots in _watching:
        snapshots.before(event, arguments)


@contextmanager
def snapshots(folder: Path, copies: Path):
    """Yields a `Snapshots` that watches a folder as long as the block goes on."""
    global _installed
    if not _installed:
        sys.addaudithook(_hook)  # for ever, as Python has no way to take it back
        _installed = True

    taken = Snapshots(folder, copies)
    _watching.append(taken)
    try:
        yield taken
    finally:
        _watching.remove(taken)
