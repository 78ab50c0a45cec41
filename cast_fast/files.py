"""Files that are whole or absent, and results that are complete or not there at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from cast_fast.errors import UserError


def write_whole(path: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Writes a file whole or not at all: under another name beside its place, then renamed. Its folder must exist.

    The file survives a process that is killed. Only a ``durable`` one is on the disk before it has its name, so that a
    power failure leaves the old or the new content.

    Raises:
        OSError: it cannot be written; what was at ``path`` is still there.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


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
        self.part = folder / f".results-{os.getpid()}.part"
        """The hidden folder, for what is to be read back before it counts."""
        self.written: list[Path] = []
        """Where the files will be found."""

    def __enter__(self) -> Results:
        with self._told():
            self.part.mkdir(parents=True, exist_ok=True)
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
                    _move_into(self.part, self.folder)
        finally:
            shutil.rmtree(self.part, ignore_errors=True)

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
