"""Files written aside and renamed, so that a reader never sees half of one."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from badloss_jax.errors import DataError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a path beside `path` and renames what it wrote; on failure `path` stays as it was.

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
        aside.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_atomically(path, lambda aside: aside.write_text(text, "utf-8"))
