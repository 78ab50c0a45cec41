"""Checkpoints that are whole or absent: written atomically, verified on load, never a pickle that runs code.

On disk::

    RUN/checkpoints/step-N/NAME.pt        one file per key of the state, as ``torch.save`` writes it
    RUN/checkpoints/step-N/config.json    the run's configuration
    RUN/checkpoints/step-N/manifest.json  step, fingerprint, versions; size and SHA-256 of every file; its own SHA-256
    RUN/checkpoints/last                  text file: the name of the newest whole folder, for people and scripts

A checkpoint is written into a temporary folder beside its place, every file and the folder are flushed to the disk, and
one rename makes it appear. So after a kill or a power failure at any moment ``step-N`` is either complete or not there.
Reading does not trust ``last``: it takes the newest folder whose hashes agree, and says loudly what it passed over.

One process at a time may write into a run folder: hold ``exclusive`` while training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from cast_fast import __version__
from cast_fast.errors import UserError

logger = logging.getLogger("cast_fast")

FORMAT = 1
"""Version of the layout on disk; a newer one is refused."""
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
CONFIG = "config.json"
LAST = "last"

_STEP_NAME = re.compile(r"step-(\d+)")
_TEMPORARY = ".tmp-"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK = 1 << 20


class DamagedCheckpoint(Exception):
    """A checkpoint is incomplete, altered or unreadable; the message names the file and the damage."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, every tensor on the CPU."""

    path: Path
    step: int
    fingerprint: str
    config: dict[str, Any]
    state: dict[str, Any]
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Versions of everything that can change the numbers of a run: Python, this package, torch, DALI, …"""
    found = {"python": platform.python_version(), "cast_fast": __version__, "torch": torch.__version__}
    for name in ("torchvision", "triton", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def save(
    run: Path, step: int, state: Mapping[str, Any], *, config: Mapping[str, Any], fingerprint: str, keep: int
) -> Path:
    """Writes ``RUN/checkpoints/step-N`` so that it is complete or absent, then points ``last`` at it.

    Args:
        run: the run folder; the caller holds its ``exclusive`` lock.
        step: optimizer steps done, N.
        state: name → anything made of tensors and plain values (numbers, strings, None, lists, tuples, dicts); one file
            a name.
        config: JSON-able configuration, stored beside the tensors.
        fingerprint: hash of the part of the configuration that a resumed run may not change.
        keep: how many of the newest checkpoints to keep, this one included.

    Returns:
        The folder of the checkpoint. A whole checkpoint of the same step and fingerprint is left as it is.

    Raises:
        UserError: the disk is full, over its quota or not writable. Nothing saved earlier is touched then.
        ValueError: ``keep`` or ``step`` is out of range, or a name cannot be a file's.
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}, expected at least 1")
    if step < 0:
        raise ValueError(f"step: got {step}, expected at least 0")
    for name in state:
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise ValueError(f"state: got the name {name!r}, expected letters, digits and underscores")
    folder = Path(run) / FOLDER
    final = folder / f"step-{step}"
    temporary = folder / f"{_TEMPORARY}step-{step}"
    needed = estimated_bytes(state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_temporaries(folder)
        if final.exists() and _is_same(final, fingerprint):
            _point_last_at(folder, final.name)
            return final
        require_space(folder, needed, f"the checkpoint of step {step}")
        temporary.mkdir()
        files = {f"{name}.pt": _write(temporary / f"{name}.pt", _saver(value)) for name, value in state.items()}
        files[CONFIG] = _write(temporary / CONFIG, _text(json.dumps(dict(config), indent=2) + "\n"))
        manifest = {
            "format": FORMAT,
            "step": step,
            "fingerprint": fingerprint,
            "versions": versions(),
            "files": files,
        }
        manifest["sha256"] = _digest(manifest)
        _write(temporary / MANIFEST, _text(json.dumps(manifest, indent=2)))
        _sync_folder(temporary)
        if final.exists():
            _set_aside(final)
        os.rename(temporary, final)
        _sync_folder(folder)
        _point_last_at(folder, final.name)
        _prune(folder, step, keep)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(_failure(error, folder, step, needed)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


class BackgroundSaver:
    """Saves in a thread, one checkpoint at a time, while training goes on.

    What is saved is the state at the call: every tensor is copied before ``save`` returns. What can be lost is time: a
    process that is killed before the thread has finished leaves the checkpoint before this one as the newest.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, run: Path, step: int, state: Mapping[str, Any], **arguments: Any) -> None:
        """``checkpoint.save`` with these arguments, later; waits for the save before this one.

        Raises:
            UserError: that one failed.
        """
        self.wait()
        copied = _on_cpu(state, copy=True)

        def write() -> None:
            try:
                save(run, step, copied, **arguments)
            except BaseException as error:  # handed over to the thread that trains
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            UserError: the last save failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def estimated_bytes(state: Any) -> int:
    """An upper estimate of the size of a saved state in bytes: every storage once, plus room for names and headers."""
    storages: dict[tuple[str, int], int] = {}
    small = 0

    def count(value: Any) -> None:
        nonlocal small
        small += 256
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            # Tensors on the meta device all have address 0.
            key = (str(value.device), storage.data_ptr() if value.device.type != "meta" else id(value))
            storages[key] = max(storages.get(key, 0), storage.nbytes())
            small += 512
        elif isinstance(value, Mapping):
            for item in value.items():
                count(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                count(item)

    count(state)
    return sum(storages.values()) + small + (1 << 16)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Checks that the disk of ``folder`` (which may not exist yet) has ``needed`` bytes free.

    Raises:
        UserError: it has not.
    """
    free = _free(folder)
    if free < needed:
        raise UserError(
            f"no disk space for {what} in {folder}: {_megabytes(needed)} needed, {_megabytes(free)} free; "
            "nothing saved earlier is touched"
        )


def _free(folder: Path) -> int:
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _failure(error: OSError, folder: Path, step: int, needed: int) -> str:
    cause = os.strerror(error.errno) if error.errno else str(error)
    message = f"cannot save the checkpoint of step {step} in {folder}: {cause}"
    if error.errno in _NO_SPACE:
        try:
            free = _megabytes(_free(folder))
        except OSError:
            free = "an unknown amount"
        message += f"; about {_megabytes(needed)} needed, {free} free"
    return message + "; earlier checkpoints are untouched: mend it and go on with --resume"


class _HashedFile:
    """What ``torch.save`` writes into: counts and hashes, and keeps the first error instead of raising it.

    An exception raised through torch's C++ writer comes back as an unrelated 'unexpected pos' error.
    """

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self._digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        count = memoryview(data).nbytes
        if self.error is None:
            try:
                self._handle.write(data)
            except OSError as error:
                self.error = error
            self._digest.update(data)
            self.size += count
        return count

    def flush(self) -> None:
        """Left to the end: one flush and one fsync a file."""

    def record(self) -> dict[str, Any]:
        return {"sha256": self._digest.hexdigest(), "size": self.size}


def _saver(value: Any) -> Callable[[_HashedFile], object]:
    return lambda sink: torch.save(_on_cpu(value), sink)  # pyright: ignore[reportArgumentType]


def _text(text: str) -> Callable[[_HashedFile], object]:
    return lambda sink: sink.write(text.encode())


def _on_cpu(value: Any, copy: bool = False) -> Any:
    """The same structure with every tensor on the CPU, so that a checkpoint loads on a machine without its GPU.

    With ``copy`` nothing is shared with the original, which may go on changing.
    """
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        return tensor.clone() if copy and tensor.data_ptr() == value.data_ptr() else tensor
    if isinstance(value, Mapping):
        return {key: _on_cpu(item, copy) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_cpu(item, copy) for item in value]
    if isinstance(value, tuple):
        return tuple(_on_cpu(item, copy) for item in value)
    return value


def _write(path: Path, write: Callable[[_HashedFile], object]) -> dict[str, Any]:
    """Writes one file and flushes it to the disk; returns its size and hash."""
    with open(path, "wb", buffering=_CHUNK) as handle:
        sink = _HashedFile(handle)
        write(sink)
        if sink.error is not None:
            raise sink.error
        handle.flush()
        os.fsync(handle.fileno())
    return sink.record()


def _sync_folder(folder: Path) -> None:
    """Flushes a folder's entries; file systems that cannot (some network ones) say EINVAL and need not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _point_last_at(folder: Path, name: str) -> None:
    temporary = folder / f"{_TEMPORARY}{LAST}"
    _write(temporary, _text(name + "\n"))
    os.replace(temporary, folder / LAST)
    _sync_folder(folder)


def _prune(folder: Path, newest: int, keep: int) -> None:
    """Removes checkpoints older than the ``keep`` newest, counted from ``newest`` downwards.

    Folders of later steps (passed over as damaged) are left to a person. A folder is renamed before it is emptied, so
    that a kill in between leaves no half checkpoint.
    """
    for step in [step for step in steps(folder.parent) if step <= newest][keep:]:
        doomed = folder / f"{_TEMPORARY}remove-step-{step}"
        try:
            os.rename(folder / f"step-{step}", doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint of step %d: %s", step, error)


def _remove_temporaries(folder: Path) -> None:
    """Removes what dead runs left; a live one cannot be there, because the caller holds the run's lock."""
    for entry in folder.iterdir():
        if entry.name.startswith(_TEMPORARY):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def _set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint to ``step-N.damaged`` (or ``.damaged-2``, …): out of the way, but not lost."""
    count = 1
    while (aside := path.with_name(f"{path.name}.damaged{'' if count == 1 else f'-{count}'}")).exists():
        count += 1
    os.rename(path, aside)
    return aside


def _is_same(path: Path, fingerprint: str) -> bool:
    try:
        return _verify(path)["fingerprint"] == fingerprint
    except DamagedCheckpoint:
        return False


@contextlib.contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Holds the run folder's lock; the operating system releases it when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    path = Path(run) / ".lock"
    with open(path, "a+b") as handle:
        try:
            # Record locks are not inherited by forked children, so an orphan cannot keep a dead run's folder locked.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning("no lock on %s (%s): make sure that only one process trains in this folder", run, error)
            else:
                handle.seek(0)
                owner = handle.read().decode(errors="replace").strip() or "unknown"
                raise UserError(f"--out {run}: another process is training in this folder ({owner})") from None
        else:
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {platform.node()}\n".encode())
            handle.flush()
        yield


def steps(run: Path) -> list[int]:
    """Steps of the checkpoint folders of a run, newest first, not verified."""
    folder = Path(run) / FOLDER
    if not folder.is_dir():
        return []
    matches = (_STEP_NAME.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def load(path: Path) -> Checkpoint:
    """Reads one checkpoint folder after checking every file against the manifest.

    Raises:
        DamagedCheckpoint: a file is missing, truncated or altered, or holds more than tensors and plain values.
        UserError: it may not be read, or was written by a newer version of the layout.
    """
    path = Path(path)
    manifest = _verify(path)
    state = {}
    for name in manifest["files"]:
        if name == CONFIG:
            continue
        try:
            state[name.removesuffix(".pt")] = torch.load(path / name, map_location="cpu", weights_only=True)
        except OSError as error:
            raise _unreadable(path, name, error) from error
        except Exception as error:
            # With agreeing hashes this is a file that was made so: torch refuses pickles that would run code.
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DamagedCheckpoint(
                f"{path.name}/{name}: refused by torch.load(weights_only=True): {reason[0]}"
            ) from error
    return Checkpoint(
        path=path,
        step=manifest["step"],
        fingerprint=manifest["fingerprint"],
        config=json.loads((path / CONFIG).read_bytes()),
        state=state,
        versions=manifest["versions"],
    )


def load_last(run: Path, *, set_aside: bool = False) -> Checkpoint | None:
    """The newest whole checkpoint of a run.

    Args:
        run: the run folder.
        set_aside: rename damaged newer ones to ``step-N.damaged``, so that the continued run can write their steps
            again; only for the process that holds the run's lock.

    Returns:
        ``None`` when the run has no checkpoint at all.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    folder = Path(run) / FOLDER
    damaged: list[Path] = []
    reasons: list[str] = []
    for step in steps(run):
        path = folder / f"step-{step}"
        try:
            checkpoint = load(path)
        except DamagedCheckpoint as error:
            damaged.append(path)
            reasons.append(str(error))
            continue
        for reason in reasons:
            logger.warning("DAMAGED CHECKPOINT: %s", reason)
        if damaged:
            logger.warning("going back to step %d, the newest whole checkpoint in %s", step, folder)
        if set_aside:
            for bad in damaged:
                logger.warning("%s is now %s", bad.name, _set_aside(bad).name)
        return checkpoint
    if damaged:
        raise UserError(f"no whole checkpoint in {folder}: {'; '.join(reasons)}")
    return None


def _verify(path: Path) -> dict[str, Any]:
    """Checks every file against the manifest and returns it."""
    try:
        manifest = json.loads(_read(path, MANIFEST))
        stated = manifest.pop("sha256")
        computed = _digest(manifest)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: not a manifest ({error})") from error
    if stated != computed:
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: altered (its SHA-256 differs)")
    if manifest["format"] > FORMAT:
        raise UserError(
            f"{path}: written in format {manifest['format']} by cast_fast {manifest['versions'].get('cast_fast')}, "
            f"this is {__version__} and reads up to format {FORMAT}"
        )
    if path.name != f"step-{manifest['step']}":
        raise DamagedCheckpoint(f"{path.name}: its manifest says step {manifest['step']}")
    for name, record in manifest["files"].items():
        if Path(name).name != name:
            raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: {name!r} is no plain file name")
        size, digest = _measure(path, name)
        if size != record["size"]:
            raise DamagedCheckpoint(f"{path.name}/{name}: {size} bytes, expected {record['size']}")
        if digest != record["sha256"]:
            raise DamagedCheckpoint(f"{path.name}/{name}: altered (its SHA-256 differs)")
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _unreadable(path: Path, name: str, error: OSError) -> Exception:
    """A missing file or a failing disk is damage; a file that this user may not read is for the user to mend."""
    if isinstance(error, FileNotFoundError):
        return DamagedCheckpoint(f"{path.name}/{name}: missing")
    if isinstance(error, PermissionError):
        return UserError(f"cannot read {path / name}: permission denied")
    return DamagedCheckpoint(f"{path.name}/{name}: {error.strerror or error}")


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise _unreadable(path, name, error) from error


def _measure(path: Path, name: str) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    try:
        with io.FileIO(path / name) as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise _unreadable(path, name, error) from error
    return size, digest.hexdigest()
