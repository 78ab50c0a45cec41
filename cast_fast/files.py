"""Files that are whole or absent, results that are complete or not there at all, and folders that one process holds.

What is not yet whole has a name of its own, ``.cast-fast-RANDOM.part``, beside its place, and is locked by who writes
it. A killed process leaves such a part behind, whose lock is gone: `remove_parts` tells it from a living one by that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from cast_fast.errors import UserError

logger = logging.getLogger("cast_fast")

_OURS = ".cast-fast"
_LOCK = f"{_OURS}.lock"
_PARTS = f"{_OURS}-*.part"


def shown(path: object) -> str:
    """A path as text for one line: as it is when printable, else with escapes."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def folder_fault(folder: Path) -> str | None:
    """Why a folder cannot be read from, for one line; None for one that can be looked into."""
    try:
        return None if stat.S_ISDIR(folder.stat().st_mode) else "is not a folder"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _part_in(folder: Path) -> Path:
    """A name that nobody else has, no longer for a long name of the file."""
    return folder / f"{_OURS}-{secrets.token_hex(8)}.part"


def _hold(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a file system without locks: parts of killed processes stay there
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write into that gets its name, or replaces the one that has it, when the ``with`` block ends.

    Where the block fails, or the process is killed in it, what was at ``path`` is still there. Only a ``durable`` file
    is on the disk before it has its name, and the name before the block is left, so that a power failure leaves the
    old or the new content. A link is followed; a pipe or device is written to as it is. The folder must exist.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    part = _part_in(place.parent)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _hold(descriptor)
        # Closed before the renaming, because some network file systems report a failed write only then; the other
        # descriptor keeps the lock.
        with os.fdopen(os.dup(descriptor), "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, place)
        if durable:
            sync_folder(place.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
        os.close(descriptor)


def write_whole(path: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Writes a file whole or not at all, as `whole_file` does; text goes out as UTF-8.

    Raises:
        OSError: it cannot be written; what was at ``path`` is still there.
    """
    with whole_file(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_parts(folder: Path) -> None:
    """Removes what killed processes left half-written in a folder, but not below; parts being written stay."""
    for part in folder.glob(_PARTS):
        with contextlib.suppress(OSError):  # held by who writes it, or gone
            is_folder = part.is_dir()
            # NFS locks a file only where it is open for writing.
            descriptor = os.open(part, (os.O_RDONLY if is_folder else os.O_WRONLY) | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_folder:
                    shutil.rmtree(part)
                else:
                    part.unlink()
            finally:
                os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries; file systems that cannot (some network ones) say EINVAL and need not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(lock: Path, refusal: str) -> Iterator[None]:
    """Holds a lock file; the operating system releases it when the process ends, however it ends.

    For processes: one that has the lock already gets it once more, and loses it where the first of the two ends.

    Raises:
        UserError: another process holds it: ``refusal``, and which process that is.
        OSError: the lock file cannot be written.
    """
    with lock.open("a+b") as handle:
        try:
            # Record locks are not inherited by forked children, so an orphan cannot keep a dead run's folder locked.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                handle.seek(0)
                owner = handle.read(1000).decode(errors="replace").strip() or "unknown"
                raise UserError(f"{refusal} ({owner})") from None
            logger.warning("no lock on %s (%s): make sure that no other process writes there", lock.parent, error)
        else:
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {platform.node()}\n".encode())
            handle.flush()
        yield


@contextlib.contextmanager
def claimed(folder: Path, record: str, command: str) -> Iterator[None]:
    """Holds a folder that a command fills, made if absent, and removes what a killed run left half-written.

    Args:
        folder: absent, empty, or begun by the command.
        record: name of the file in it by which the command knows its own folders; it is written first.
        command: for the refusal.

    Raises:
        UserError: it is no folder, has other content, or another process holds it.
        OSError: it cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{shown(folder)} is not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / record).exists() and any(not name.startswith(_OURS) for name in os.listdir(folder)):
        raise UserError(f"{shown(folder)} is not empty and has no {record}: expected a new folder")
    with exclusive(folder / _LOCK, f"{shown(folder)} is in use by another cast-fast {command}"):
        remove_parts(folder)
        yield


class Results:
    """What a command writes into a folder: all of it at the end of a ``with`` block, or nothing if the block fails.

    Files are staged in a hidden folder inside, which is on the same file system, and moved into place together. Files
    of earlier results with the same names are replaced, others are left alone.

    Args:
        folder: where results go; made if absent.

    Raises:
        UserError: from the block's beginning and end and from ``write``: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.part = _part_in(folder)
        """The hidden folder, for what is to be read back before it counts."""
        self._held = contextlib.ExitStack()
        self.written: list[Path] = []
        """Where the files will be found."""

    def __enter__(self) -> Results:
        with self._told():
            remove_parts(self.folder)
            self.part.mkdir(parents=True)
            descriptor = os.open(self.part, os.O_RDONLY)
            self._held.callback(os.close, descriptor)
            _hold(descriptor)
        return self

    def write(self, name: str, content: bytes | str) -> Path:
        """Stages a file; returns its place in ``part``.

        Args:
            name: of the file, below the folder.
            content: of the file; text goes out as UTF-8.
        """
        path = self.part / name
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.written.append(self.folder / name)
        return path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._told():
                    _require_places(self.part, self.folder)
                    _move_into(self.part, self.folder)
        finally:
            shutil.rmtree(self.part, ignore_errors=True)
            self._held.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"--out: {write_fault(error, self.folder)}; no result of this call is kept") from error


def write_fault(error: OSError, folder: Path) -> str:
    """One line that says that a folder cannot be written to, and why."""
    return f"cannot write into {folder} ({error.strerror or error})"


def _move_into(source: Path, target: Path) -> None:
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            _move_into(entry, place)
        else:
            os.replace(entry, place)


def _require_places(source: Path, target: Path) -> None:
    """Refuses, before anything is moved, files where folders are and folders where files are; raises OSError."""
    for entry in source.iterdir():
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            _require_places(entry, place)
        elif place.exists() and entry.is_dir() != place.is_dir():
            number = errno.EISDIR if place.is_dir() else errno.ENOTDIR
            raise OSError(number, os.strerror(number), str(place))
