"""Tar archives from anybody, read in place: a member is a range of bytes of a file, and its name never becomes a path.

Begin with `members`. A gzipped archive cannot be read at random, so `inflated` keeps what it holds beside it.
"""

import gzip
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from badloss_jax.core.errors import DataError
from badloss_jax.core.files import write_atomically

_MAX_TABLE = 2**22  # bytes of one table
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error)


class Member(NamedTuple):
    """A plain file in an archive: its name, the archive, and its range of bytes there."""

    name: str
    archive: Path
    offset: int
    size: int


def read_range(file: Path, offset: int, size: int, name: str) -> bytes:
    """Reads a range of bytes.

    Args:
      file: to read from.
      offset: of the first byte.
      size: how many bytes.
      name: of what lies there, for messages.

    Returns:
      The bytes, exactly `size` of them.

    Raises:
      DataError: the file is not there any more, or is shorter than it was.
    """
    try:
        with open(file, "rb") as opened:
            opened.seek(offset)
            content = opened.read(size)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error

    if len(content) != size:
        raise DataError(f"{file} has become shorter: {name} has {len(content)} bytes, not {size}")
    return content


def read_table(member: Member, shown: Path) -> bytes:
    """Reads a small member.

    Args:
      member: to read.
      shown: what to call its archive in messages.

    Returns:
      Its bytes.

    Raises:
      DataError: it is larger than 4 MiB, or as `read_range`.
    """
    if member.size > _MAX_TABLE:
        raise DataError(f"{shown} holds a table of {member.size:,} bytes, expected up to {_MAX_TABLE:,}")
    return read_range(member.archive, member.offset, member.size, shown.name)


def members(
    archive: Path,
    largest: int,
    inside: Member | None = None,
    shown: Path | None = None,
) -> Iterator[Member]:
    """Yields the plain files in a tar archive, or in one inside it.

    Args:
      archive: the file.
      largest: bytes that a member may have.
      inside: the member that is the inner archive; by default the file itself is read.
      shown: what to call the file in messages; by default its own path.

    Yields:
      Members, their offsets counted from the beginning of the file.

    Raises:
      DataError: it is no tar archive, or ends too early, or has links, devices, names with "..", or too large members.
    """
    shown = shown or archive
    try:
        with open(archive, "rb") as file:
            start = 0
            window: IO[bytes] | _Window = file
            if inside is not None:
                start = inside.offset
                window = _Window(file, inside.offset, inside.size)

            with tarfile.open(fileobj=window, mode="r:") as tar:  # type: ignore[call-overload]
                for entry in tar:
                    name = entry.name.removeprefix("./")
                    _check_entry(entry, name, largest, shown)
                    if _is_plain(entry):
                        yield Member(name, archive, start + entry.offset_data, entry.size)
                    # tarfile would keep all 1.3 million of them.
                    tar.members = []
    except DataError:  # is a ValueError, too
        raise
    except _TAR_ERRORS as error:
        raise DataError(f"{shown} is damaged, or no tar archive: {error}") from error


def named_members(archive: Path, largest: int, shown: Path) -> dict[str, Member]:
    """Finds the members of a small archive by name.

    Args:
      archive: the file.
      largest: bytes that a member may have.
      shown: what to call the file in messages.

    Returns:
      File name, without folders -> member; of two with one name the last.

    Raises:
      DataError: as `members`.
    """
    return {member.name.rpartition("/")[2]: member for member in members(archive, largest, shown=shown)}


def matched(archive: Path, name: str, pattern: str) -> tuple[str, ...]:
    """Takes a member's name apart.

    Args:
      archive: that the member lies in, for messages.
      name: of the member.
      pattern: the regular expression that the whole name must match.

    Returns:
      The groups of the pattern.

    Raises:
      DataError: the name has another form.
    """
    match = re.fullmatch(pattern, name)
    if match is None:
        raise DataError(f"{archive} holds {name!r}, which the official archive does not")
    return match.groups()


def inflated(archive: Path, unpacked: Path) -> Path:
    """Inflates a gzipped archive, unless that was done before.

    Args:
      archive: the .tar.gz or .tgz file.
      unpacked: the folder to keep the tar file in; its name tells the archive's size and time.

    Returns:
      The tar file, to be read in place.

    Raises:
      DataError: the archive is damaged, or a decompression bomb; or the disk is full.
    """
    status = archive.stat()
    tar = unpacked / f"{archive.stem}-{status.st_size}-{status.st_mtime_ns}.tar"
    # No archive of images, which are packed already, or of bare pixels comes near this.
    limit = max(2**26, 20 * status.st_size)

    def inflate(aside: Path) -> None:
        try:
            with gzip.open(archive) as compressed, open(aside, "wb") as file:
                while piece := compressed.read(2**20):
                    file.write(piece)
                    if file.tell() > limit:
                        raise DataError(f"{archive} unpacks to more than {limit:,} bytes: a decompression bomb")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{archive} is damaged, or not gzipped: {error}") from error

    if not tar.is_file():
        write_atomically(tar, inflate)
    return tar


def _is_plain(entry: tarfile.TarInfo) -> bool:
    return entry.isfile() and not entry.issparse()


def _check_entry(entry: tarfile.TarInfo, name: str, largest: int, shown: Path) -> None:
    """Refuses what no official archive holds, folders aside."""
    outside = name.startswith("/") or ".." in name.split("/")
    if outside or not (_is_plain(entry) or entry.isdir()):
        raise DataError(f"{shown} holds {name!r}, a link, device or outside name: not the official one")
    if entry.size > largest:
        raise DataError(f"{shown} holds {name!r} of {entry.size:,} bytes, expected up to {largest:,}")


class _Window:
    """A part of an open file, as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, length: int):
        self._file = file
        self._start = start
        self._length = length
        self._position = 0

    def read(self, count: int = -1) -> bytes:
        available = max(self._length - self._position, 0)
        if count < 0 or count > available:
            count = available

        # Others may have moved the file's own position meanwhile.
        self._file.seek(self._start + self._position)
        content = self._file.read(count)
        self._position += len(content)
        return content

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}
        self._position = position + origins[whence]
        return self._position

    def tell(self) -> int:
        return self._position
