"""Checkpoints that are whole or absent: written atomically by all ranks, verified on load, free of code.

On disk::

    RUN/checkpoints/step-N/rank-R.safetensors  the tensors that rank R of those who saved has written
    RUN/checkpoints/step-N/state.json          plain values, and which file has which block of which tensor
    RUN/checkpoints/step-N/config.json         the run's configuration
    RUN/checkpoints/step-N/manifest.json       step, fingerprint, versions; size and SHA-256 of every file; its own
    RUN/checkpoints/last                       text file: the newest whole folder's name, for people and scripts

Every rank writes one file into a temporary folder; rank 0 adds the rest when all have finished. Every file and the
folder are flushed to the disk, and one rename makes the checkpoint appear. So after a kill or a power failure at any
moment, on any rank, ``step-N`` is either complete or not there. Reading does not trust ``last``: it takes the newest
folder whose hashes agree, and says loudly what it passed over. No file is a pickle, and none is unpickled.

torch.distributed.checkpoint shares out the work among ranks: see ``checkpoint_storage``, which is imported only where
tensors are written or read, because that takes a while. ``checkpoint_state`` is what stands in the files. A checkpoint
can be read by any number of processes.

One run at a time may write into a run folder: hold ``run_folder.locked_run`` while training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import torch

from cast_fast import __version__, distributed
from cast_fast.checkpoint_state import Entry, Part, Sink, check_files, decode, encode, parse_entries
from cast_fast.errors import UserError
from cast_fast.files import remove_parts, sync_folder, write_whole

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

logger = logging.getLogger("cast_fast")

FORMAT = 2
"""Version of the layout on disk; others are refused. 1 had a file of ``torch.save`` for each key of the state."""
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
CONFIG = "config.json"
STATE = "state.json"
LAST = "last"

_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]*)")
_TEMPORARY = ".tmp-"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK = 1 << 20


class DamagedCheckpoint(Exception):
    """A checkpoint is incomplete, altered or unreadable; the message names the file and the damage."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    step: int
    fingerprint: str
    config: dict[str, Any]
    state: Any
    """What was saved, every tensor whole: on the CPU, or from ``describe`` without content on the meta device."""
    versions: dict[str, str]
    _values: Any = dataclasses.field(repr=False)
    _entries: dict[str, Entry] = dataclasses.field(repr=False)


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
    run: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    fingerprint: str,
    keep: int,
    group: Any = None,
) -> Path:
    """Writes ``RUN/checkpoints/step-N`` so that it is complete or absent, then points ``last`` at it.

    Args:
        run: the run folder, which all ranks see; rank 0 holds its lock.
        step: optimizer steps done, N.
        state: made of tensors, ``Part`` and plain values (numbers, strings, None, lists, tuples, dicts). On many ranks
            a tensor is the same on each rank that has it and is written by one of them, a ``Part`` by the rank that
            has it, and plain values are rank 0's.
        config: JSON-able configuration, stored beside the tensors.
        fingerprint: hash of the part of the configuration that a resumed run may not change.
        keep: how many of the newest checkpoints to keep, this one included.
        group: a gloo process group whose ranks all take part; ``None`` for this process alone.

    Returns:
        The folder of the checkpoint. A whole checkpoint of the same step and fingerprint is left as it is.

    Raises:
        UserError: on rank 0, where some rank's disk is full, over its quota or not writable. Nothing saved earlier is
            touched then.
        SystemExit: on the other ranks, with rank 0's exit code, where some rank failed.
        RuntimeError: a rank is gone or did not come within the group's time-out.
        ValueError: ``keep`` or ``step`` is out of range, or something else is in ``state``.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    from cast_fast import checkpoint_storage

    if keep < 1:
        raise ValueError(f"keep: got {keep}, expected at least 1")
    if step < 0:
        raise ValueError(f"step: got {step}, expected at least 0")
    values, tensors = encode(state)
    main = group is None or distributed.rank() == 0
    folder = Path(run) / FOLDER
    final = folder / f"step-{step}"
    needed = estimated_bytes(state)

    def prepare() -> str | None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_temporaries(folder)
            if final.exists() and _is_same(final, fingerprint):
                _point_last_at(folder, final.name)
                return None
            require_space(folder, needed, f"the checkpoint of step {step}")
            # A name of its own: a hung process of an earlier start cannot write into it.
            name = f"{_TEMPORARY}step-{step}-{uuid.uuid4().hex[:12]}"
            (folder / name).mkdir()
            return name
        except OSError as error:
            raise UserError(_failure(error, folder, step, needed)) from error

    name = prepare() if group is None else distributed.on_main(prepare, "checkpoint", group)
    if name is None:
        return final
    temporary = folder / name

    def write(file: str, content: Callable[[Sink], object]) -> dict[str, Any]:
        return _write(temporary / file, content)

    def finish(entries: dict[str, Entry], files: dict[str, dict[str, Any]]) -> None:
        for file, record in files.items():
            _require_visible(temporary / file, record["size"])
        content = {"values": values, "tensors": {name: entry.to_json() for name, entry in entries.items()}}
        files[STATE] = write(STATE, _text(json.dumps(content)))
        files[CONFIG] = write(CONFIG, _text(json.dumps(dict(config), indent=2) + "\n"))
        manifest = {"format": FORMAT, "step": step, "fingerprint": fingerprint, "versions": versions(), "files": files}
        manifest["sha256"] = _digest(manifest)
        write(MANIFEST, _text(json.dumps(manifest, indent=2)))
        sync_folder(temporary)
        if final.exists():
            _set_aside(final)
        os.rename(temporary, final)
        sync_folder(folder)
        _point_last_at(folder, final.name)
        _prune(folder, step, keep)

    try:
        checkpoint_storage.save(tensors, write, finish, group)
    except CheckpointException as error:
        _raise_for_rank(error, group, lambda cause: _failure(cause, folder, step, needed))
    finally:
        # After the rename it is not there any more.
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _raise_for_rank(error: CheckpointException, group: Any, describe: Callable[[OSError], str]) -> NoReturn:
    """Raises what one rank of a failed collective save or load has to raise: rank 0 reports, the others leave."""
    failed, (cause, _) = min(error.failures.items())
    own = error.failures.get(0 if group is None else distributed.rank())
    usual = isinstance(cause, (OSError, UserError))
    if own is not None and not isinstance(own[0], (OSError, UserError)):
        raise own[0]
    if group is not None and distributed.rank() != 0:
        raise SystemExit(2 if usual else 1)
    message = describe(cause) if isinstance(cause, OSError) else str(cause)
    where = "" if group is None else f"rank {failed}: "
    if usual:
        raise UserError(where + message) from cause
    raise RuntimeError(f"{where}{type(cause).__name__}: {message}") from cause


def _require_visible(path: Path, size: int) -> None:
    """Checks on rank 0 that a file which another rank has written is there.

    Raises:
        UserError: it is not.
    """
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        found = None
    if found != size:
        raise UserError(f"{path} was written by another process with {size} bytes, but here it has {found}: "
                        "expected a run folder that all ranks share")  # fmt: skip


class BackgroundSaver:
    """Saves in a thread, one checkpoint at a time, while training goes on.

    What is saved is the state at the call: every tensor is copied before ``save`` returns. What can be lost is time: a
    process that is killed before the thread has finished leaves the checkpoint before this one as the newest.

    On many ranks each has its own; their process group is for saving alone, so that the threads' messages cannot mix
    with those of training.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, run: Path, step: int, state: Mapping[str, Any], **arguments: Any) -> None:
        """``checkpoint.save`` with these arguments, later; waits for the save before this one.

        Raises:
            UserError, SystemExit, RuntimeError: that one failed, as ``checkpoint.save`` does.
        """
        self.wait()
        copied = _copied(state)

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
            UserError, SystemExit, RuntimeError: the last save failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def estimated_bytes(state: Any) -> int:
    """An upper estimate of a saved state in bytes, over all ranks: every storage once, plus room for names."""
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
        elif isinstance(value, Part):
            whole = math.prod(value.size) * value.tensor.element_size()
            storages["part", id(value)] = whole
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
    """Counts and hashes what is written."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        self._handle.write(data)
        self._digest.update(data)
        count = memoryview(data).nbytes
        self.size += count
        return count

    def record(self) -> dict[str, Any]:
        return {"sha256": self._digest.hexdigest(), "size": self.size}


def _text(text: str) -> Callable[[Sink], object]:
    return lambda sink: sink.write(text.encode())


def _copied(value: Any) -> Any:
    """The same structure with a copy of every tensor on the CPU, so that the originals may go on changing."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Part):
        return dataclasses.replace(value, tensor=_copied(value.tensor))
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_copied(item) for item in value)
    return value


def _write(path: Path, write: Callable[[Sink], object]) -> dict[str, Any]:
    """Writes one file and flushes it to the disk; returns its size and hash."""
    with open(path, "wb", buffering=_CHUNK) as handle:
        sink = _HashedFile(handle)
        write(sink)
        handle.flush()
        os.fsync(handle.fileno())
    return sink.record()


def _point_last_at(folder: Path, name: str) -> None:
    write_whole(folder / LAST, name + "\n", durable=True)


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
    remove_parts(folder)
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


def steps(run: Path) -> list[int]:
    """Steps of the checkpoint folders of a run, newest first, not verified."""
    folder = Path(run) / FOLDER
    if not folder.is_dir():
        return []
    matches = (_STEP_NAME.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def describe(path: Path) -> Checkpoint:
    """Checks every file of one checkpoint folder and reads everything but the tensors' content.

    Raises:
        DamagedCheckpoint: a file is missing, truncated or altered, or is not what this module writes.
        UserError: it may not be read, or is in another version of the layout.
    """
    path = Path(path)
    manifest = _verify(path)
    try:
        config = json.loads(_read(path, CONFIG))
        _require(isinstance(config, dict), "no JSON object")
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path.name}/{CONFIG}: {error}") from error
    try:
        content = json.loads(_read(path, STATE))
        _require(isinstance(content, dict) and set(content) == {"values", "tensors"}, "not a state")
        entries = parse_entries(content["tensors"], manifest["files"])
        blank = {name: torch.empty(entry.size, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
        state = decode(content["values"], blank)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path.name}/{STATE}: {error}") from error
    try:
        check_files(path, entries)
    except ValueError as error:
        raise DamagedCheckpoint(f"{path.name}/{error}") from error
    except OSError as error:
        raise _unreadable(path, "rank-*", error) from error
    step, fingerprint, found = (manifest[name] for name in ("step", "fingerprint", "versions"))
    return Checkpoint(path, step, fingerprint, config, state, found, content["values"], entries)


def read(described: Checkpoint, group: Any = None) -> Checkpoint:
    """The same checkpoint with its tensors, whole and on the CPU.

    Args:
        described: from ``describe`` or ``find_last``.
        group: a gloo process group whose ranks all read the same checkpoint; ``None`` for this process alone.

    Raises:
        UserError: the disk failed, on this rank or (on rank 0) on another.
        SystemExit, RuntimeError: as for ``save``.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    from cast_fast import checkpoint_storage

    try:
        tensors = checkpoint_storage.load(described.path, described._entries, group)
    except CheckpointException as error:
        _raise_for_rank(error, group, lambda cause: f"cannot read {described.path}: {cause.strerror or cause}")
    return dataclasses.replace(described, state=decode(described._values, tensors))


def load(path: Path) -> Checkpoint:
    """``describe``, then ``read``, in this process alone."""
    return read(describe(path))


def find_last(run: Path, *, set_aside: bool = False) -> Checkpoint | None:
    """The newest whole checkpoint of a run, as ``describe`` gives it.

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
            checkpoint = describe(path)
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


def load_last(run: Path) -> Checkpoint | None:
    """``find_last``, then ``read``, in this process alone."""
    found = find_last(run)
    return None if found is None else read(found)


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise ValueError(fault)


def _verify(path: Path) -> dict[str, Any]:
    """Checks every file against the manifest and returns it."""
    try:
        manifest = json.loads(_read(path, MANIFEST))
        stated = manifest.pop("sha256")
        computed = _digest(manifest)
        _require(type(manifest["format"]) is int and type(manifest["step"]) is int, "format and step are no integers")
        _require(isinstance(manifest["fingerprint"], str), "the fingerprint is no string")
        for name, kind in (("versions", str), ("files", dict)):
            found = manifest[name]
            _require(isinstance(found, dict) and all(isinstance(v, kind) for v in found.values()), f"{name}: no dict")
        if manifest["format"] == FORMAT:
            _require({STATE, CONFIG} <= manifest["files"].keys(), f"{STATE} or {CONFIG} is not among the files")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: not a manifest ({error})") from error
    if stated != computed:
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: altered (its SHA-256 differs)")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{path}: written in format {manifest['format']} by cast_fast {manifest['versions'].get('cast_fast')}, "
            f"this is {__version__} and reads format {FORMAT} alone: expected the version that began the run"
        )
    if path.name != f"step-{manifest['step']}":
        raise DamagedCheckpoint(f"{path.name}: its manifest says step {manifest['step']}")
    for name, record in manifest["files"].items():
        if Path(name).name != name or "\0" in name:
            raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: {name!r} is no plain file name")
        size = _size(path, name)
        if size != record.get("size"):
            raise DamagedCheckpoint(f"{path.name}/{name}: {size} bytes, expected {record.get('size')}")
        if _hash(path, name) != record.get("sha256"):
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


def _size(path: Path, name: str) -> int:
    """Size of a file that can be read to its end: no pipe, no device."""
    try:
        status = (path / name).stat()
    except OSError as error:
        raise _unreadable(path, name, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise DamagedCheckpoint(f"{path.name}/{name}: not a regular file")
    return status.st_size


def _read(path: Path, name: str) -> bytes:
    _size(path, name)
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise _unreadable(path, name, error) from error


def _hash(path: Path, name: str) -> str:
    digest = hashlib.sha256()
    try:
        with io.FileIO(path / name) as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise _unreadable(path, name, error) from error
    return digest.hexdigest()
